"""Stage 6. Are these frames, tracks and videos worth learning from? Reads the windows that were cut; CPU, no network.

``judge`` takes a video with embedded tracks, appends the columns :data:`SCORE_COLUMNS` to ``KEY.scores.npy``, and judges each
track: a still picture is rejected, frames that are unsure, small, blurred, turned far away or repeat the one before are
dropped and counted. What it measured is stored whatever the thresholds are.

``find_duplicates`` takes all tracks of a dataset, metadata only: where two videos of one person show the same clip, the
better one keeps it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.geometry import (
    Floats,
    box_sizes,
    compose,
    fit_similarity,
    invert,
    square_matrix,
    transform,
    warp,
)
from pipelines.headpose import head_pose
from pipelines.identities import Candidate
from pipelines.schema import (
    Cause,
    Member,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    drop_members,
    end_if_empty,
    frame_member,
    npy_array,
    npy_bytes,
    own_members,
    reject_track,
    run_stage,
    select_frames,
)

if TYPE_CHECKING:
    from ray.data import Dataset

Grey = NDArray[np.uint8]

SCORE_COLUMNS = ("face_px", "yaw", "pitch", "roll", "change")
"""Columns that this stage appends to ``KEY.scores.npy``, and names of their medians in ``Track.scores``: mean side of the
face box in source pixels, :func:`pipelines.headpose.head_pose` in degrees, and how much the face differs from the track's
frame before (:func:`difference`)."""

GREY_PX = 128
"""Windows are looked at in grey and shrunk to this side, or to the next power of two above it."""
PATCH_PX = 48
"""Side of the square around a face in which its frames are compared: a pixel is some 4 pixels of a 512-pixel window, so
that noise of sensors and codecs is averaged away."""
CHANGED_SHARE = 0.05
"""Share of a face that must have changed: a blink is smaller, a mouth that speaks larger."""
HASH_SIDE = 16
HASHES = 32
HASH_SECONDS = 0.19
"""Windows of a track that are hashed: the first so many that are so far apart. Evenly spread ones would not meet those of
a copy that begins elsewhere."""
OFFSET_SECONDS = 0.1
"""Two clips are laid over each other in steps of this."""
PLACE_TOLERANCE = 0.015
"""How far the face of a copy may be from its place in the frame, as a share of width and height: a copy that was framed
anew is not found. Two takes of a person who sits still have like windows; heads are where they were only in copies."""
LEAST_SHARED = 12
"""Hashed windows of two clips that must lie over each other for the clips to be compared."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is good enough. A frame must pass every least and most; 0 (angles: 180) lets everything pass."""

    min_box_score: float = 0.0
    """Least score of the detector, in its own units (dlib's of a clear face is above 1, others' at most 1)."""
    min_face_px: float = 0.0
    """Least mean side of the face box, source pixels."""
    min_sharpness: float = 4.0
    """Least variance of the Laplacian over the face at native size, squared grey levels."""
    max_yaw: float = 80.0
    """Farthest the face may be turned to a side, degrees."""
    max_pitch: float = 60.0
    """Farthest the face may look up or down, degrees."""
    min_frame_change: float = 1.5
    """Grey levels (of 255) by which a twentieth of the face must differ from the frame before it, or the frame repeats
    it; measured at least 3 between frames of people 0.2 s apart. 0 keeps repeated frames: for contiguous tracks, of which no frame may be missing."""
    min_clip_change: float = 8.0
    """Grey levels by which a twentieth of the face, brought into place, must leave its usual look somewhere in a track,
    or the track is a still picture. Measured: stills, noisy, zoomed or encoded badly, at most 6, people at least 26."""
    min_frames: int = 9
    """Fewest frames of a track that this stage took frames from."""
    max_hash_distance: float = 0.06
    """Of two videos of one person, share of the bits in which windows may differ that show the same; 0 keeps copies.
    Measured: copies cut, shrunk and encoded again at most 0.05, other takes in one room at least 0.08."""
    min_copy_cosine: float = 0.98
    """Least cosine of the identity embeddings of two copies of one clip; measured 0.997."""
    resources: StageResources = field(
        default_factory=lambda: StageResources(num_cpus=0.25, memory_gb=0.75)
    )
    """One actor works on one video at a time."""

    def __post_init__(self) -> None:
        for name in (
            "min_box_score", "min_face_px", "min_sharpness", "min_frame_change", "min_clip_change",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_yaw", "max_pitch"):
            if not 0 < getattr(self, name) <= 180:
                raise ValueError(f"{name} is an angle up to 180 degrees, got {getattr(self, name)}")
        if not 0 <= self.max_hash_distance < 0.5:
            raise ValueError(
                f"max_hash_distance is a share below 0.5, got {self.max_hash_distance}"
            )
        if not 0 < self.min_copy_cosine <= 1:
            raise ValueError(
                f"min_copy_cosine is a cosine above 0, at most 1, got {self.min_copy_cosine}"
            )
        if self.min_frames < 1:
            raise ValueError(f"min_frames must be at least 1, got {self.min_frames}")


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the stages before made."""

    size: int
    """Side of the windows, pixels."""
    columns: tuple[str, ...]
    """Of ``KEY.scores.npy`` as it comes in; ``box_score`` and ``sharpness`` are among them."""


# ---------------------------------------------------------------------------------------------- what changes


def read_grey(jpeg: bytes, size: int) -> Grey:
    """A window of ``size`` pixels in grey, shrunk by a power of two to :data:`GREY_PX` or a little more."""
    flags = {
        1: cv2.IMREAD_GRAYSCALE,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    }
    factor = max(step for step in flags if step == 1 or size // step >= GREY_PX)
    image = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), flags[factor])
    assert image is not None, "a crop this pipeline wrote does not decode"
    return np.asarray(image, dtype=np.uint8)


def face_patch(grey: Grey, size: int, to_patch: ArrayLike) -> NDArray[np.float32]:
    """(PATCH_PX, PATCH_PX) of a shrunk window; ``to_patch`` maps pixels of the window of ``size`` to the patch."""
    enlarge = np.array([[size / grey.shape[1], 0, 0], [0, size / grey.shape[0], 0]])
    whole = warp(grey, compose(to_patch, enlarge), (PATCH_PX, PATCH_PX))
    return whole.astype(np.float32)


def face_square(points: Floats) -> Floats:
    """(2, 3) that carries the upright square around points (68, 2) onto a patch."""
    low, high = points.min(axis=0), points.max(axis=0)
    return square_matrix((low + high) / 2, float((high - low).max()), 0.0, PATCH_PX)


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Grey levels by which :data:`CHANGED_SHARE` of a patch differs from another, at least."""
    return float(np.quantile(np.abs(one - other), 1 - CHANGED_SHARE))


def frame_changes(greys: Sequence[Grey], size: int, landmarks: Floats, matrices: Floats) -> Floats:
    """How much each frame differs from the one before it at the place in the frame where the face was: (n,).

    The first has nothing before it and gets the second's. What moves, differs.

    Args:
        greys: n shrunk windows.
        size: of the windows themselves.
        landmarks: (n, 68, 2) window pixels.
        matrices: (n, 2, 3) frame → window.
    """
    changes = np.full(len(greys), 255.0)
    for i in range(1, len(greys)):
        to_patch = face_square(landmarks[i - 1])
        to_before = compose(matrices[i - 1], invert(matrices[i]))
        before = face_patch(greys[i - 1], size, to_patch)
        now = face_patch(greys[i], size, compose(to_patch, to_before))
        changes[i] = difference(now, before)
    changes[0] = changes[min(1, len(greys) - 1)]
    return changes


def clip_change(greys: Sequence[Grey], size: int, landmarks: Floats) -> float:
    """How far a face leaves its usual look: greatest difference from the median of its patches, brought into place.

    A still picture that is panned or zoomed changes no more than one that rests. Arguments as in :func:`frame_changes`.
    """
    to_patch = face_square(landmarks[0])
    patches = [
        face_patch(grey, size, compose(to_patch, fit_similarity(points, landmarks[0])))
        for grey, points in zip(greys, landmarks, strict=True)
    ]
    usual = np.median(np.stack(patches), axis=0)
    return max(difference(patch, usual) for patch in patches)


def window_hash(grey: Grey) -> str:
    """A perceptual hash of 256 bits, hexadecimal: where a window gets brighter to the right, on a coarse grid."""
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    brighter = small[:, 1:] > small[:, :-1]
    return np.packbits(brighter).tobytes().hex()


def spaced(times: Sequence[float]) -> list[int]:
    """Which frames of a track are hashed: the first :data:`HASHES` at least :data:`HASH_SECONDS` apart."""
    chosen: list[int] = []
    for i, time in enumerate(times):
        if len(chosen) < HASHES and (not chosen or time - times[chosen[-1]] >= HASH_SECONDS):
            chosen.append(i)
    return chosen


def make_hashes(
    video: Video, track: Track, greys: Sequence[Grey], landmarks: Floats, matrices: Floats
) -> tuple[tuple[float, float, float, str], ...]:
    """``Track.hashes`` of a track; arguments as in :func:`frame_changes`."""
    middles = [
        transform(invert(matrix), points.mean(axis=0))
        for matrix, points in zip(matrices, landmarks, strict=True)
    ]
    shares = np.array(middles) / [video.probe["width"], video.probe["height"]]
    return tuple(
        (
            round(track.times[i], 3),
            round(float(shares[i, 0]), 4),
            round(float(shares[i, 1]), 4),
            window_hash(greys[i]),
        )
        for i in spaced(track.times)
    )


def hash_marks(hashes: Iterable[tuple[float, float, float, str]]) -> NDArray[np.float32]:
    """Times and places of ``Track.hashes``, (k, 3)."""
    return np.array([mark for *mark, _ in hashes], np.float32).reshape(-1, 3)


def hash_bytes(hashes: Iterable[tuple[float, float, float, str]]) -> NDArray[np.uint8]:
    """``Track.hashes`` as (k, 32) bytes."""
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for *_, text in hashes]
    return np.array(rows, np.uint8).reshape(-1, HASH_SIDE * HASH_SIDE // 8)


# ---------------------------------------------------------------------------------------------- one track


def poses(landmarks: Floats, matrices: Floats) -> Floats:
    """Yaw, pitch and roll (n, 3) of windows' landmarks (n, 68, 2) and matrices (n, 2, 3), seen in the frame."""
    found = [
        head_pose(transform(invert(matrix), points))
        for matrix, points in zip(matrices, landmarks, strict=True)
    ]
    return np.array(found)


def objections(
    box_scores: Floats, sharpness: Floats, scores: Floats, config: QualityConfig
) -> list[Cause | None]:
    """Why each frame goes, or None: the first of the thresholds that it fails.

    Args:
        box_scores: (n,) of the detector.
        sharpness: (n,) of the face at native size.
        scores: (n, 5) :data:`SCORE_COLUMNS`; an angle that is not a number fails.
    """
    face_px, yaw, pitch, _, change = scores.T
    repeated = change < config.min_frame_change
    repeated[0] = False
    failed = (
        (box_scores < config.min_box_score, Cause.QUALITY_UNSURE),
        (face_px < config.min_face_px, Cause.QUALITY_SMALL),
        (sharpness < config.min_sharpness, Cause.QUALITY_BLURRED),
        (
            ~((np.abs(yaw) <= config.max_yaw) & (np.abs(pitch) <= config.max_pitch)),
            Cause.QUALITY_POSE,
        ),
        (repeated, Cause.QUALITY_REPEATED),
    )
    return [next((cause for fails, cause in failed if fails[i]), None) for i in range(len(scores))]


def judge_track(
    video: Video, track: Track, members: list[Member], window: Window, config: QualityConfig
) -> tuple[Track, list[Member]]:
    """Measure and judge one track.

    Args:
        video: owner of the track.
        track: with n >= 1 frames.
        members: of this track only, windows included.
        window: what ``KEY.scores.npy`` holds so far, and the windows' size.
        config: of the stage.

    Returns:
        the track with its scores, and its members, thinned; or the track, rejected, and none.
    """
    key = video.track_key(track)
    content = dict(members)
    landmarks, matrices, before = (
        npy_array(content[f"{key}.{name}.npy"]).astype(np.float64)
        for name in ("landmarks", "matrix", "scores")
    )
    greys = [read_grey(content[frame_member(key, index)], window.size) for index in track.indices]
    scores = np.column_stack(
        [
            box_sizes(track.boxes).mean(axis=1),
            poses(landmarks, matrices),
            frame_changes(greys, window.size, landmarks, matrices),
        ]
    )
    change = clip_change(greys, window.size, landmarks)
    table = np.column_stack([before, scores]).astype(np.float32)
    track = replace(
        track,
        scores=track.scores | medians(table, window) | {"clip_change": round(change, 4)},
        hashes=make_hashes(video, track, greys, landmarks, matrices),
    )
    if change < config.min_clip_change:
        detail = f"the face changes by {change:.1f} grey levels; min_clip_change is {config.min_clip_change:g}"
        return reject_track(track, Cause.CLIP_STATIC, detail), []
    members = [
        (name, npy_bytes(table) if name == f"{key}.scores.npy" else data) for name, data in members
    ]
    columns = {name: before[:, i] for i, name in enumerate(window.columns)}
    found = objections(columns["box_score"], columns["sharpness"], scores, config)
    total, lost = len(found), Counter(cause for cause in found if cause)
    for cause in lost:
        keep = np.array([other is not cause for other in found])
        track, members = select_frames(video, track, members, keep, cause)
        found = [other for other in found if other is not cause]
    if lost and len(found) < config.min_frames:
        told = "".join(f", {count} {cause.reason}" for cause, count in lost.items())
        detail = f"{len(found)} of {total} frames left, {config.min_frames} needed{told}"
        # What took more frames than are left is what made the track short.
        worst, count = max(lost.items(), key=lambda item: item[1], default=("", 0))
        short = Cause(worst) if count > len(found) else Cause.QUALITY_FEW_FRAMES
        return reject_track(track, short, detail), []
    kept = npy_array(dict(members)[f"{key}.scores.npy"])
    return replace(track, scores=track.scores | medians(kept, window)), members


def medians(table: NDArray[np.float32], window: Window) -> dict[str, float]:
    """Median of each column of the complete scores (n, m), by name."""
    names = (*window.columns, *SCORE_COLUMNS)
    values = np.median(table, axis=0)
    return {name: round(float(v), 4) for name, v in zip(names, values, strict=True)}


def judge(
    video: Video, members: list[Member], window: Window, config: QualityConfig
) -> tuple[Video, list[Member]]:
    """Judge all open tracks of a video; it is rejected when none is left.

    Args:
        video: with embedded tracks.
        members: of its open tracks.
        window: what the stages before made.
        config: of the stage.
    """
    tracks = []
    for track in video.tracks:
        if track.state == "open":
            key = video.track_key(track)
            own = own_members(members, key)
            track, own = judge_track(video, track, own, window, config)
            members = [*drop_members(members, key), *own]
        tracks.append(track)
    return end_if_empty(replace(video, tracks=tuple(tracks))), members


# ---------------------------------------------------------------------------------------------- all tracks


def copy_distance(one: Candidate, other: Candidate) -> float:
    """How unlike two clips are when laid over each other in time as well as can be: share of bits, 0 to 1.

    At each offset windows that are shown at the same time, to half of :data:`HASH_SECONDS`, are compared, and the median
    counts, where at least half of the shorter clip lies over the other. Two takes of one person in one room have like
    windows too, but not in the same order. 1 when too little lies over each other.
    """
    few, many = sorted((one, other), key=lambda track: (len(track.hashes), track.key))
    least = max(LEAST_SHARED, (len(few.hashes) + 1) // 2)
    if len(few.hashes) < least:
        return 1.0
    bits = np.bitwise_count(few.hashes[:, None] ^ many.hashes[None]).sum(axis=2)
    shares = bits / (8 * few.hashes.shape[1])
    marks, others = few.hash_marks.astype(np.float64), many.hash_marks.astype(np.float64)
    apart = marks[:, :1] - others[None, :, 0]
    moved = np.abs(marks[:, None, 1:] - others[None, :, 1:]).max(axis=2)
    best = 1.0
    for offset in np.arange(apart.min(), apart.max() + OFFSET_SECONDS, OFFSET_SECONDS):
        lag = np.abs(apart - offset)
        nearest = lag.argmin(axis=1)
        rows = np.flatnonzero(lag.min(axis=1) <= HASH_SECONDS / 2 + 0.01)
        pairs = rows, nearest[rows]
        if len(rows) >= least and np.median(moved[pairs]) <= PLACE_TOLERANCE:
            best = min(best, float(np.median(shares[pairs])))
    return best


def find_duplicates(
    tracks: Iterable[Candidate], config: QualityConfig
) -> dict[str, tuple[Cause, str]]:
    """Tracks whose clip another video of the same identity shows better, with the reason, by key.

    Better is the larger window in source pixels, then more frames, then the first name. The order of ``tracks`` does
    not matter. One copy always stays: what a lost track would have displaced stays too.
    """
    gone: dict[str, tuple[Cause, str]] = {}
    if not config.max_hash_distance:
        return gone
    ordered = sorted(tracks, key=lambda track: (track.identity, track.key))
    for _, group in itertools.groupby(ordered, lambda track: track.identity):
        people = sorted(group, key=lambda track: (-track.window_side, -track.frames, track.key))
        people = [track for track in people if len(track.hashes)]
        if len({track.video for track in people}) < 2:
            continue
        vectors = np.stack([np.asarray(track.embedding, dtype=np.float64) for track in people])
        alike = vectors @ vectors.T >= config.min_copy_cosine
        for i, track in enumerate(people):
            for j in np.flatnonzero(alike[i, :i]):
                better = people[j]
                if better.video == track.video or better.key in gone:
                    continue
                distance = copy_distance(track, better)
                if distance <= config.max_hash_distance:
                    detail = f"the same clip as {better.key} ({distance:.3f} of its bits differ), which is larger"
                    gone[track.key] = (Cause.QUALITY_DUPLICATE, detail)
                    break
    return gone


# ---------------------------------------------------------------------------------------------- on Ray


class Judge:
    """Actor: one video at a time."""

    def __init__(self, window: Window, config: QualityConfig) -> None:
        cv2.setNumThreads(1)  # more speed comes from more actors
        self.window = window
        self.config = config

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage("quality", self.judge, row)

    def judge(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """The stage on an unpacked row."""
        return judge(video, members, self.window, self.config)


def add_quality(videos: Dataset, window: Window, config: QualityConfig) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`."""
    return add_actors(videos, Judge, config.resources, window=window, config=config)
