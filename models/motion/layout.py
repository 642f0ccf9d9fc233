"""Which landmark is which: the sets of points that drive the motion model. numpy only.

The 68 points are iBUG's, counted from 0. Sides are the picture's: a person's right eye is ``eye_left``. With 70 points the
last two are the pupils, of the eye on the picture's left first; without them gaze cannot be driven.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

PartName = Literal["eye_left", "eye_right", "mouth"]
PARTS: tuple[PartName, ...] = ("eye_left", "eye_right", "mouth")

# fmt: off
FLIP_68 = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31,
     45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
     54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)
# fmt: on
"""iBUG 68: ``points[FLIP_68]`` puts the points of a mirrored face back in order."""

EYES = np.array([range(36, 42), range(42, 48)])
"""Points around the two eyes: outer or inner corner first, the lids in between."""


@dataclass(frozen=True)
class Layout:
    """A set of landmarks."""

    count: int
    """K, points of a face."""
    parts: Mapping[PartName, tuple[int, ...]]
    """Points of each region that a local network moves: an eye with its brow, or the lips."""
    flip: NDArray[np.int64]
    """(K,) order that puts the points of a mirrored face right."""
    rigid: tuple[int, ...]
    """Points that expression hardly moves: eye corners and the bridge of the nose."""


def _layout(pupils: bool) -> Layout:
    left, right = [*range(17, 22), *range(36, 42)], [*range(22, 27), *range(42, 48)]
    flip = FLIP_68
    if pupils:
        left, right, flip = [*left, 68], [*right, 69], np.r_[FLIP_68, 69, 68]
    parts: dict[PartName, tuple[int, ...]] = {
        "eye_left": tuple(left),
        "eye_right": tuple(right),
        "mouth": tuple(range(48, 68)),
    }
    rigid = (27, 28, 29, 30, 36, 39, 42, 45)
    return Layout(len(flip), parts, flip, rigid)


LAYOUTS: Mapping[int, Layout] = {68: _layout(pupils=False), 70: _layout(pupils=True)}
"""By the number of points."""


def layout_of(count: int) -> Layout:
    """The layout with that many points. Raises ``ValueError`` for a number that none has."""
    if count not in LAYOUTS:
        raise ValueError(f"{count} landmarks a face: known are {', '.join(map(str, LAYOUTS))}")
    return LAYOUTS[count]


def with_pupils(points: ArrayLike) -> NDArray[np.floating]:
    """(..., 68, 2) to (..., 70, 2) for faces whose pupils are unknown: they look straight out of their eyes."""
    known = np.asarray(points)
    if known.shape[-2:] != (68, 2):
        raise ValueError(f"landmarks of shape {known.shape}, not (..., 68, 2)")
    return np.concatenate([known, known[..., EYES, :].mean(axis=-2)], axis=-2)
