"""What part of a frame shows a picture at all: black videos, and black bars around an upload of another aspect.

Both are read off one image, the brightest value that each pixel takes in a few frames from all over the video, so that
a dark scene is neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.geometry import Floats, Image
from pipelines.video import Decoder, VideoInfo

SAMPLES = 8
"""Frames that are looked at, evenly over the video."""
BLACK_LEVEL = 32
"""Grey level (0 to 255) up to which a pixel is black: 16 above what encoders make of black, noise and ringing."""
BRIGHT_SHARE = 0.01
"""Share of the pixels of a row, a column or a picture that may be brighter (a logo's corner, ringing) in black."""


def brightest(path: str | Path, info: VideoInfo, decoder: Decoder) -> NDArray[np.uint8]:
    """The brightest value that each pixel takes in :data:`SAMPLES` frames: (height, width).

    Raises :class:`pipelines.video.VideoError`.
    """
    chosen = np.unique(np.linspace(0, info.frames - 1, SAMPLES + 2).astype(int)[1:-1]).tolist()
    ranges = [(index, index + 1) for index in chosen]
    light = np.zeros((info.height, info.width), np.uint8)
    for frame in decoder.read(path, info, ranges=ranges, images=chosen):
        image: Image | None = frame.image
        assert image is not None
        light = np.maximum(light, image.max(axis=2))
    return light


def is_black(light: NDArray[np.uint8]) -> bool:
    """Whether a video whose :func:`brightest` is ``light`` shows nothing."""
    return bool((light > BLACK_LEVEL).mean() <= BRIGHT_SHARE)


def content_area(light: NDArray[np.uint8]) -> Floats:
    """The frame without its black bars: (4,) left, top, right, bottom, exclusive. All of it when there are none.

    Args:
        light: (h, w) of :func:`brightest`.
    """
    height, width = light.shape
    if is_black(light):
        return np.array([0.0, 0.0, width, height])
    bright = light > BLACK_LEVEL
    columns = np.flatnonzero(bright.mean(axis=0) > BRIGHT_SHARE)
    rows = np.flatnonzero(bright.mean(axis=1) > BRIGHT_SHARE)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
