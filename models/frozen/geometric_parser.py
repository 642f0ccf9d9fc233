"""Face parsing without a network: what the landmarks outline is drawn, the rest is guessed by colour. Coarse.

Brows, eyes, nose, lips and mouth are polygons of the 68 points. The face is the jaw closed by an arch over the brows. Hair and
the body are two GrabCuts on a small picture whose seeds come from the landmarks, so the outlines of hair, neck and cloth are
a few pixels off, hats and hair are one, and glasses and jewellery are not seen.

Lengths are in *units*: the eye distance, or 0.87 of eyes to mouth where that is longer (a turned head). Positions are (across,
down) from between the eyes, along and across the line from there to the mouth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.frozen.parsing import Image, Labels, ParsingLabel

Mask = NDArray[np.bool_]
Floats = NDArray[np.floating]

GRID = 128
"""Side of the small picture that GrabCut sees, pixels."""
SUBPIXELS = 4
"""Binary digits of a polygon's corners below one pixel."""

FOREHEAD = 1.2
"""Height of the hairline above the line between the ends of the jaw, of a bald head rather than of one with a fringe."""
FOREHEAD_SURE = 0.75
"""The same, of what is skin under nearly every fringe."""
BROW_WIDTH = 0.16
CAP_CENTRE, CAP, CAP_SURE = -0.1, (1.15, 1.45), (1.15, 1.35)
"""Ellipse of the hair of a head of short hair: centre, radii; and of the part that is taken as sure."""
BACK = 2.0
"""How much further back the hair of a turned head reaches, in what its middle lies aside: a head is longer than it is wide, and
the ear hides no hair. With 0, 1.2, 2 and 2.5 the hair of turned heads agrees to 0.25, 0.50, 0.60 and 0.62 with a network's."""
HEAD = (1.7, 2.2)
"""Radii of the ellipse that no short hair leaves."""
LONG_HAIR = 1.9
"""How far from the middle hair may hang down beside the face."""
SKIN_SPREAD, SKIN_LIMIT = (10.0, 5.0, 5.0), 3.0
"""Least deviation of the skin's L, a and b, and how many of them a pixel of skin may be away from the median."""
SHADE_SPREAD = (30.0, 5.0, 5.0)
"""The same under the chin, where the skin is in the shade."""
HAIR_SPREAD, HAIR_LIMIT = (15.0, 5.0, 5.0), 3.0
CHROMA = 3.0
"""Weight of colour against lightness: dark hair before a dark curtain differs by it alone."""
ROUNDS = 2
"""Of each GrabCut."""
LEAST_SEEDS = 10
"""Pixels below which there is nothing to learn a colour from."""

RIGHT_BROW, LEFT_BROW = range(17, 22), range(22, 27)
RIGHT_EYE, LEFT_EYE = range(36, 42), range(42, 48)
NOSE = (27, 31, 32, 33, 34, 35)
UPPER_LIP = (48, 49, 50, 51, 52, 53, 54, 64, 63, 62, 61, 60)
LOWER_LIP = (54, 55, 56, 57, 58, 59, 48, 60, 67, 66, 65, 64)
MOUTH = range(60, 68)
CHEEKS = (1, 3, 31, 27, 35, 13, 15)


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """Landmarks in the pixels of a square picture, and the head's own axes."""

    points: Floats
    """(68, 2)"""
    size: int
    """Side of the picture."""
    eyes: Floats
    """(2,) between the eyes."""
    unit: float
    across: Floats
    down: Floats

    @property
    def chin(self) -> float:
        """How far down the chin is, units."""
        return float((self.points[8] - self.eyes) @ self.down) / self.unit

    @property
    def middle(self) -> float:
        """How far the head's middle lies aside of the eyes' (a turned head's does), units."""
        ends = (self.points[0] + self.points[16]) / 2
        return 0.7 * float((ends - self.eyes) @ self.across) / self.unit

    def axes(self) -> tuple[Floats, Floats]:
        """(size, size) each pixel's position, units: across from the head's middle, and down."""
        y, x = np.mgrid[: self.size, : self.size] + 0.5 - self.eyes[::-1, None, None]
        across = (x * self.across[0] + y * self.across[1]) / self.unit - self.middle
        return across, (x * self.down[0] + y * self.down[1]) / self.unit

    def polygon(self, corners: ArrayLike) -> Mask:
        """(size, size) the inside of a polygon (k, 2) in pixels."""
        mask = np.zeros((self.size, self.size), dtype=np.uint8)
        fine = np.round((np.asarray(corners) - 0.5) * 2**SUBPIXELS).astype(np.int32)
        cv2.fillPoly(mask, [fine], 1, shift=SUBPIXELS)
        return mask.astype(bool)

    def part(self, numbers: Sequence[int]) -> Mask:
        """(size, size) the polygon of some landmarks."""
        return self.polygon(self.points[list(numbers)])

    def ellipse(self, across: float, down: float, radii: tuple[float, float]) -> Mask:
        """(size, size) an ellipse along the head's axes; ``across`` is counted from the head's middle."""
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = self.middle + across + radii[0] * np.cos(angles)
        y = down + radii[1] * np.sin(angles)
        return self.polygon(
            self.eyes + self.unit * (np.outer(x, self.across) + np.outer(y, self.down))
        )

    def outline(self, forehead: float) -> Mask:
        """(size, size) the jaw, closed by half an ellipse that is ``forehead`` high."""
        angles = np.linspace(0, np.pi, 13)[1:-1]
        centre = (self.points[0] + self.points[16]) / 2
        half = (self.points[16] - self.points[0]) / 2
        # above the eyes, not above the jaw's ends: of a turned head one of these is an ear, with hair over it
        lean = float((self.eyes - centre) @ self.across) * self.across
        up = lean - forehead * self.unit * self.down
        arch = centre + np.outer(np.cos(angles), half) + np.outer(np.sin(angles), up)
        return self.polygon(np.concatenate([self.points[:17], arch]))

    def brow(self, numbers: Sequence[int]) -> Mask:
        """(size, size) a thick line through a brow's points."""
        mask = np.zeros((self.size, self.size), dtype=np.uint8)
        fine = np.round((self.points[list(numbers)] - 0.5) * 2**SUBPIXELS).astype(np.int32)
        width = max(1, round(BROW_WIDTH * self.unit))
        cv2.polylines(mask, [fine], False, 1, width, cv2.LINE_8, shift=SUBPIXELS)
        return mask.astype(bool)


def face_of(landmarks: Floats, size: int) -> Face:
    """Landmarks (68, 2) in the pixels of a square picture of ``size`` pixels."""
    points = np.asarray(landmarks, dtype=np.float64)
    right, left = points[36:42].mean(axis=0), points[42:48].mean(axis=0)
    eyes, mouth = (right + left) / 2, points[[48, 54]].mean(axis=0)
    length = float(np.linalg.norm(mouth - eyes))
    down = (mouth - eyes) / length
    return Face(
        points=points,
        size=size,
        eyes=eyes,
        unit=max(float(np.linalg.norm(left - right)), 0.87 * length),
        across=np.array([down[1], -down[0]]),
        down=down,
    )


def draw_features(face: Face, labels: Labels) -> Labels:
    """A copy of ``labels`` (size, size) with what the landmarks outline drawn over it."""
    drawn = labels.copy()
    for mask, label in (
        (face.brow(RIGHT_BROW), ParsingLabel.R_BROW),
        (face.brow(LEFT_BROW), ParsingLabel.L_BROW),
        (face.part(NOSE), ParsingLabel.NOSE),
        (face.part(RIGHT_EYE), ParsingLabel.R_EYE),
        (face.part(LEFT_EYE), ParsingLabel.L_EYE),
        (face.part(UPPER_LIP), ParsingLabel.UPPER_LIP),
        (face.part(LOWER_LIP), ParsingLabel.LOWER_LIP),
        (face.part(MOUTH), ParsingLabel.MOUTH),
    ):
        drawn[mask] = label
    return drawn


def grab_cut(picture: Image, seeds: NDArray[np.uint8]) -> Mask:
    """Foreground by colour; equal input gives equal output, whatever ran before."""
    likely = (seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)
    if likely.sum() < LEAST_SEEDS or (~likely).sum() < LEAST_SEEDS:
        return np.zeros(seeds.shape, dtype=bool)
    cv2.setRNGSeed(0)
    found = seeds.copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    whole = (0, 0, *found.shape[::-1])  # not looked at: the seeds say where
    cv2.grabCut(picture, found, whole, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
    return np.asarray((found == cv2.GC_FGD) | (found == cv2.GC_PR_FGD))


def near(colours: Floats, of: Mask, spread: Sequence[float], limit: float) -> Mask:
    """Pixels whose colour (h, w, 3) is near the median colour of a mask's; none when the mask is nearly empty."""
    if of.sum() < LEAST_SEEDS:
        return np.zeros(of.shape, dtype=bool)
    median = np.median(colours[of], axis=0)
    deviation = 1.48 * np.median(np.abs(colours[of] - median), axis=0)
    distance = ((colours - median) / np.maximum(deviation, spread)) ** 2
    return np.asarray(distance.sum(axis=-1) < limit**2)


def find_hair(face: Face, picture: Image, colours: Floats, skin: Mask, inside: Mask) -> Mask:
    """Hair, by GrabCut from a cap over the head.

    Args:
        face: of the small picture.
        picture: (GRID, GRID, 3) what GrabCut sees.
        colours: (GRID, GRID, 3) L, a, b.
        skin: of the skin's colour.
        inside: the frame.
    """
    across, down = face.axes()
    outline = face.outline(FOREHEAD)
    back = BACK * face.middle
    head = face.ellipse(back / 2, 0.0, (HEAD[0] + abs(back) / 2, HEAD[1]))
    cap = face.ellipse(back, CAP_CENTRE, CAP) | face.ellipse(0.0, CAP_CENTRE, CAP)
    cap &= down < -0.1
    beside = (np.abs(across) < LONG_HAIR) & (down > -0.3) & (down < face.chin + 1)
    sure = face.ellipse(back, CAP_CENTRE, CAP_SURE) & ~face.outline(1.1) & ~skin
    sure &= (down < 0) & inside
    seeds = np.full(skin.shape, cv2.GC_BGD, dtype=np.uint8)
    seeds[head | beside] = cv2.GC_PR_BGD
    seeds[cap & ~(outline & skin)] = cv2.GC_PR_FGD
    seeds[cap & skin] = cv2.GC_PR_BGD
    seeds[head & (down < 0.5) & ~skin & near(colours, sure, HAIR_SPREAD, HAIR_LIMIT)] = (
        cv2.GC_PR_FGD
    )
    seeds[sure] = cv2.GC_FGD
    seeds[face.outline(FOREHEAD_SURE)] = cv2.GC_BGD
    seeds[(down > face.chin - 0.1) & (np.abs(across + face.middle) < 0.7)] = cv2.GC_BGD
    seeds[~inside] = cv2.GC_BGD
    hair = grab_cut(picture, seeds) & ~(skin & outline)
    pieces = cv2.connectedComponents(hair.astype(np.uint8), connectivity=4)[1]
    return hair & np.isin(pieces, np.unique(pieces[hair & cap]))


def find_body(face: Face, picture: Image, inside: Mask) -> Mask:
    """Neck and shoulders, by GrabCut; arguments as of :func:`find_hair`."""
    across, down = face.axes()
    chin = face.chin
    width = np.interp(down, [chin, chin + 0.9, chin + 1.4, 8], [0.6, 0.8, 1.9, 2.3])
    head = face.ellipse(0.0, 0.0, (1.4, 1.8))
    seeds = np.full(inside.shape, cv2.GC_PR_BGD, dtype=np.uint8)
    seeds[(down < chin) & ~head] = cv2.GC_BGD
    seeds[(down > chin - 0.5) & (np.abs(across) < width)] = cv2.GC_PR_FGD
    seeds[(down > chin + 0.1) & (np.abs(across) < 0.4)] = cv2.GC_FGD
    seeds[face.outline(FOREHEAD_SURE)] = cv2.GC_FGD
    seeds[~inside] = cv2.GC_BGD
    return grab_cut(picture, seeds) & (down > 0.5)


def small_masks(crop: Image, landmarks: Floats, inside: Mask) -> dict[ParsingLabel, Mask]:
    """Background to foreground: masks (GRID, GRID) of what colour decides, the later over the earlier.

    Args:
        crop: (size, size, 3) RGB.
        landmarks: (68, 2) window pixels.
        inside: (size, size) the frame.
    """
    small = (GRID, GRID)
    face = face_of(landmarks * (GRID / crop.shape[0]), GRID)
    shown = cv2.resize(inside.astype(np.uint8), small, interpolation=cv2.INTER_NEAREST) > 0
    picture = cv2.resize(crop, small, interpolation=cv2.INTER_AREA)
    colours = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB).astype(np.float64)
    skin = near(colours, face.part(CHEEKS) & shown, SKIN_SPREAD, SKIN_LIMIT)
    loud = np.concatenate([colours[..., :1], (colours[..., 1:] - 128) * CHROMA + 128], axis=-1)
    picture = np.clip(loud, 0, 255).astype(np.uint8)
    across, down = face.axes()
    far = shown & (down < face.chin) & (np.abs(across) > LONG_HAIR)
    if (
        far.any()
    ):  # black outside the frame would be taken for a colour of the background, and of dark hair
        picture[~shown] = np.median(picture[far], axis=0).astype(np.uint8)
    hair = find_hair(face, picture, colours, skin, shown)
    body = find_body(face, picture, shown)
    shaded = near(colours, face.part(CHEEKS) & shown, SHADE_SPREAD, SKIN_LIMIT)
    neck = body & shaded & (np.abs(across) < 1.2) & (down < face.chin + 1.4)
    ears = {
        label: face.ellipse(side, 0.45, (0.22, 0.45)) & skin & shown
        for label, side in ((ParsingLabel.R_EAR, -1.15), (ParsingLabel.L_EAR, 1.15))
    }
    outline = face.outline(FOREHEAD)
    return {
        ParsingLabel.CLOTH: body & ~neck & (down > face.chin - 0.2),
        ParsingLabel.NECK: neck,
        **ears,
        ParsingLabel.HAIR: hair,
        ParsingLabel.SKIN: outline & ~hair & (skin | face.outline(FOREHEAD_SURE)) & shown,
    }


class GeometricParser:
    """About 30 ms a window on one core; see the module."""

    def parse(
        self, crops: Sequence[Image], landmarks: Floats, inside: Sequence[Mask]
    ) -> list[Labels]:
        """See :class:`models.frozen.parsing.Parser`."""
        return [self._one(*window) for window in zip(crops, landmarks, inside, strict=True)]

    def _one(self, crop: Image, landmarks: Floats, inside: Mask) -> Labels:
        size = crop.shape[0]
        labels = np.zeros((size, size), dtype=np.uint8)
        for label, mask in small_masks(crop, landmarks, inside).items():
            # blurred, enlarged and cut at a half: the steps of the small picture become smooth
            soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8)
            labels[cv2.resize(soft, (size, size)) > 0.5] = label
        return draw_features(face_of(landmarks, size), labels) * inside
