"""From an annotated box to the frame it belongs to: pixels, the shift δ, and how annotated and detected boxes relate.

The annotators saw a copy of the video resampled to 25 frames a second; row ``k`` of theirs is at ``k / 25`` s there,
and its picture is the one shown at ``k / 25 + δ`` s in our file. δ is not zero: it depends on the tool that resampled
and on the rate of the source. So a frame of ours at time ``t`` has the box of the annotation at ``t - δ``.

δ is one number per video, since one conversion made all its utterances. It is measured: detect faces, and take the δ
at which the annotation overlaps them best. Where heads hardly move the measurement says little, and δ stays near
what ffmpeg does to a source of that rate. Everything here is arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.geometry import Floats, box_centres, box_sizes, interpolate_boxes, iou
from pipelines.schema import Span

ANNOTATION_FPS = 25.0
TRIM_SECONDS = 2 / ANNOTATION_FPS
"""Two annotated frames at each end: boundary errors show the next shot."""
ASPECT_TOLERANCE = 0.05
"""How far annotated boxes may be from square in pixels before the picture is not the one that was annotated."""

SHIFTS = np.round(np.arange(-0.24, 0.1201, 0.01), 2)
"""(37,) δ that are tried, seconds: finer than a source frame, so that the result need not be one of its multiples."""
PRIOR_SHIFT = -0.06
PRIOR_DEVIATION = 0.06
"""Seconds by which the prior may be wrong: another tool, another version, FRAME counted from 1 (-0.04 s)."""
LEAST_CONTRAST = 0.01
"""If no δ overlaps by this much more than another, heads are still and nothing was measured."""
LEAST_FRAMES = 8
"""Frames with a face below which δ is not measured."""
RESAMPLINGS = 100

LEAST_SCALE, GREATEST_SCALE = 0.35, 1.5
FARTHEST = 0.35
"""A face counts as the annotated one for :func:`relate` when its sides are between these parts of the annotated
sides and its centre is no further from the annotated one than this part. Detectors' boxes are 0.58 to 0.7 of the
annotated ones on the test list, their centres at most 0.1 away."""


# ------------------------------------------------------------------------------------------ to pixels


def boxes_in_pixels(span: Span, area: ArrayLike) -> Floats:
    """A span's boxes in pixels of the displayed frame: (n, 4).

    Args:
        area: (4,) left, top, right, bottom of what the annotators saw: the frame, or the part inside black bars.
    """
    left, top, right, bottom = np.asarray(area, dtype=np.float64).tolist()
    width, height = right - left, bottom - top
    scale = {
        "fraction": (width, height),
        "height360": (height / 360, height / 360),
        "pixels": (
            width / span.reference[0] if span.reference[0] else 1.0,
            height / span.reference[1] if span.reference[1] else 1.0,
        ),
    }[span.units]
    boxes = np.asarray(span.boxes, dtype=np.float64).reshape(-1, 4) * [*scale, *scale]
    return boxes + np.array([left, top, left, top])


def stretch(spans: Iterable[Span], area: ArrayLike) -> float:
    """How many times wider than what was annotated ``area`` (4,) of our frame shows things: 1 if alike.

    Boxes of VoxCeleb are square in pixels, so their median width over height tells. A box that never changes came
    from a table and may have any shape; if it says what frame its pixels refer to, that frame's aspect tells.
    """
    ratios = [np.empty(0)]
    shown = box_sizes(area)
    for span in spans:
        if span.units == "pixels" and all(span.reference):
            width, height = span.reference
            ratios.append(np.array([shown[0] / shown[1] * height / width]))
        elif len(set(span.boxes)) > 1:
            sides = box_sizes(boxes_in_pixels(span, area))
            ratios.append(sides[:, 0] / sides[:, 1])
    known = np.concatenate(ratios)
    return float(np.median(known)) if len(known) else 1.0


# ------------------------------------------------------------------------------------------- the shift


def prior_shift(fps: float) -> float:
    """δ in seconds to expect of a source of ``fps`` frames a second, before anything is measured.

    Medians of ``ffmpeg -i in -r 25``, the annotators' command, on clips whose frames carry their number (ffmpeg 9.0,
    H.264): 23.976 -0.00, 24 -0.00, 25 0, 29.97 -0.06, 30 -0.06, 48 -0.05, 50 -0.06, 59.94 -0.05, 60 -0.05 s. At up
    to 25 a second frames are repeated and none comes early; above, each waits for the output's next tick but one.
    """
    return PRIOR_SHIFT if fps > 25.5 else 0.0


def inside_ends(times: ArrayLike, at: ArrayLike, margin: float = 0.0) -> NDArray[np.bool_]:
    """Which of the moments ``at`` lie between the first and the last of ``times``, ``margin`` seconds from both."""
    times, at = np.asarray(times, dtype=np.float64), np.asarray(at, dtype=np.float64)
    # half a millionth for moments that only rounding puts outside
    return (at >= times[0] + margin - 5e-7) & (at <= times[-1] - margin + 5e-7)


def boxes_at(times: ArrayLike, boxes: ArrayLike, at: ArrayLike, shift: float) -> Floats:
    """The annotated box of each frame, linear between rows; NaN beyond the ends.

    Args:
        times: (n,) of the annotation, increasing seconds.
        boxes: (n, 4).
        at: (k,) presentation times of frames.
        shift: δ in seconds.

    Returns:
        (k, 4)
    """
    moments = np.asarray(at, dtype=np.float64) - shift
    found = interpolate_boxes(times, boxes, moments)
    found[~inside_ends(times, moments)] = np.nan
    return found


@dataclass(frozen=True)
class Relation:
    """Where a detector's box lies for an annotated one. Lengths are in mean sides of the annotated box."""

    right: float = 0.0
    down: float = 0.0
    """From the annotated centre to the detected one."""
    width: float = 1.0
    height: float = 1.0

    def expect(self, annotated: ArrayLike) -> Floats:
        """The boxes (..., 4) a detector should draw for annotated ones (..., 4)."""
        side = box_sizes(annotated).mean(axis=-1, keepdims=True)
        centres = box_centres(annotated) + side * [self.right, self.down]
        halves = side * [self.width / 2, self.height / 2]
        return np.concatenate([centres - halves, centres + halves], axis=-1)


def relate(annotated: ArrayLike, faces: Sequence[ArrayLike]) -> Relation:
    """The median relation over the frames of a video.

    Args:
        annotated: (n, 4) box of each frame.
        faces: n arrays (m, 4+) of what was detected in each.

    Only faces about where and about as large as annotated count, so that a neighbour cannot become the annotated
    person by being shifted there. With none, boxes are expected as annotated.
    """
    pairs = []
    for box, found in zip(np.asarray(annotated, dtype=np.float64), faces, strict=True):
        detected = np.asarray(found, dtype=np.float64)[:, :4]
        side = box_sizes(box).mean()
        away = (box_centres(detected) - box_centres(box)) / side
        sizes = box_sizes(detected) / side
        distance = np.linalg.norm(away, axis=1)
        alike = distance <= FARTHEST
        alike &= ((sizes >= LEAST_SCALE) & (sizes <= GREATEST_SCALE)).all(axis=1)
        if alike.any():
            best = np.argmin(np.where(alike, distance, np.inf))
            pairs.append([*away[best], *sizes[best]])
    return Relation(*np.median(pairs, axis=0).tolist()) if pairs else Relation()


@dataclass(frozen=True)
class Shift:
    """δ of a video."""

    seconds: float
    confidence: float
    """0: nothing could be measured and δ is the prior; 1: the measurement alone decides."""


def overlaps(expected: ArrayLike, faces: Sequence[ArrayLike]) -> Floats:
    """Best overlap of any detected face with each expected box.

    Args:
        expected: (n, m, 4): for each of n frames the boxes expected at m shifts.
        faces: n arrays (k, 4+), k >= 1.

    Returns:
        (n, m) intersection over union.
    """
    rows = [
        iou(boxes, np.asarray(found)[:, :4]).max(axis=1)
        for boxes, found in zip(np.asarray(expected, dtype=np.float64), faces, strict=True)
    ]
    return np.array(rows).reshape(-1, np.shape(expected)[1])


def estimate_shift(scores: ArrayLike, prior: float) -> Shift:
    """The shift at which annotation and detection agree best, drawn towards the prior by what is uncertain.

    The mean overlap is used and not the median: its best shift varies half as much (measured by resampling the test
    clips), because the median of boxes that detectors round to a grid moves in steps. How much it varies with the
    choice of frames decides the weight: ``1 - (deviation / PRIOR_DEVIATION)²``, 0 when as vague as the prior.

    Args:
        scores: (n, m) overlap of frame i at ``SHIFTS[j]``, frames of all utterances together.
        prior: seconds.
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1, len(SHIFTS))
    n = len(scores)
    mean = scores.mean(axis=0) if n else np.zeros(len(SHIFTS))
    if n < LEAST_FRAMES or mean.max() - mean.min() < LEAST_CONTRAST:
        return Shift(prior, 0.0)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS)
    # of equally good shifts the one nearest to the prior
    nearness = -1e-9 * np.abs(SHIFTS - prior)
    resampled = SHIFTS[np.argmax(drawn @ scores / n + nearness, axis=1)]
    best = int(np.argmax(mean + nearness))
    if best in (0, len(SHIFTS) - 1):
        return Shift(prior, 0.0)  # no peak: what is measured lies outside or is no shift at all
    confidence = max(0.0, 1 - float(np.var(resampled)) / PRIOR_DEVIATION**2)
    return Shift(prior + confidence * (float(SHIFTS[best]) - prior), confidence)
