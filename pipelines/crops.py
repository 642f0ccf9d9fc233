"""Stage 4. Every kept frame of every open track becomes one square window around the head. Decodes; CPU, or GPU for FAN.

A video with tracks comes in; out come, for each track that is kept, the members ``KEY.landmarks.npy`` (n, 68, 2) window
pixels, ``KEY.matrix.npy`` (n, 2, 3) frame → window, ``KEY.scores.npy`` (n, 4) :data:`SCORE_COLUMNS`, and one
``KEY.NNNNNN.jpg`` per frame. Frames whose landmarks cannot be a face's are dropped and counted; then tracks are judged
by medians over the frames that are left: too few, too small, too far outside the picture.

With ``smooth`` the frames are decoded twice: landmarks are located, then located again in boxes that move smoothly, frames in
which they jump are dropped, and their paths are fused with the optical flow and smoothed (:mod:`pipelines.smoothing`); windows are cut
by the smoothed landmarks of the first pass. A track of which too many frames had to go is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from models.frozen import landmarks as landmarkers
from models.frozen import weights
from models.frozen.landmarks import FanConfig, Landmarker, LandmarkerName
from pipelines import smoothing, snapshots, storage
from pipelines.flow import FaceFlow
from pipelines.geometry import (
    CropRule,
    Floats,
    Image,
    box_centres,
    box_sizes,
    face_parts,
    fomm_window,
    heser_window,
    impl_window,
    inside_share,
    lpd_window,
    transform,
    warp,
    window_side,
)
from pipelines.schema import (
    Cause,
    Member,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    batched,
    check_at_once,
    end_if_empty,
    frame_member,
    npy_bytes,
    reject,
    reject_track,
    run_stage,
    select_frames,
    use_one_thread,
)
from pipelines.video import Decoder, DecoderConfig, VideoError, VideoInfo

if TYPE_CHECKING:
    from ray.data import Dataset

SCORE_COLUMNS = ("window_side", "inside", "box_score", "sharpness")
"""Columns of ``KEY.scores.npy``, and names of the medians in ``Track.scores``: side of the window in source pixels,
share of the window inside the frame, the detector's score, and :func:`sharpness`."""


@dataclass(frozen=True, kw_only=True)
class LandmarkGate:
    """What 68 points must look like to be believed. Lengths are in sides of the face box, along and across the eyes.

    A landmarker answers every box with something like a face, so this catches gross failures; that there is a face at
    all is the detector's word. "Measured" are extremes over about 280 faces in 11 clips, profiles included.
    """

    min_eyes: float = 0.15
    """Least distance of the eye centres; measured 0.30."""
    max_roll: float = 60.0
    """Degrees the eye line may be turned from the horizontal, which also excludes left for right; measured 24."""
    min_hull: float = 0.6
    """Least longer side of the points' bounding box; measured 0.85."""
    max_hull: float = 1.5
    """Greatest longer side of the points' bounding box; measured 1.14."""
    max_reach: float = 0.9
    """Farthest any point may lie from the box's centre, horizontally or vertically; measured 0.64."""
    max_eye_ratio: float = 3.0
    """Greatest ratio of the two eyes' widths; measured 1.6."""
    max_jump: float = 0.08
    """Farthest a point may lie from the median of five neighbouring frames, where every frame is there (``smooth``); spec-sparse-motion
    §8.2. 4 of 2,552 frames in 13 clips are farther, of heads that are shaken."""


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Landmarks, windows, and which tracks are worth keeping."""

    crop_rule: CropRule = "heser"
    """Square of the frame that is cut: ``heser`` (whole head, eyes level), ``lpd``, ``impl`` (tighter), or ``fomm``
    (one fixed, upright square for a whole track, for models that learn head motion)."""
    size: int = 512
    """Side of the window, px."""
    crop_scale: float = 1.0
    """Multiplies the side of the square in the frame; above 1 leaves room for long hair."""
    jpeg_quality: int = 95
    """Of 100. Colour is stored at full resolution (4:4:4): a third more bytes than 4:2:0, for 2 to 7 dB less error."""
    landmarker: LandmarkerName = "dlib"
    """``dlib`` (weights in a wheel, 2.5 ms on a CPU) or ``fan`` (2DFAN-4, wants a GPU)."""
    fan: FanConfig = field(default_factory=FanConfig)
    """How ``fan`` is run."""
    smooth: bool = False
    """Take the tremble out of landmarks and windows, leave blinks; decodes twice. Needs every frame of a track
    (``--tracks.frames-per-second 0``): frames that are not neighbours have nothing to smooth."""
    min_window: float = 384.0
    """Least median side of the square in the frame, source px: smaller heads would be enlarged too much."""
    min_inside: float = 0.4
    """Least median share of the square that lies inside the frame; the rest is black."""
    min_frames: int = 9
    """Fewest frames of a track."""
    max_bad: float = 0.1
    """Greatest share of a track's frames whose landmarks are implausible or jump, with ``smooth``; spec-sparse-motion §8.2."""
    gate: LandmarkGate = LandmarkGate()
    """When a frame's landmarks are believed."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.5))
    """Of an actor; with ``fan`` give it a share of a GPU."""
    videos_at_once: int = 1
    """Videos that one actor works on side by side, each with a decoder of its own, so that their frames fill the batches of
    ``fan``; for GPUs, 2 to 8. Memory and CPUs are needed for all of them."""

    def __post_init__(self) -> None:
        check_at_once(self.videos_at_once, self.landmarker, ("fan",))
        if not 16 <= self.size <= 4096:
            raise ValueError(f"size must be between 16 and 4096 pixels, got {self.size}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must be between 1 and 100, got {self.jpeg_quality}")
        if not self.crop_scale > 0:
            raise ValueError(f"crop_scale must be positive, got {self.crop_scale}")
        if not 0 <= self.min_inside <= 1:
            raise ValueError(f"min_inside is a share between 0 and 1, got {self.min_inside}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is a share between 0 and 1, got {self.max_bad}")
        if self.min_frames < 1:
            raise ValueError(f"min_frames must be at least 1, got {self.min_frames}")
        if self.fan != FanConfig() and self.landmarker != "fan":
            raise ValueError(f"fan is set, but the landmarker is {self.landmarker}")


def weight_names(config: CropsConfig) -> tuple[str, ...]:
    """Entries of ``models.frozen.weights`` that this stage loads."""
    return landmarkers.WEIGHTS[config.landmarker]


def describe(config: CropsConfig) -> dict[str, Any]:
    """What a reader of the dataset must know about its windows."""
    return {
        "rule": config.crop_rule,
        "size": config.size,
        "crop_scale": config.crop_scale,
        "scores": list(SCORE_COLUMNS),
    }


def implausible(landmarks: Floats, box: Floats, gate: LandmarkGate) -> str:
    """Why these points cannot be the face in this box, in a few words; empty when they can.

    Args:
        landmarks: (68, 2) frame pixels.
        box: (4,) tight box, frame pixels.
        gate: the limits.
    """
    if not np.isfinite(landmarks).all():
        return "not finite"
    unit = float(np.sqrt(np.prod(box_sizes(box))))
    left, right, mouth = face_parts(landmarks)
    eyes = float(np.linalg.norm(right - left))
    if eyes < gate.min_eyes * unit:
        return f"eyes {eyes / unit:.2f} box sides apart"
    along = (right - left) / eyes
    down = np.array([-along[1], along[0]])
    roll = float(np.degrees(np.arctan2(along[1], along[0])))
    x, y = landmarks @ along / unit, landmarks @ down / unit
    parts = [y[17:27].mean(), y[36:48].mean(), y[30], float(mouth @ down) / unit, y[8]]
    nose = x[27:31].mean()
    hull = float(np.ptp(landmarks, axis=0).max()) / unit
    reach = float(np.abs(landmarks - box_centres(box)).max()) / unit
    narrow, wide = sorted((float(np.ptp(x[36:42])), float(np.ptp(x[42:48]))))
    checks = (
        (abs(roll) <= gate.max_roll, f"eye line turned by {roll:.0f} degrees"),
        (bool((np.diff(parts) > 0).all()), "brows, eyes, nose, mouth, chin out of order"),
        (bool(x[:17].min() < nose < x[:17].max()), "nose not between the ends of the jaw"),
        (gate.min_hull <= hull <= gate.max_hull, f"points span {hull:.2f} box sides"),
        (reach <= gate.max_reach, f"a point {reach:.2f} box sides off the centre"),
        (wide <= gate.max_eye_ratio * narrow, f"eyes {narrow:.3f} and {wide:.3f} wide"),
    )
    return next((reason for passed, reason in checks if not passed), "")


def sharpness(image: Image, box: Floats) -> float:
    """Variance of the Laplacian over a face box (4,) at native size, in squared grey levels of 0..255.

    Native size matters: once a small face has been enlarged or a large one shrunk, the number says nothing.
    """
    left, top = np.maximum(np.floor(box[:2]), 0).astype(int)
    right, bottom = np.minimum(np.ceil(box[2:]), image.shape[1::-1]).astype(int)
    if right <= left or bottom <= top:
        return 0.0
    grey = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def frame_window(landmarks: Floats, box: Floats, config: CropsConfig) -> Floats:
    """Frame → window (2, 3) for one frame by a rule that looks at each frame for itself.

    Args:
        landmarks: (68, 2) frame pixels.
        box: (4,) tight box, frame pixels.
        config: any ``crop_rule`` but ``fomm``.
    """
    match config.crop_rule:
        case "heser":
            return heser_window(landmarks, config.size, config.crop_scale)
        case "impl":
            return impl_window(landmarks, config.size, config.crop_scale)
        case "lpd":
            return lpd_window(box, config.size, config.crop_scale)
    raise ValueError(f"crop_rule {config.crop_rule!r} has no window of a single frame")


def encode(window: Image, quality: int) -> bytes:
    """RGB (h, w, 3) to a baseline 4:4:4 JPEG; equal pixels give equal bytes."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(window, cv2.COLOR_RGB2BGR), options)
    assert done, window.shape
    return data.tobytes()


class Sheet:
    """The windows of one track, as its frames come by."""

    def __init__(self, video: Video, track: Track, config: CropsConfig) -> None:
        self.track = track
        self.config = config
        self.key = video.track_key(track)
        self.boxes = np.array(track.boxes, dtype=np.float64)
        self.position = {index: i for i, index in enumerate(track.indices)}
        self.searched = self.boxes.copy()
        """Boxes in which landmarks are located; with ``smooth``, in the second pass, steadier than the detected ones."""
        self.first: dict[int, Floats] = {}
        """Believable landmarks of the first pass by frame index, frame pixels; with ``smooth`` only."""
        self.guides: dict[int, Floats] = {}
        """The same, smoothed: windows are cut by them."""
        self.flow = FaceFlow()
        """Of the second pass; with ``smooth`` only."""
        self.keep = np.zeros(len(track.indices), dtype=bool)
        self.last_drop = ""
        self.landmarks: list[Floats] = []
        """Frame pixels."""
        self.matrices: list[Floats] = []
        self.scores: list[tuple[float, ...]] = []
        self.pictures: list[Member] = []
        self.fixed: Floats | None = None
        """The one window of all frames, where the rule wants that."""
        if config.crop_rule == "fomm":
            self.fixed = fomm_window(self.boxes, config.size, config.crop_scale)

    def look(self, index: int, landmarks: Floats) -> None:
        """Take the landmarks (68, 2) of the first pass, frame pixels, if they can be believed."""
        if self._believes(index, landmarks):
            self.first[index] = landmarks

    def steady(self) -> None:
        """End the first pass."""
        if not self.first:
            return
        indices = sorted(self.first)
        points = np.stack([self.first[index] for index in indices])
        rows = [self.position[index] for index in indices]
        self.searched[rows] = smoothing.steady_boxes(points, self.boxes[rows], indices)
        self.guides = dict(zip(indices, smoothing.smooth(points, indices), strict=True))

    def _believes(self, index: int, landmarks: Floats) -> bool:
        box = self.searched[self.position[index]]
        reason = implausible(landmarks, box, self.config.gate)
        self.last_drop = reason or self.last_drop
        return not reason

    def add(self, index: int, image: Image, landmarks: Floats) -> None:
        """Cut one frame, or drop it.

        Args:
            index: presentation index of the frame, one of the track's.
            image: (h, w, 3), the whole frame.
            landmarks: (68, 2) of this track's face, frame pixels.
        """
        i, config = self.position[index], self.config
        if config.smooth and index not in self.guides:
            return
        if not self._believes(index, landmarks):
            return
        box = self.searched[i]
        guide = self.guides[index] if config.smooth else landmarks
        matrix = frame_window(guide, box, config) if self.fixed is None else self.fixed
        size = (config.size, config.size)
        inside = inside_share(matrix, size, (image.shape[1], image.shape[0]))
        side = window_side(matrix, config.size)
        if config.smooth:
            self.flow.add(index, image, box, landmarks)
        self.keep[i] = True
        self.landmarks.append(landmarks)
        self.matrices.append(matrix)
        self.scores.append((side, inside, self.track.box_scores[i], sharpness(image, box)))
        picture = encode(warp(image, matrix, size), config.jpeg_quality)
        self.pictures.append((frame_member(self.key, index), picture))

    @property
    def snapshot(self) -> list[Member]:
        """A small picture of the window in the middle of the track; none where no window was cut."""
        if not self.pictures:
            return []
        _, jpeg = self.pictures[len(self.pictures) // 2]
        return [(snapshots.only(self.key), snapshots.shrink(jpeg))]

    def close(self, video: Video) -> tuple[Track, list[Member]]:
        """The track, judged, and its members (none when it is rejected)."""
        config, total = self.config, len(self.track.indices)
        track, _ = select_frames(video, self.track, [], self.keep, Cause.CROP_LANDMARKS)
        if config.smooth and track.indices:
            track = self._without_jumps(video, track)
        count = len(track.indices)
        if count < config.min_frames:
            detail = f"{count} of {total} frames left, {config.min_frames} needed"
            if self.last_drop:
                detail += f"; {total - count} with implausible landmarks (last: {self.last_drop})"
            return reject_track(track, Cause.CROP_FEW_FRAMES, detail), []
        if config.smooth and total - count > config.max_bad * total:
            gone = (Cause.CROP_LANDMARKS, Cause.CROP_JUMP)
            told = ", ".join(f"{track.dropped[c]} {c.reason}" for c in gone if c in track.dropped)
            detail = f"{total - count} of {total} frames ({told}); max_bad is {config.max_bad:g}"
            return reject_track(track, Cause.CROP_UNSTEADY, detail), []
        scores = np.array(self.scores, dtype=np.float32)
        medians = np.median(scores, axis=0)
        named = {name: round(float(v), 4) for name, v in zip(SCORE_COLUMNS, medians, strict=True)}
        points, measured = self._final(track.indices)
        track = replace(track, scores=track.scores | named | measured)
        values = (
            f"window side {named['window_side']:.0f} px, {named['inside']:.2f} inside the frame"
        )
        if named["window_side"] < config.min_window:
            detail = f"{values}; min_window is {config.min_window:g}"
            return reject_track(track, Cause.CROP_SMALL, detail), []
        if named["inside"] < config.min_inside:
            detail = f"{values}; min_inside is {config.min_inside:g}"
            return reject_track(track, Cause.CROP_OUTSIDE, detail), []
        seen = [transform(*pair) for pair in zip(self.matrices, points, strict=True)]
        arrays = {
            "landmarks": np.array(seen, dtype=np.float32),
            "matrix": np.array(self.matrices, dtype=np.float32),
            "scores": scores,
        }
        members = [(f"{self.key}.{name}.npy", npy_bytes(array)) for name, array in arrays.items()]
        return track, members + self.pictures

    def _without_jumps(self, video: Video, track: Track) -> Track:
        """Take the frames back whose landmarks jump."""
        sides = np.sqrt(np.prod(box_sizes(np.array(track.boxes)), axis=1))
        points = np.stack(self.landmarks)
        steady = ~smoothing.jumps(points, sides, self.config.gate.max_jump, track.indices)
        for name in ("landmarks", "matrices", "scores", "pictures"):
            setattr(self, name, list(compress(getattr(self, name), steady)))
        return select_frames(video, track, [], steady, Cause.CROP_JUMP)[0]

    def _final(self, indices: Sequence[int]) -> tuple[Floats, dict[str, float]]:
        """Landmarks (n, 68, 2) of the kept frames as they are stored, but in frame pixels, and how they move."""
        points = np.stack(self.landmarks)
        if not self.config.smooth:
            return points, smoothing.measure(points, None, indices)
        raw = np.stack([self.first[index] for index in indices])
        fused = smoothing.fuse(points, self.flow.along(indices), indices)
        smooth = smoothing.smooth(fused, indices)
        return smooth, smoothing.measure(raw, smooth, indices)


def cut(
    video: Video, decoder: Decoder, landmarker: Landmarker, config: CropsConfig
) -> tuple[Video, list[Member]]:
    """Cut the windows of all open tracks of one video, in one pass over its frames.

    Args:
        video: with ``blob``, ``probe`` and ``tracks``.
        decoder: reads the frames.
        landmarker: of ``config.landmarker``.
        config: of the stage.

    Returns:
        the video with its tracks judged and thinned, rejected when none is left or its file does not decode, and the
        members of the tracks that are kept, in the order of the tracks; then a snapshot of each that was cut.

    Raises:
        FileNotFoundError: the downloaded file has gone.
    """
    sheets = [Sheet(video, track, config) for track in video.tracks if track.state == "open"]
    try:
        if config.smooth:
            for sheet, index, _, landmarks in _located(sheets, video, decoder, landmarker):
                sheet.look(index, landmarks)
            for sheet in sheets:
                sheet.steady()
        for sheet, index, image, landmarks in _located(sheets, video, decoder, landmarker):
            sheet.add(index, image, landmarks)
    except VideoError as error:
        return reject(video, error.cause, error.detail), []
    closed = {sheet.track.name: sheet.close(video) for sheet in sheets}
    tracks = tuple(
        closed[track.name][0] if track.name in closed else track for track in video.tracks
    )
    (network,) = weight_names(config)
    used = f"{config.landmarker} {weights.REGISTRY[network].sha256[:12]}"
    video = replace(video, tracks=tracks, versions=video.versions | {"landmarks": used})
    members = [member for _, made in closed.values() for member in made]
    members += [member for sheet in sheets for member in sheet.snapshot]
    return end_if_empty(video), members


def _located(
    sheets: list[Sheet], video: Video, decoder: Decoder, landmarker: Landmarker
) -> Iterator[tuple[Sheet, int, Image, Floats]]:
    """Each frame of each sheet, in order of time: its index, the whole picture, landmarks (68, 2) in frame pixels."""
    indices = {index for sheet in sheets for index in sheet.position}
    if not indices:
        return
    with storage.local_file(video.blob) as path:
        if not path.is_file():
            raise FileNotFoundError(f"{video.blob}: gone since it was downloaded")
        ranges = [(min(indices), max(indices) + 1)]
        frames = decoder.read(path, VideoInfo(**video.probe), ranges=ranges, images=indices)
        for some in batched(frames, landmarker.images_at_once):
            images: list[Image] = [frame.image for frame in some if frame.image is not None]
            shown = [[sheet for sheet in sheets if frame.index in sheet.position] for frame in some]
            boxes = [
                np.array([sheet.searched[sheet.position[frame.index]] for sheet in present])
                for frame, present in zip(some, shown, strict=True)
            ]
            located = landmarker.locate_many(images, boxes)
            for frame, image, present, points in zip(some, images, shown, located, strict=True):
                for sheet, landmarks in zip(present, points, strict=True):
                    yield sheet, frame.index, image, landmarks.astype(np.float64)


class Cropper:
    """Holds a decoder and a landmarker for the life of an actor."""

    def __init__(self, config: CropsConfig, decoder: DecoderConfig | None = None) -> None:
        self.config = config
        self.decoders: SimpleQueue[Decoder] = SimpleQueue()
        """Those that no video uses now."""
        for _ in range(config.videos_at_once):
            self.decoders.put(Decoder(decoder))
        self.landmarker = landmarkers.load_landmarker(config.landmarker, fan=config.fan)
        use_one_thread()

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage("crops", self.crop, row)

    def crop(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """The stage on an unpacked row; all members of the stages before it are snapshots."""
        decoder = self.decoders.get()
        try:
            video, cuts = cut(video, decoder, self.landmarker, self.config)
        finally:
            self.decoders.put(decoder)
        return video, [*members, *cuts]


def add_crops(videos: Dataset, config: CropsConfig, decoder: DecoderConfig) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`."""
    return add_actors(
        videos, Cropper, config.resources, config.videos_at_once, config=config, decoder=decoder
    )
