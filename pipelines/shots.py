"""Where one shot ends and the next begins. The only file that imports PySceneDetect.

Measured on thumbs of the test clips, of pairs of them joined, and of clips zoomed, shaken, lit by flashes and faded:
PySceneDetect's adaptive detector found 58 of 60 joins (the others join two takes of one scene) and all 30 jumps to a
closer view, and called no pan, zoom or shake a cut; its content detector at 27 found 56 and 22, and called every
third frame of a shaken clip one. Neither sees more than a third of the dissolves: tracks also break where a face's
box jumps.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

ADAPTIVE_RATIO = 3.0
"""How many times the change of its neighbours a frame's change must be."""
LEAST_CHANGE = 10.0
"""Mean change of hue, saturation and value (0 to 255) below which nothing is a cut. At 15 three of fifteen jumps to
a 1.25 times closer view are missed; a man talking in front of a still camera reaches 13, but slowly."""
FLASH_FRAMES = 3
"""Two cuts no further apart, with like pictures outside of them, are a flash of light."""
FLASH_CHANGE = 8.0
"""Mean difference of grey (0 to 255) of two small pictures that are alike: before and after flashes laid over the
test clips it was at most 6.8, between clips of different scenes at least 11."""
SMALL = (16, 9)

CLOCK = Fraction(1, 1_000_000)


class ShotFinder:
    """Finds cuts in a run of frames that is given to it one by one."""

    def __init__(self) -> None:
        from scenedetect.detectors import AdaptiveDetector

        self._detector = AdaptiveDetector(
            adaptive_threshold=ADAPTIVE_RATIO, min_content_val=LEAST_CHANGE, min_scene_len=0
        )
        self._indices: dict[int, int] = {}
        self._small: dict[int, NDArray[np.float32]] = {}
        self._cuts: list[int] = []

    def add(self, index: int, seconds: float, thumb: Picture) -> None:
        """The next frame.

        Args:
            index: in presentation order, one more than the last.
            seconds: presentation time, 0 or later, after the last.
            thumb: (h, w, 3) RGB; about 256 pixels wide is plenty.
        """
        from scenedetect.common import FrameTimecode, Timecode

        pts = round(seconds / CLOCK)
        self._indices[pts] = index
        self._small[index] = small_picture(thumb)
        timecode = FrameTimecode(Timecode(pts, CLOCK), fps=25.0)  # the rate is for printing only
        bgr = cv2.cvtColor(thumb, cv2.COLOR_RGB2BGR)
        found: list[Any] = self._detector.process_frame(timecode, bgr)
        self._cuts += [self._indices[cut.pts] for cut in found]

    def cuts(self) -> list[int]:
        """Index of the first frame of each shot after the first, increasing. The first and last two frames given
        cannot be cuts: the detector compares each with two on either side."""
        return without_flashes(self._cuts, self._small)


def small_picture(thumb: Picture) -> NDArray[np.float32]:
    """(9, 16) grey levels of a picture."""
    grey = cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, SMALL, interpolation=cv2.INTER_AREA), dtype=np.float32)


def without_flashes(cuts: list[int], small: dict[int, NDArray[np.float32]]) -> list[int]:
    """Cuts that are not the two edges of a flash.

    Args:
        cuts: first frame of each new shot, increasing.
        small: picture of every frame by index, all of one shape.
    """
    edges: set[int] = set()
    for first, second in pairwise(cuts):
        if second - first <= FLASH_FRAMES and first not in edges:
            change = np.abs(small[first - 1] - small[second]).mean()
            if change <= FLASH_CHANGE:
                edges |= {first, second}
    return [cut for cut in cuts if cut not in edges]
