from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.shots import ShotFinder, without_flashes

Picture = NDArray[np.uint8]


def find(thumbs: Sequence[Picture], fps: float = 30.0, first: int = 0) -> list[int]:
    shots = ShotFinder()
    for i, thumb in enumerate(thumbs):
        shots.add(first + i, (first + i) / fps, thumb)
    return shots.cuts()


def scene(seed: int, count: int, shake: float = 1.0) -> list[Picture]:
    """Frames of a coloured, blurry scene whose camera moves by some pixels a frame."""
    draw = np.random.default_rng(seed)
    wall = draw.integers(0, 256, (9, 16, 3)).astype(np.uint8)
    wall = cv2.resize(wall, (400, 225), interpolation=cv2.INTER_CUBIC)
    frames = []
    for i in range(count):
        x = round(60 + shake * 15 * np.sin(i / 4))
        y = round(30 + shake * 10 * np.sin(i / 3))
        frames.append(np.ascontiguousarray(wall[y : y + 144, x : x + 256]))
    return frames


@pytest.mark.parametrize("fps", [23.976, 30.0, 60.0])
def test_cuts_are_found_at_their_frame(fps: float) -> None:
    """At any rate, also two shots of five frames in a row; indices are the video's."""
    thumbs = scene(1, 40) + scene(2, 5) + scene(3, 5) + scene(4, 30)
    assert find(thumbs, fps) == [40, 45, 50]
    assert find(thumbs, fps, first=1000) == [1040, 1045, 1050]


def test_motion_is_no_cut() -> None:
    assert find(scene(1, 100)) == []
    assert find(scene(1, 100, shake=2.0)) == []


def test_a_small_change_of_colour_is_no_cut() -> None:
    """Of blue, which is as far from the ends of the circle of hues as red is near them."""
    hues = [115] * 20 + [125] * 20
    colours = [np.full((144, 256, 3), (hue, 255, 200), np.uint8) for hue in hues]
    assert find([cv2.cvtColor(colour, cv2.COLOR_HSV2RGB) for colour in colours]) == []


def test_cut_to_a_closer_view() -> None:
    """The same scene 1.4 times as large."""
    wide = scene(1, 60)
    close = [cv2.resize(f[20:123, 36:219], (256, 144)) for f in wide[30:]]
    assert find(wide[:30] + close) == [30]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_flash_is_no_cut(length: int) -> None:
    thumbs = scene(1, 60, shake=0.3)
    for i in range(30, 30 + length):
        thumbs[i] = np.clip(thumbs[i].astype(int) + 120, 0, 255).astype(np.uint8)
    assert find(thumbs) == []


def test_only_a_short_bright_interruption_is_a_flash() -> None:
    """The edges of a flash have like pictures outside; two real cuts do not, nor does a longer insert."""
    small = {i: np.full((9, 16), 10.0 * (i >= 22), np.float32) for i in range(60)}
    assert without_flashes([10, 12], small) == []
    assert without_flashes([20, 22], small) == [20, 22]
    assert without_flashes([10, 14], small) == [10, 14]
    assert without_flashes([10, 12, 14, 40], small) == [14, 40]
    assert without_flashes([], small) == []


def test_black_and_still_pictures() -> None:
    black = [np.zeros((144, 256, 3), np.uint8)] * 20
    assert find(black) == []
    assert find(scene(1, 20) + black) == [20]
    assert find(black[:1]) == []
    assert ShotFinder().cuts() == []
