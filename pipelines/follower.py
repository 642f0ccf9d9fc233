"""One face in picture after picture: the largest first, then the one that is where it was.

What jobs that edit a video know of it before they start: a kilobyte a frame, from one or two passes that keep no picture. Followed with an
embedder, it must also be the same person: after a jump, after it was lost, and once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import compress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.detector import DetectorName, load_detector
from models.frozen.identity import EmbedderName, load_embedder
from models.frozen.landmarks import LandmarkerName, load_landmarker
from models.frozen.pupils import PupilFinder, PupilSource
from pipelines import smoothing, storage
from pipelines.crops import LandmarkGate, implausible
from pipelines.flow import FaceFlow
from pipelines.geometry import Floats, Image, box_sizes, iou, scale_boxes
from pipelines.output import ConfigError
from pipelines.video import Decoder, VideoError, VideoInfo, probe

SMALLEST_FACE = 0.1
"""Least side of a face, in shorter sides of the picture: smaller ones are bystanders."""
SAME_FACE = 0.2
"""Least overlap of a face's box with where it was last seen."""
SURELY_SAME_FACE = 0.6
"""Overlap from which it is not asked who it is."""
NEAR = 2.5
"""Sides of the last box: the region that is searched first."""
FORGET_SECONDS = 1.0
"""After so long without the face that was followed, the largest one is taken; with an embedder, only if it is the same person."""
ASK_SECONDS = 1.0
"""So often it is asked who it is, if there is an embedder, whatever the boxes say."""
FOUND = ""
"""Cause of a frame that has none."""


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """How faces are found."""

    detector: DetectorName = "dlib"
    """Finds faces."""
    landmarker: LandmarkerName = "dlib"
    """Finds their points."""
    pupils: PupilSource = "none"
    """Finds pupils, too."""
    embedder: EmbedderName | None = None
    """Says whether it is still the same person; None: nobody asks."""
    smooth: bool = False
    """Locate the points of a video a second time, fuse them with its optical flow and smooth them (:mod:`pipelines.smoothing`); it is
    decoded twice."""


@dataclass(frozen=True)
class Followed:
    """Where a face is in each frame of a video."""

    landmarks: Floats
    """(n, 68 or 70, 2) pixels, NaN where the face is lost."""
    times: list[float]
    """(n) seconds, increasing."""
    causes: list[str]
    """(n) why a frame's face is lost, or ``FOUND``."""
    rate: Fraction
    """Average frames per second."""
    sound: bool
    """Whether the file has any."""
    decoded: int
    """Frames that decode; the others, at the end, are lost to damage."""


class Follower:
    """Finds one face in picture after picture."""

    def __init__(self, config: FollowConfig, size: tuple[int, int]) -> None:
        """For pictures of ``size`` (width, height). Raises ``WeightsError``."""
        self._detector = load_detector(config.detector, SMALLEST_FACE * min(size))
        self._landmarker = load_landmarker(config.landmarker)
        self._pupils = PupilFinder() if config.pupils == "iris" else None
        self._embedder = load_embedder(config.embedder) if config.embedder else None
        self._gate = LandmarkGate()
        self._box: Floats | None = None
        self._seen = 0.0
        self._person: list[NDArray[np.float32]] = []
        """Vectors of the person when first seen and when last recognised."""
        self._asked = 0.0

    @property
    def box(self) -> Floats:
        """(4,) where the face was last found."""
        assert self._box is not None
        return self._box

    def faces(self, image: Image) -> NDArray[np.float32]:
        """Tight boxes (m, 4) of all faces of an RGB image, from left to right."""
        boxes = self._detector.detect(image)[:, :4]
        return boxes[np.argsort(boxes[:, 0] + boxes[:, 2], kind="stable")]

    def locate(self, image: Image, box: Floats) -> tuple[Floats | None, str]:
        """The points (68, 2) of the face in a box, or None and why they are not believed."""
        points = self._landmarker.locate(image, box[None].astype(np.float32))[0].astype(np.float64)
        if wrong := implausible(points, box, self._gate):
            return None, f"implausible landmarks: {wrong}"
        return points, FOUND

    def pupils(self, image: Image, points: Floats) -> Floats:
        """The pupils (2, 2) of a face's points (68, 2); (0, 2) if nobody looks for them."""
        if self._pupils is None:
            return np.zeros((0, 2))
        return self._pupils.locate([image], points[None]).points[0]

    def find(self, image: Image, at: float = 0.0) -> tuple[Floats | None, str]:
        """The points (68, 2) of the face in an RGB image at a time in seconds, or None and why not."""
        if at - self._seen > FORGET_SECONDS:
            self._box = None
        boxes = self._near(image)
        if not len(boxes):
            boxes = self._detector.detect(image)[:, :4]
        if not len(boxes):
            return None, "no face"
        if self._box is None:
            order = np.argsort(-np.prod(box_sizes(boxes), axis=1), kind="stable")
            candidates = [(boxes[i], 0.0) for i in (order if self._embedder else order[:1])]
        else:
            overlaps = iou(boxes, self._box)[:, 0]
            best = int(overlaps.argmax())
            if overlaps[best] < SAME_FACE:
                return None, "another face"
            candidates = [(boxes[best], float(overlaps[best]))]
        cause = ""
        for box, overlap in candidates:
            points, doubt = self.locate(image, box)
            if points is not None:
                if self._is_same_person(image, points, overlap, at):
                    self._box, self._seen = np.asarray(box, np.float64), at
                    return points, FOUND
                self._box, doubt = None, "not recognised"
            cause = cause or doubt
        return None, cause

    def _is_same_person(self, image: Image, points: Floats, overlap: float, at: float) -> bool:
        """Whether the face is that of the first frame, as far as anybody asks.

        Like the first look or like the last: of small faces single frames of one person may look apart.
        """
        if self._embedder is None:
            return True
        is_sure = overlap >= SURELY_SAME_FACE and at - self._asked < ASK_SECONDS
        if self._person and is_sure:
            return True
        (vector,) = self._embedder.embed([image], points[None])
        self._asked = at
        is_same = not self._person or any(
            float(vector @ known) >= self._embedder.same_person for known in self._person
        )
        if is_same:
            self._person = [*self._person[:1], vector]
        return is_same

    def _near(self, image: Image) -> NDArray[np.float32]:
        """Tight boxes (m, 4) around where the face was last seen, which costs a fraction of the whole picture."""
        if self._box is None:
            return np.zeros((0, 4), np.float32)
        height, width = image.shape[:2]
        low, high = np.round(scale_boxes(self._box, NEAR)).astype(int).reshape(2, 2)
        left, top = np.maximum(low, 0)
        right, bottom = np.minimum(high, (width, height))
        region = np.ascontiguousarray(image[top:bottom, left:right])
        return self._detector.detect(region)[:, :4] + np.array([left, top, left, top], np.float32)


def largest(boxes: NDArray[np.floating]) -> int:
    """Which of the boxes (m, 4), m >= 1, has the largest area."""
    return int(np.prod(box_sizes(boxes), axis=1).argmax())


def read_picture(uri: str) -> Image:
    """RGB (h, w, 3), turned as its EXIF says. Raises :class:`ConfigError` for anything that is no picture."""
    try:
        content = np.frombuffer(storage.read_bytes(uri), np.uint8)
    except OSError as error:
        raise ConfigError(f"--source {uri}: {type(error).__name__}: {error}") from error
    decoded = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    if decoded is None:
        raise ConfigError(f"--source {uri}: not a picture that OpenCV reads")
    return np.ascontiguousarray(decoded[:, :, ::-1])


def follow_video(
    config: FollowConfig,
    path: Path,
    told: str,
    progress: Callable[[str], None] = lambda _: None,
) -> Followed:
    """The landmarks of a video's face, frame by frame.

    A video that breaks off is used up to there; its other frames are lost ones.

    Args:
        config: how faces are found.
        path: of the video.
        told: what an error calls it, such as ``--driving clip.mp4``.
        progress: told a line now and then.

    Raises:
        ConfigError: nothing of it can be read.
    """
    try:
        found = probe(path)
    except VideoError as error:
        raise ConfigError(f"{told}: {error}") from error
    follower = Follower(config, (found.width, found.height))
    landmarks = np.full((found.frames, 68, 2), np.nan)
    pupils = np.full((found.frames, 0 if config.pupils == "none" else 2, 2), np.nan)
    boxes = np.full((found.frames, 4), np.nan)
    causes: list[str] = []
    times: list[float] = []
    last_told = time.monotonic()
    try:
        for index, at, image in _images(path, found, found.frames):
            points, cause = follower.find(image, at)
            if points is not None:
                landmarks[index], boxes[index] = points, follower.box
                if not config.smooth:
                    pupils[index] = follower.pupils(image, points)
            causes.append(cause)
            times.append(at)
            if time.monotonic() - last_told > 30:
                progress(f"landmarks of {len(causes)} of {found.frames} frames")
                last_told = time.monotonic()
        decoded = len(causes)
    except VideoError as error:
        if not causes:
            raise ConfigError(f"{told}: {error}") from error
        decoded = len(causes)
        missing = found.frames - decoded
        step = 1 / found.fps
        times += [times[-1] + step * (1 + index) for index in range(missing)]
        causes += [f"video breaks off: {error}"] * missing
    if config.smooth and FOUND in causes:
        steady(follower, _images(path, found, decoded), landmarks, pupils, boxes, causes)
    landmarks = np.concatenate([landmarks, pupils], axis=1)
    rate = Fraction(found.fps or 25).limit_denominator(1001)
    return Followed(landmarks, times, causes, rate, found.audio, decoded)


def steady(
    follower: Follower,
    images: Iterator[tuple[int, float, Image]],
    landmarks: Floats,
    pupils: Floats,
    boxes: Floats,
    causes: list[str],
) -> None:
    """The second pass, in place: points located anew in boxes that move smoothly, fused with the flow, smoothed along their paths.

    Pupils are found by the points as they are located, and smoothed without the flow.

    Args:
        follower: locates.
        images: index, time and picture of the frames, again.
        landmarks: (n, 68, 2) of the first pass, NaN where the face is lost.
        pupils: (n, 2, 2) to fill; (n, 0, 2) if nobody looks for them.
        boxes: (n, 4) in which they were found.
        causes: (n) why the face is lost, or ``FOUND``; a face that the second pass does not believe is lost, too, and one whose points
            jump.
    """
    flow = FaceFlow()
    known = [index for index, cause in enumerate(causes) if cause == FOUND]
    boxes[known] = smoothing.steady_boxes(landmarks[known], boxes[known], known)
    for index, _, image in images:
        if causes[index] == FOUND:
            points, causes[index] = follower.locate(image, boxes[index])
            landmarks[index] = np.nan if points is None else points
            if points is not None:
                pupils[index] = follower.pupils(image, points)
                flow.add(index, image, boxes[index], points)
    known = [index for index, cause in enumerate(causes) if cause == FOUND]
    if not known:
        return
    sides = np.sqrt(np.prod(box_sizes(boxes[known]), axis=1))
    is_jump = smoothing.jumps(landmarks[known], sides, LandmarkGate().max_jump, known)
    for index in compress(known, is_jump):
        landmarks[index], pupils[index], causes[index] = np.nan, np.nan, "landmarks jump"
    known = list(compress(known, ~is_jump))
    fused = smoothing.fuse(landmarks[known], flow.along(known), known)
    landmarks[known] = smoothing.smooth(fused, known)
    pupils[known] = smoothing.smooth_pupils(pupils[known], known)


def _images(path: Path, found: VideoInfo, count: int) -> Iterator[tuple[int, float, Image]]:
    """Index, time and picture of the first ``count`` frames."""
    with Decoder() as decoder:
        for frame in decoder.read(path, found, ranges=[(0, count)], images=range(count)):
            assert frame.image is not None
            yield frame.index, frame.time, frame.image


def counts(causes: Sequence[str]) -> dict[str, int]:
    """How many frames were lost for each kind of cause."""
    kinds = [cause.partition(":")[0] for cause in causes if cause != FOUND]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
