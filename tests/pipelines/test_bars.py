"""Black videos, and the picture inside black bars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data

from pipelines import bars
from pipelines.video import Decoder, probe
from tests import clips


def padded(left: int, top: int) -> np.ndarray:
    """A picture of 160 x 120 with bars to both sides."""
    inside = skimage.data.astronaut()[: 120 - 2 * top, : 160 - 2 * left]
    return np.pad(inside, ((top, top), (left, left), (0, 0)))


@pytest.mark.parametrize("bar", [(0, 0), (20, 0), (0, 16)])
def test_content_area_of_a_video(bar: tuple[int, int], tmp_path: Path) -> None:
    dark = padded(*bar) // 8
    frames = [dark, dark, padded(*bar), dark] * 6  # a dark scene is not a bar
    path = clips.encode(tmp_path / "padded.mp4", frames)
    with Decoder() as decoder:
        light = bars.brightest(path, probe(path), decoder)
    assert not bars.is_black(light)
    left, top = bar
    wanted = [left, top, 160 - left, 120 - top]
    assert np.abs(bars.content_area(light) - wanted).max() <= 2


def test_content_area_is_exact() -> None:
    """Right and bottom are the first that do not belong to it, as of every box."""
    light = np.zeros((120, 160), np.uint8)
    light[16:104, 21:139] = 200
    assert bars.content_area(light).tolist() == [21, 16, 139, 104]


def test_black_video(tmp_path: Path) -> None:
    frames = [np.zeros((120, 160, 3), np.uint8)] * 3
    path = clips.encode(tmp_path / "black.mp4", frames)
    with Decoder() as decoder:
        light = bars.brightest(path, probe(path), decoder)
    assert bars.is_black(light)
    assert bars.content_area(light).tolist() == [0, 0, 160, 120]
    light[:10, :10] = 255  # half a per cent: a logo
    assert bars.is_black(light)
    light[:2] = 255  # one and a half
    assert not bars.is_black(light)
    light[:60] = 255
    assert not bars.is_black(light)
