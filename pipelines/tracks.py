"""Stage 3. Video → the same video with its tracks: one person's face through one span without a cut. Decodes, CPU.

With an annotation (VoxCeleb's boxes, a table's box) the annotated person is followed: faces are searched around the
annotated box, the time map is measured (:mod:`pipelines.timemap`), the video is judged, and every kept frame has a
detected face that overlaps the annotated box. Without one, faces are searched in whole frames and linked while they
overlap from one frame to the next; each person who stays long enough becomes a track.

With ``search_every`` most of these frames are not searched whole: everybody is looked for where they were, and the whole frame
is searched at once when somebody is not found there.

Boxes are always detected, never interpolated: a frame without a face is dropped and counted. No track crosses a cut.
Kept frames lie on one grid of time for the whole video, so overlapping utterances find the same frames, and the
later one goes without.

Not done here: an upload that was edited (a new intro, a part cut out) is recognised and rejected, not searched for
the shift of each part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen import weights
from models.frozen.detector import Detector, DetectorName, load_detector
from pipelines import bars, snapshots, storage
from pipelines.geometry import (
    Floats,
    Image,
    box_sizes,
    interpolate_boxes,
    iou,
    scale_boxes,
)
from pipelines.schema import (
    Cause,
    Member,
    Span,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    end_if_empty,
    reject,
    reject_track,
    run_stage,
    use_one_thread,
)
from pipelines.shots import ShotFinder
from pipelines.timemap import (
    ASPECT_TOLERANCE,
    SHIFTS,
    TRIM_SECONDS,
    Relation,
    Shift,
    boxes_at,
    boxes_in_pixels,
    estimate_shift,
    inside_ends,
    overlaps,
    prior_shift,
    relate,
    stretch,
)
from pipelines.video import (
    Decoder,
    DecoderConfig,
    Frame,
    VideoError,
    VideoInfo,
    for_every_frame,
    frame_times,
    nearest,
)

if TYPE_CHECKING:
    from ray.data import Dataset

SHORT_SECONDS = 0.5
"""How much earlier than the last annotated frame a video may end."""
CONTEXT_SECONDS = 0.2
"""Decoded before and after what is used, so that cuts at its ends are seen."""
MEASURED_FRAMES = 200
"""Frames, spread over all utterances, from which the shift is measured."""
REGION_GROWTH = 1.7
"""Side of the searched region over the side of the box it surrounds: for the head's motion and the detector's needs."""
REGION_BOX_PX = 200
"""The region is scaled until the annotated box has this side: the face is then 115 to 140 px."""
REGION_PX = 1000
"""Longest side to which a region is scaled."""
DETECTOR_FACE_PX = 80
"""Smallest tight box the detector is built for; images are scaled so that this suffices."""

GAP_FACE_PX = 130
GAP_REGION = 2.5
"""Without annotation, a skipped frame is searched again in a square of so many sides of the expected box, scaled until
that box has the side above. So are the frames between two that are searched whole (``search_every``)."""
QUIET_SECONDS = 1.0
"""Without annotation, after so long without any face only one frame in so long is searched until there is one: it is
where no face is that the detector takes longest (dlib 0.7 s a frame, 20 times what a frame with a face takes)."""
LINK_OVERLAP = 0.3
"""Least overlap of a person's boxes from one frame to the next, without annotation."""
JUMP_OVERLAP = 0.1
"""Two boxes of a track that overlap less, at most ``JUMP_SECONDS`` apart, are two shots whose cut was missed."""
JUMP_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TracksConfig:
    """How a person is followed through a video."""

    detector: DetectorName = "dlib"
    """Face detector."""
    frames_per_second: float = 5.0
    """Frames kept of each second, on a grid that starts at 0 s; 0 keeps all of them, contiguous (for Motion)."""
    max_frames_per_track: int = 200
    """Longer tracks are thinned evenly; contiguous ones are cut into several."""
    min_frames: int = 9
    """Kept frames that a track must have."""
    max_frames_per_video: int = 2000
    """Frames searched and kept per video, from its beginning; the rest is left out."""
    min_face_found: float = 0.8
    """Share of the annotated frames in which a face must be found, for the video to be the one annotated."""
    min_overlap: float = 0.3
    """Least intersection over union of a detected face with the annotated box (brought to the detector's size and
    place): for each kept frame, and for a video's median."""
    min_face_px: float = 96.0
    """Without annotation: smallest face box that is kept, source pixels."""
    search_side_px: int = 1280
    """Without annotation: long side to which frames are shrunk before faces are searched. Faces under
    80 px there may be missed, whatever ``min_face_px`` says."""
    search_every: int = 1
    """Without annotation: of so many kept frames one is searched whole, the others around the faces that were there before.
    Above 1 it is faster (benchmarks/README.md), and who enters the picture may be found so many frames later."""
    max_gap_seconds: float = 0.7
    """Without annotation: a person not seen for longer (at 5 frames a second: in three frames) begins a new track."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Patience with files."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.5))
    """Of one actor, and how many there may be."""

    def __post_init__(self) -> None:
        if self.frames_per_second < 0:
            raise ValueError(
                f"frames_per_second must not be negative, got {self.frames_per_second}"
            )
        if not 1 <= self.min_frames <= self.max_frames_per_track <= self.max_frames_per_video:
            raise ValueError(
                "1 <= min_frames <= max_frames_per_track <= max_frames_per_video, got "
                f"{self.min_frames}, {self.max_frames_per_track}, {self.max_frames_per_video}"
            )
        if not (0 <= self.min_face_found <= 1 and 0 < self.min_overlap <= 1):
            raise ValueError(
                "min_face_found must be in [0, 1] and min_overlap in (0, 1], got "
                f"{self.min_face_found} and {self.min_overlap}"
            )
        if self.search_every < 1:
            raise ValueError(f"search_every must be at least 1, got {self.search_every}")
        if self.min_face_px <= 0 or self.search_side_px < DETECTOR_FACE_PX:
            raise ValueError(
                f"min_face_px must be positive and search_side_px at least {DETECTOR_FACE_PX}, "
                f"got {self.min_face_px} and {self.search_side_px}"
            )


def weight_names(config: TracksConfig) -> tuple[str, ...]:
    """Files of ``models.frozen.weights`` that this stage will need."""
    return ("dlib_mmod" if config.detector == "dlib" else config.detector,)


# --------------------------------------------------------------------------------- which frames to keep


def grid_frames(
    times: NDArray[np.float64], start: float, end: float, frames_per_second: float
) -> NDArray[np.int64]:
    """Indices of the frames nearest to the ticks of an absolute grid, that lie in [start, end] seconds.

    Whether a frame is one of them does not depend on ``start`` and ``end``. Ticks before the first and after the
    last frame have none.

    Args:
        times: (n,) presentation times.
        start, end: seconds.
        frames_per_second: 0 takes every frame.
    """
    if frames_per_second == 0:
        chosen = np.arange(len(times))
    else:
        known = times[[0, -1]] * frames_per_second
        first = max(np.floor(start * frames_per_second) - 1, np.ceil(known[0] - 1e-6))
        last = min(np.ceil(end * frames_per_second) + 1, np.floor(known[1] + 1e-6))
        chosen = np.unique(nearest(times, np.arange(first, last + 1) / frames_per_second))
    return chosen[(times[chosen] >= start) & (times[chosen] <= end)]


def within_budget(
    plans: Sequence[NDArray[np.int64]], budget: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split each of the index arrays into what fits into the budget, first come first served, and what is left."""
    split = []
    for plan in plans:
        split.append((plan[:budget], plan[budget:]))
        budget -= min(budget, len(plan))
    return split


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` positions evenly over ``range(count)``, ends included."""
    if count <= most:
        return np.arange(count)
    return np.round(np.linspace(0, count - 1, most)).astype(np.int64)


# --------------------------------------------------------------------------------------- sightings → tracks


@dataclass(frozen=True)
class Sighting:
    """What was found of one person in one frame that could be kept."""

    index: int
    time: float
    box: tuple[float, float, float, float] | None
    """Detected, displayed pixels; None when the frame is dropped."""
    score: float = 0.0
    cause: str = ""
    """Why it is dropped."""
    overlap: float = np.nan
    """With the annotation, where there is one."""


def split_sightings(
    sightings: Sequence[Sighting], cuts: Sequence[int], *, contiguous: bool
) -> list[list[Sighting]]:
    """Cut a person's sightings where the shot ends, where the box jumps and, if asked, where a frame is missing.

    Args:
        sightings: by increasing index.
        cuts: indices of the first frames of new shots, increasing.
        contiguous: kept frames of one piece must be neighbours in the video.
    """
    pieces: list[list[Sighting]] = []
    kept: Sighting | None = None  # the last one of the current piece
    shot = -1
    for sighting in sightings:
        now = int(np.searchsorted(cuts, sighting.index, side="right"))
        breaks = now != shot
        if kept is not None and kept.box is not None and sighting.box is not None:
            near = sighting.time - kept.time <= JUMP_SECONDS
            breaks |= near and bool(iou(kept.box, sighting.box)[0, 0] < JUMP_OVERLAP)
            breaks |= contiguous and sighting.index != kept.index + 1
        if breaks:
            pieces.append([])
            kept, shot = None, now
        pieces[-1].append(sighting)
        kept = sighting if sighting.box is not None else kept
    return pieces


class Found(NamedTuple):
    """A track, and when it begins (rejected tracks may hold no frame that says so)."""

    start: float
    track: Track


def make_tracks(
    span: Span, sightings: Sequence[Sighting], cuts: Sequence[int], config: TracksConfig
) -> list[Found]:
    """One person's sightings in one span as tracks without a cut; those with too few frames are rejected."""
    contiguous = config.frames_per_second == 0
    tracks = []
    for piece in split_sightings(sightings, cuts, contiguous=contiguous):
        kept = [sighting for sighting in piece if sighting.box is not None]
        dropped = Counter(sighting.cause for sighting in piece if sighting.box is None)
        most = config.max_frames_per_track
        if contiguous:
            edges = np.linspace(0, len(kept), max(1, -(-len(kept) // most)) + 1).astype(int)
            parts = [kept[first:last] for first, last in pairwise(edges)]  # about equally long
        else:
            parts = [[kept[i] for i in spread(len(kept), most)]]
            dropped[Cause.TRACK_BUDGET.value] += len(kept) - len(parts[0])
        for part in parts:
            start = part[0].time if part else piece[0].time
            tracks.append(Found(start, _make_track(span, part, +dropped, config)))
            dropped.clear()  # all of them count once, with the first part
    return tracks


def _make_track(
    span: Span, kept: Sequence[Sighting], dropped: Counter[str], config: TracksConfig
) -> Track:
    boxes = tuple(sighting.box for sighting in kept if sighting.box is not None)
    scores = {}
    if kept:
        scores["face_px"] = round(float(np.median(box_sizes(boxes))), 2)
    measured = [sighting.overlap for sighting in kept if np.isfinite(sighting.overlap)]
    if measured:
        scores["annotation_iou"] = round(float(np.median(measured)), 4)
    track = Track(
        name="",
        span=span.name,
        times=tuple(sighting.time for sighting in kept),
        indices=tuple(sighting.index for sighting in kept),
        boxes=boxes,
        box_scores=tuple(sighting.score for sighting in kept),
        dropped=dict(sorted(dropped.items())),
        scores=scores,
    )
    if len(kept) >= config.min_frames:
        return track
    told = "".join(f", {number} dropped: {cause}" for cause, number in track.dropped.items())
    # What took more frames than are left is what made the track short.
    cause, number = max(track.dropped.items(), key=lambda item: item[1], default=("", 0))
    short = Cause(cause) if number > len(kept) else Cause.TRACK_SHORT
    return reject_track(track, short, f"{len(kept)} frames < {config.min_frames}{told}")


def over_budget(
    span: Span, left: NDArray[np.int64], times: NDArray[np.float64], budget: int
) -> Track:
    """The rejected track that stands for the frames of a span that were not searched."""
    detail = f"{len(left)} frames from {times[left[0]]:.2f} s on: the video's {budget} are used up"
    track = Track(name="", span=span.name, dropped={Cause.TRACK_BUDGET.value: len(left)})
    return reject_track(track, Cause.TRACK_BUDGET, detail)


def finish(video: Video, found: Iterable[Found], budget: int) -> Video:
    """Number the tracks in order of time, hold the open ones to the budget, reject the video if none is left."""
    left = budget
    tracks: list[Track] = []
    for _, track in sorted(found, key=lambda item: item.start):
        name = f"{len(tracks):03d}"
        if track.state == "open" and len(track.times) > left:
            detail = f"{len(track.times)} frames, {left} left of the video's {budget}"
            track = reject_track(track, Cause.TRACK_BUDGET, detail)
        elif track.state == "open":
            left -= len(track.times)
        tracks.append(replace(track, name=name))
    return end_if_empty(replace(video, tracks=(*video.tracks, *tracks)))


# ------------------------------------------------------------------------------------ finding faces in pictures


def search_region(
    image: Image, box: Floats, scale: float, detector: Detector
) -> NDArray[np.float32]:
    """Faces in a part of a frame.

    Args:
        image: (h, w, 3).
        box: (4,) what to search, frame pixels; may leave the frame.
        scale: to which the part is resized before it is searched.
        detector: built for faces of :data:`DETECTOR_FACE_PX`.

    Returns:
        (m, 5) left, top, right, bottom, score in frame pixels, best first.
    """
    height, width = image.shape[:2]
    left, top = np.clip(np.floor(box[:2]), 0, [width, height]).astype(int)
    right, bottom = np.clip(np.ceil(box[2:]), 0, [width, height]).astype(int)
    if right - left < 1 or bottom - top < 1:
        return np.zeros((0, 5), np.float32)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    part = image[top:bottom, left:right]
    if size != (right - left, bottom - top):
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        part = np.asarray(cv2.resize(part, size, interpolation=how), dtype=np.uint8)
    factors = np.array([size[0] / (right - left), size[1] / (bottom - top)] * 2 + [1.0])
    faces = detector.detect(np.ascontiguousarray(part)) / factors
    return (faces + np.array([left, top, left, top, 0.0])).astype(np.float32)


def hull(boxes: Floats) -> Floats:
    """The smallest box (4,) around boxes (n, 4)."""
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


class Watched(NamedTuple):
    """Frames read once: cuts are found in all of them, pictures come of those asked for."""

    frames: Iterator[Frame]
    cuts: list[int]
    """Complete when ``frames`` has ended."""
    snapshots: dict[int, bytes]
    """Of the frames of ``shown``, by index; complete when ``frames`` has ended."""


class Seen(NamedTuple):
    """What a search has seen besides faces."""

    cuts: Sequence[int] = ()
    """Indices of the first frames of new shots, increasing."""
    snapshots: Mapping[int, bytes] = {}
    """Small pictures of some frames by index."""
    found: Sequence[tuple[float, str]] = ()
    """(seconds, mark of :data:`pipelines.snapshots.RANK`) of each frame that was searched."""


def some_of(indices: Sequence[int]) -> list[int]:
    """The frames, of those that will be searched, of which snapshots are taken."""
    return [int(indices[i]) for i in spread(len(indices), snapshots.FRAMES)]


def watch(
    path: str,
    info: VideoInfo,
    decoder: Decoder,
    ranges: Sequence[tuple[int, int]],
    images: Iterable[int],
    shown: Sequence[int],
) -> Watched:
    """Decode ranges of frames, give out those of ``images``, find the cuts and take the snapshots on the way."""
    cuts: list[int] = []
    taken: dict[int, bytes] = {}

    def frames() -> Iterator[Frame]:
        shots, last = ShotFinder(), -1
        with closing(decoder.read(path, info, ranges=ranges, images=images, thumbs=True)) as read:  # type: ignore[type-var]
            for frame in read:
                if frame.index != last + 1:  # after a hole between the ranges
                    cuts.extend(shots.cuts())
                    shots = ShotFinder()
                assert frame.thumb is not None
                shots.add(frame.index, max(0.0, frame.time), frame.thumb)
                last = frame.index
                if frame.image is not None:
                    if frame.index in shown:
                        taken[frame.index] = snapshots.encode(frame.image, snapshots.FRAME_PX)
                    yield frame
        cuts.extend(shots.cuts())

    return Watched(frames(), cuts, taken)


def frames_between(times: NDArray[np.float64], start: float, end: float) -> tuple[int, int]:
    """(first, last exclusive) frame of [start, end] seconds and some context, at least one frame."""
    first, last = np.searchsorted(times, [start - CONTEXT_SECONDS, end + CONTEXT_SECONDS])
    first = min(int(first), len(times) - 1)
    return first, max(int(last), first + 1)


# ---------------------------------------------------------------------------------------- with annotation


@dataclass(frozen=True)
class Utterance:
    """One annotated span, and what was searched of it."""

    span: Span
    times: NDArray[np.float64]
    """(r,) of the annotation."""
    boxes: Floats
    """(r, 4) of the annotation, displayed pixels."""
    frames: NDArray[np.int64]
    """Grid frames that belong to it for some shift, within the video's budget."""
    looks: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """Faces (m, 5) found in each frame that was searched, by index."""
    cut_off: bool = False
    """Whether the video's budget ended before or in it."""

    def region(self, time: float) -> tuple[Floats, float]:
        """Where to search a frame, whatever the shift turns out to be, and the scale to search it at."""
        moments = np.linspace(time - SHIFTS[-1], time - SHIFTS[0], 10)
        boxes = interpolate_boxes(self.times, self.boxes, moments)
        side = float(box_sizes(boxes).mean())
        margin = (REGION_GROWTH - 1) * side / 2
        region = hull(boxes) + np.array([-margin, -margin, margin, margin])
        # where the annotation jumps to another shot the region is large
        return region, min(REGION_BOX_PX / side, REGION_PX / float(box_sizes(region).max()))

    def used(self, at: NDArray[np.float64], shift: float) -> NDArray[np.bool_]:
        """Which moments of the video belong to it, its trimmed ends left out."""
        return inside_ends(self.times, at - shift, TRIM_SECONDS)

    def surely_used(self, at: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which moments belong to it whatever the shift is."""
        return self.used(at, SHIFTS[0]) & self.used(at, SHIFTS[-1])


def plan_utterances(
    spans: Iterable[Span], area: Floats, times: NDArray[np.float64], config: TracksConfig
) -> tuple[list[Utterance], list[Found]]:
    """What to search, in order of time; spans or parts of them beyond the budget as rejected tracks.

    Args:
        area: (4,) part of the frame that was annotated.
    """
    ordered = sorted(spans, key=lambda span: (span.times[0], span.name))
    wanted = [
        grid_frames(
            times,
            span.times[0] + TRIM_SECONDS + SHIFTS[0],
            span.times[-1] - TRIM_SECONDS + SHIFTS[-1],
            config.frames_per_second,
        )
        for span in ordered
    ]
    budget = config.max_frames_per_video
    utterances, left_out = [], []
    for span, (frames, left) in zip(ordered, within_budget(wanted, budget), strict=True):
        boxes = boxes_in_pixels(span, area)
        known = np.array(span.times)
        utterances.append(Utterance(span, known, boxes, frames, cut_off=len(left) > 0))
        if len(left):
            left_out.append(Found(float(times[left[0]]), over_budget(span, left, times, budget)))
    return utterances, left_out


def search_utterances(
    path: str,
    info: VideoInfo,
    times: NDArray[np.float64],
    utterances: Sequence[Utterance],
    decoder: Decoder,
    detector: Detector,
    config: TracksConfig,
) -> Seen:
    """Fill the looks of all utterances.

    Stops early when so many frames hold no face that the video cannot pass: what is not a face takes the detector
    longest, and most uploads that are not the annotated video show up here.
    """
    by_frame: dict[int, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        for index in utterance.frames:
            by_frame[int(index)].append(utterance)
    allowed = (1 - config.min_face_found) * sum(len(u.frames) for u in utterances)
    ranges = [
        frames_between(times, u.times[0] + SHIFTS[0], u.times[-1] + SHIFTS[-1])
        for u in utterances
        if len(u.frames)
    ]
    sure = [index for u in utterances for index in u.frames[u.surely_used(times[u.frames])]]
    watched = watch(path, info, decoder, ranges, by_frame, some_of(sure or list(by_frame)))
    with closing(watched.frames):  # type: ignore[type-var]
        missed = 0
        for frame in watched.frames:
            assert frame.image is not None
            for utterance in by_frame[frame.index]:
                region, scale = utterance.region(frame.time)
                faces = search_region(frame.image, region, scale, detector)
                utterance.looks[frame.index] = faces
                # Ends that a shift may put outside do not count against the video.
                if utterance.surely_used(np.array([frame.time]))[0]:
                    missed += not len(faces)
            if missed > allowed:
                break
    return Seen(watched.cuts, watched.snapshots)


@dataclass(frozen=True)
class TimeMap:
    """What was measured about a video's annotation."""

    shift: Shift
    relation: Relation
    prior: float
    num_frames: int
    """From which the shift was measured."""


def measure(utterances: Sequence[Utterance], times: NDArray[np.float64], prior: float) -> TimeMap:
    """Fit the time map of a video to the faces found in it; all utterances together."""
    sure = [
        (utterance, index)
        for utterance in utterances
        for index in sorted(utterance.looks)
        if len(utterance.looks[index]) and utterance.surely_used(times[[index]])[0]
    ]
    chosen = [sure[i] for i in spread(len(sure), MEASURED_FRAMES)]
    faces = [utterance.looks[index] for utterance, index in chosen]
    at_prior = int(np.argmin(np.abs(SHIFTS - prior)))
    annotated = np.array(
        [interpolate_boxes(u.times, u.boxes, times[index] - SHIFTS) for u, index in chosen]
    ).reshape(-1, len(SHIFTS), 4)
    relation = relate(annotated[:, at_prior], faces)
    scores = overlaps(relation.expect(annotated), faces)
    return TimeMap(estimate_shift(scores, prior), relation, prior, len(chosen))


@dataclass(frozen=True)
class Matches:
    """The frames of one utterance that were searched, with the face that overlaps the annotated box most."""

    indices: NDArray[np.int64]
    """(n,) frames between the trimmed ends, by increasing time."""
    annotated: Floats
    """(n, 4) box at each frame, as annotated."""
    faces: Floats
    """(n, 5) best face and its score; NaN where none was found."""
    overlap: Floats
    """(n,) with the annotated box brought to the detector's size and place; NaN where no face was found."""


def match(utterance: Utterance, times: NDArray[np.float64], timemap: TimeMap) -> Matches:
    """Which face of each frame is the annotated one, if any."""
    shift = timemap.shift.seconds
    searched = np.array(sorted(utterance.looks), dtype=np.int64)
    searched = searched[utterance.used(times[searched], shift)]
    annotated = boxes_at(utterance.times, utterance.boxes, times[searched], shift)
    faces, overlap = np.full((len(searched), 5), np.nan), np.full(len(searched), np.nan)
    for i, expected in enumerate(timemap.relation.expect(annotated)):
        found = utterance.looks[int(searched[i])]
        if len(found):
            scores = iou(expected, found[:, :4])[0]
            best = int(np.argmax(scores))
            faces[i], overlap[i] = found[best], scores[best]
    return Matches(searched, annotated, faces, overlap)


def agreement(overlap: Floats) -> tuple[float, float]:
    """(share of frames with a face, their median overlap) of (n,) overlaps; (0, 0) for none."""
    found = overlap[np.isfinite(overlap)]
    if not len(found):
        return 0.0, 0.0
    return len(found) / len(overlap), float(np.median(found))


def judge(overlap: Sequence[Floats], config: TracksConfig) -> tuple[Cause, str] | None:
    """Is this the video that was annotated? None if so, else why not.

    Args:
        overlap: for each utterance (n,) overlap of the best face of each frame, NaN without a face.
    """

    def passes(found: float, median: float) -> bool:
        return found >= config.min_face_found and median >= config.min_overlap

    searched = [part for part in overlap if len(part)]
    if not searched:
        return Cause.TRACK_SHORT, "no frame lies between the trimmed ends of an annotated span"
    found, median = agreement(np.concatenate(searched))
    if passes(found, median):
        return None
    told = f"face in {found:.0%} of the annotated frames, median overlap {median:.2f}"
    wanted = f"wanted {config.min_face_found:.0%} and {config.min_overlap:.2f}"
    parts = [agreement(part) for part in searched]
    num_alike = sum(passes(*part) for part in parts)
    has_others = any(part[0] and part[1] < config.min_overlap for part in parts)
    if num_alike and has_others:
        told += f"; {num_alike} of {len(parts)} spans agree with the annotation by themselves"
        return Cause.TIMELINE_EDITED, f"{told}; {wanted}"
    cause = Cause.TRACK_NO_FACE if found < config.min_face_found else Cause.TRACK_MISMATCH
    return cause, f"{told}; {wanted}"


def describe(
    matches: Sequence[Matches],
    times: NDArray[np.float64],
    timemap: TimeMap,
    shown: Iterable[int],
) -> dict[str, Any]:
    """``Video.shift``: the time map, what it rests on, and a strip of the frames ``shown``."""
    found, median = agreement(np.concatenate([m.overlap for m in matches] or [np.empty(0)]))
    rows = {int(index): (m, i) for m in matches for i, index in enumerate(m.indices)}
    strip = []
    for m, i in (rows[index] for index in sorted(shown) if index in rows):
        face = m.faces[i, :4]
        strip.append(
            {
                "index": int(m.indices[i]),
                "time": round(float(times[m.indices[i]]), 4),
                "annotated": np.round(m.annotated[i], 2).tolist(),
                "detected": [] if np.isnan(face).any() else np.round(face, 2).tolist(),
            }
        )
    return {
        "delta_seconds": round(timemap.shift.seconds, 4),
        "delta_confidence": round(timemap.shift.confidence, 3),
        "delta_prior": timemap.prior,
        "measured_frames": timemap.num_frames,
        "median_iou": round(median, 4),
        "face_found": round(found, 4),
        "relation": {
            name: round(getattr(timemap.relation, name), 4)
            for name in ("right", "down", "width", "height")
        },
        "strip": strip,
    }


def marks_of(
    matches: Iterable[Matches], times: NDArray[np.float64], least_overlap: float
) -> Iterator[tuple[float, str]]:
    """(seconds, mark of :data:`pipelines.snapshots.RANK`) of each frame that was searched."""
    for m in matches:
        for index, overlap in zip(m.indices.tolist(), m.overlap.tolist(), strict=True):
            mark = "-" if np.isnan(overlap) else "o" if overlap >= least_overlap else "x"
            yield float(times[index]), mark


def to_sightings(
    matches: Matches, times: NDArray[np.float64], taken: set[int], least_overlap: float
) -> list[Sighting]:
    """Keep the frames whose face is the annotated one, unless an earlier utterance has ``taken`` them."""
    sightings = []
    for index, face, overlap in zip(
        matches.indices.tolist(), matches.faces, matches.overlap.tolist(), strict=True
    ):
        at = float(times[index])
        if index in taken:
            sightings.append(Sighting(index, at, None, cause=Cause.TRACK_OVERLAP.value))
        elif not np.isfinite(overlap):
            sightings.append(Sighting(index, at, None, cause=Cause.TRACK_NO_FACE.value))
        elif overlap < least_overlap:
            sightings.append(Sighting(index, at, None, cause=Cause.TRACK_MISMATCH.value))
        else:
            left, top, right, bottom, score = face.tolist()
            box = (left, top, right, bottom)
            sightings.append(Sighting(index, at, box, score, overlap=overlap))
    return sightings


def annotated_area(
    spans: Sequence[Span], path: str, info: VideoInfo, decoder: Decoder
) -> tuple[Floats, str]:
    """The part of the frame that was annotated, (4,), and why there is none, if so.

    The whole frame, where that makes annotated boxes square; else what is inside its black bars.
    """
    frame = np.array([0.0, 0.0, info.width, info.height])
    aspect = stretch(spans, frame)
    if abs(aspect - 1) <= ASPECT_TOLERANCE:
        return frame, ""
    told = f"{info.width}x{info.height} shows the annotated picture {aspect:.3f} times as wide"
    inside = bars.content_area(bars.brightest(path, info, decoder))
    if inside.tolist() == frame.tolist():
        return frame, told
    aspect = stretch(spans, inside)
    if abs(aspect - 1) <= ASPECT_TOLERANCE:
        return inside, ""
    width, height = box_sizes(inside)
    return frame, f"{told}; the {width:.0f}x{height:.0f} inside its black bars {aspect:.3f} times"


def follow_annotation(
    video: Video,
    path: str,
    info: VideoInfo,
    decoder: Decoder,
    detector: Detector,
    config: TracksConfig,
) -> tuple[Video, list[Found], Seen]:
    """Tracks of the annotated spans; the video is rejected when it is not the one that was annotated."""
    spans = [span for span in video.spans if span.boxes]
    last = max(span.times[-1] for span in spans)
    if info.duration < last - SHORT_SECONDS:
        detail = f"lasts {info.duration:.2f} s, annotated to {last:.2f} s"
        return reject(video, Cause.TIMELINE_SHORT, detail), [], Seen()
    area, objection = annotated_area(spans, path, info, decoder)
    if objection:
        return reject(video, Cause.ANNOTATION_ASPECT, objection), [], Seen()
    times = frame_times(path)
    utterances, found = plan_utterances(spans, area, times, config)
    seen = search_utterances(path, info, times, utterances, decoder, detector, config)
    timemap = measure(utterances, times, prior_shift(info.fps))
    matches = [match(utterance, times, timemap) for utterance in utterances]
    shift = describe(matches, times, timemap, seen.snapshots)
    if area.tolist() != [0, 0, info.width, info.height]:
        shift["content"] = area.tolist()
    seen = seen._replace(found=list(marks_of(matches, times, config.min_overlap)))
    video = replace(video, shift=shift)
    refusal = judge([m.overlap for m in matches], config)
    if refusal:
        return reject(video, *refusal), [], seen
    taken: set[int] = set()
    for utterance, m in zip(utterances, matches, strict=True):
        sightings = to_sightings(m, times, taken, config.min_overlap)
        taken.update(sighting.index for sighting in sightings if sighting.box is not None)
        found += make_tracks(utterance.span, sightings, seen.cuts, config)
        if not len(utterance.frames) and not utterance.cut_off:
            nothing = Track(name="", span=utterance.span.name)
            detail = "no frame lies between its trimmed ends"
            start = float(utterance.times[0])
            found.append(Found(start, reject_track(nothing, Cause.TRACK_SHORT, detail)))
    return video, found, seen


# -------------------------------------------------------------------------------------- without annotation


@dataclass
class Chain:
    """One person's boxes through a part of a shot."""

    faces: dict[int, NDArray[np.float32]]
    """(5,) box and score by position in the list of searched frames."""

    @property
    def last(self) -> int:
        return max(self.faces)

    @property
    def gaps(self) -> list[int]:
        """Positions between the first and the last that have no box, increasing."""
        return [i for i in range(min(self.faces), max(self.faces)) if i not in self.faces]

    def expected(self, position: int) -> Floats:
        """Where the box (4,) should be at a position between the first and the last."""
        known = sorted(self.faces)
        boxes = [self.faces[i][:4] for i in known]
        return interpolate_boxes(known, boxes, [position])[0]


def link(
    faces: Sequence[NDArray[np.float32]],
    times: NDArray[np.float64],
    shots: NDArray[np.int64],
    max_gap_seconds: float,
) -> list[Chain]:
    """Join the faces of successive frames into chains of one person each.

    Best overlaps first; a face that overlaps no chain by :data:`LINK_OVERLAP` begins one. A chain ends with its shot
    or after ``max_gap_seconds`` without a face.

    Args:
        faces: for each frame (m, 5).
        times: (n,) of the frames.
        shots: (n,) number of the shot each frame is in.
    """
    chains: list[Chain] = []
    live: list[Chain] = []
    for i, found in enumerate(faces):
        live = [
            chain
            for chain in live
            if shots[chain.last] == shots[i] and times[i] - times[chain.last] <= max_gap_seconds
        ]
        scores = iou([chain.faces[chain.last][:4] for chain in live], found[:, :4])
        free = set(range(len(found)))
        for pair in np.argsort(-scores, axis=None, kind="stable"):
            which, face = np.unravel_index(pair, scores.shape)
            if scores[which, face] < LINK_OVERLAP:
                break
            if int(face) in free and live[which].last < i:
                live[which].faces[i] = found[face]
                free.discard(int(face))
        begun = [Chain({i: found[face]}) for face in sorted(free)]
        chains += begun
        live += begun
    return chains


def plan_spans(
    spans: Iterable[Span], times: NDArray[np.float64], taken: Iterable[int], config: TracksConfig
) -> tuple[list[tuple[Span, NDArray[np.int64]]], list[Found]]:
    """Grid frames of each span, none twice, in order of time; what is beyond the budget or taken as rejected tracks."""
    ordered = sorted(spans, key=lambda span: (span.start, span.name))
    given = np.array(sorted(taken), dtype=np.int64)
    wanted: list[NDArray[np.int64]] = []
    found: list[Found] = []
    for span in ordered:
        end = span.end if span.end > 0 else float(times[-1])
        frames = grid_frames(times, span.start, end, config.frames_per_second)
        fresh = np.setdiff1d(frames, np.concatenate([given, *wanted]))
        if not len(fresh):
            cause = Cause.TRACK_OVERLAP if len(frames) else Cause.TRACK_SHORT
            detail = f"no frame of its own from {span.start:.2f} to {end:.2f} s"
            nothing = Track(name="", span=span.name)
            found.append(Found(span.start, reject_track(nothing, cause, detail)))
        wanted.append(fresh)
    budget = config.max_frames_per_video
    plans = []
    for span, (frames, left) in zip(ordered, within_budget(wanted, budget), strict=True):
        plans.append((span, frames))
        if len(left):
            found.append(Found(float(times[left[0]]), over_budget(span, left, times, budget)))
    return plans, found


def search_near(
    image: Image, expected: Floats, detector: Detector, most: float = np.inf
) -> NDArray[np.float32]:
    """Faces (m, 5) in the surroundings of an expected box (4,), brought to one size but enlarged no more than ``most``."""
    scale = min(GAP_FACE_PX / float(box_sizes(expected).mean()), most)
    return search_region(image, scale_boxes(expected, GAP_REGION), scale, detector)


class Lookout:
    """Searches frames in order of time: whole, or where the faces of the frames before were."""

    def __init__(self, info: VideoInfo, detector: Detector, config: TracksConfig) -> None:
        self.detector = detector
        self.config = config
        self.whole = np.array([0.0, 0.0, info.width, info.height])
        side = max(info.width, info.height)
        self.scale = min(DETECTOR_FACE_PX / config.min_face_px, config.search_side_px / side)
        pixels = info.width * info.height * self.scale**2
        self.most_near = int(pixels / (GAP_REGION * GAP_FACE_PX) ** 2)
        """People whose surroundings are fewer pixels than the whole frame."""
        self.people: list[tuple[float, NDArray[np.float32]]] = []
        """Time and row (5,) of everybody's last face, for as long as they may come back."""
        self.turn = 0
        """Frames since one was searched whole."""
        self.before = self.looked = self.searched = self.seen = -np.inf
        """Time of the last frame, the last one looked at, the last one searched whole, the last one with a face."""

    def look(self, image: Image, time: float) -> NDArray[np.float32] | None:
        """Faces (m, 5) in a frame, or None when it was not searched: nobody has been there for a while."""
        patience = self.config.max_gap_seconds
        follows = time - self.before <= patience
        self.before = time
        self.turn += 1
        self.people = [known for known in self.people if time - known[0] <= patience]
        faces: NDArray[np.float32] | None = None
        if follows and self.turn < self.config.search_every:
            if not self.people:
                return None
            if len(self.people) <= self.most_near:
                faces = self._follow(image)
        if faces is None:
            if time - self.seen > QUIET_SECONDS and time - self.searched < QUIET_SECONDS:
                return None
            faces = search_region(image, self.whole, self.scale, self.detector)
            self.searched, self.turn = time, 0
        lost = [known for known in self.people if not _is_among(known[1], faces)]
        self.people = [(time, face) for face in faces] + lost
        self.looked = time
        self.seen = time if len(faces) else self.seen
        return faces

    def _follow(self, image: Image) -> NDArray[np.float32] | None:
        """Faces where people were; None when somebody who was there in the last frame is not."""
        found = np.zeros((0, 5), np.float32)
        for seen, known in self.people:
            # no closer than in the whole frame: boxes found at another size agree less, and small videos would be enlarged
            near = search_near(image, known[:4], self.detector, self.scale)
            fresh = [face for face in near if not _is_among(face, found)]
            found = np.concatenate([found, np.array(fresh, np.float32).reshape(-1, 5)])
            if seen == self.looked and not _is_among(known, found):
                return None
        return found


def _is_among(face: NDArray[np.float32], faces: NDArray[np.float32]) -> bool:
    return bool(iou(face[:4], faces[:, :4]).max(initial=0.0) >= LINK_OVERLAP)


def search_frames(
    path: str,
    info: VideoInfo,
    times: NDArray[np.float64],
    plans: Sequence[NDArray[np.int64]],
    decoder: Decoder,
    detector: Detector,
    config: TracksConfig,
) -> tuple[dict[int, NDArray[np.float32]], Seen]:
    """Faces (m, 5) of each frame that was searched, by index; and what else was seen."""
    ranges = [
        frames_between(times, times[frames[0]], times[frames[-1]])
        for frames in plans
        if len(frames)
    ]
    wanted = [int(index) for frames in plans for index in frames]
    watched = watch(path, info, decoder, ranges, wanted, some_of(wanted))
    lookout = Lookout(info, detector, config)
    faces: dict[int, NDArray[np.float32]] = {}
    for frame in watched.frames:
        assert frame.image is not None
        looked = lookout.look(frame.image, frame.time)
        if looked is not None:
            faces[frame.index] = looked
    found = [(float(times[index]), "o" if len(box) else "-") for index, box in faces.items()]
    return faces, Seen(watched.cuts, watched.snapshots, found)


def fill_gaps(
    path: str,
    info: VideoInfo,
    frames: NDArray[np.int64],
    chains: Sequence[Chain],
    decoder: Decoder,
    detector: Detector,
) -> None:
    """Search the frames that a chain skips again, closer up, where its neighbours say the face should be.

    What is found is added to the chain; where nothing is, the gap stays.
    """
    wanted: dict[int, list[tuple[Chain, int]]] = defaultdict(list)
    for chain in chains:
        for position in chain.gaps:
            wanted[int(frames[position])].append((chain, position))
    if not wanted:
        return
    ranges = [(index, index + 1) for index in sorted(wanted)]
    for frame in decoder.read(path, info, ranges=ranges, images=wanted):
        assert frame.image is not None
        for chain, position in wanted[frame.index]:
            expected = chain.expected(position)
            found = search_near(frame.image, expected, detector)
            others = [other.faces[position][:4] for other in chains if position in other.faces]
            fresh = found[iou(found[:, :4], others).max(axis=1, initial=0.0) < LINK_OVERLAP]
            scores = iou(expected, fresh[:, :4])[0]
            if len(fresh) and scores.max() >= LINK_OVERLAP:
                chain.faces[position] = fresh[int(np.argmax(scores))]


def follow_detection(
    video: Video,
    path: str,
    info: VideoInfo,
    decoder: Decoder,
    detector: Detector,
    config: TracksConfig,
    taken: Iterable[int] = (),
) -> tuple[list[Found], Seen]:
    """Tracks of everybody who stays long enough in the spans without annotation, apart from the frames ``taken``."""
    spans = [span for span in video.spans if not span.boxes]
    times = frame_times(path)
    plans, found = plan_spans(spans, times, taken, config)
    looks, seen = search_frames(
        path, info, times, [frames for _, frames in plans], decoder, detector, config
    )
    for span, planned in plans:
        frames = planned[np.isin(planned, list(looks))]
        faces, largest = [], 0.0
        for index in frames.tolist():
            sides = box_sizes(looks[index][:, :4]).mean(axis=1)
            faces.append(looks[index][sides >= config.min_face_px])
            largest = max(largest, float(sides.max(initial=0.0)))
        shots = np.searchsorted(seen.cuts, frames, side="right")
        chains = link(faces, times[frames], shots, config.max_gap_seconds)
        fill_gaps(path, info, frames, chains, decoder, detector)
        for chain in chains:
            sightings = []
            for i in range(min(chain.faces), max(chain.faces) + 1):
                index, at = int(frames[i]), float(times[frames[i]])
                if i in chain.faces:
                    left, top, right, bottom, score = chain.faces[i].tolist()
                    sightings.append(Sighting(index, at, (left, top, right, bottom), score))
                else:
                    sightings.append(Sighting(index, at, None, cause=Cause.TRACK_NO_FACE.value))
            found += make_tracks(span, sightings, seen.cuts, config)
        if len(frames) and not chains:
            detail = f"no face of {config.min_face_px:g} px in {len(frames)} frames"
            if largest:
                detail += f", the largest has {largest:.0f} px"
            nobody = reject_track(Track(name="", span=span.name), Cause.TRACK_NO_FACE, detail)
            found.append(Found(float(times[frames[0]]), nobody))
    return found, seen


# ------------------------------------------------------------------------------------------------- the stage


def tell_black(video: Video, path: str, info: VideoInfo, decoder: Decoder) -> Video:
    """A video without a face: because it is black, or as it was."""
    if not bars.is_black(bars.brightest(path, info, decoder)):
        return video
    detail = f"{bars.SAMPLES} frames from all over the video show nothing"
    return reject(video, Cause.VIDEO_BLACK, detail)


def glance(path: str, info: VideoInfo, decoder: Decoder) -> list[bytes]:
    """A snapshot from the middle of a video that was rejected unseen; none of one that does not decode."""
    try:
        middle = len(frame_times(path)) // 2
        frames = decoder.read(path, info, ranges=[(middle, middle + 1)], images=[middle])
        images = [frame.image for frame in frames if frame.image is not None]
    except VideoError:
        return []
    return [snapshots.encode(image, snapshots.FRAME_PX) for image in images]


def show(
    video: Video, path: str, info: VideoInfo, decoder: Decoder, seen: Sequence[Seen]
) -> tuple[Video, list[Member]]:
    """The video with its timeline, and its snapshots: what the report will show of it, whatever becomes of it."""
    times = frame_times(path)
    found = sorted(item for part in seen for item in part.found)
    cuts = sorted(float(times[index]) for part in seen for index in part.cuts)
    pictures = {index: jpeg for part in seen for index, jpeg in part.snapshots.items()}
    chosen = some_of(sorted(pictures))
    shown = [(index, float(times[index])) for index in chosen]
    line = snapshots.timeline(found, cuts, shown, (info.width, info.height))
    members = [(snapshots.of_frame(video.key, index), pictures[index]) for index in chosen]
    if not pictures:
        members = [(snapshots.only(video.key), jpeg) for jpeg in glance(path, info, decoder)]
    return replace(video, timeline=line), members


def follow(
    video: Video, decoder: Decoder, detector: Detector, config: TracksConfig
) -> tuple[Video, list[Member]]:
    """Find the tracks of one video that has been fetched.

    Args:
        video: with ``blob``, ``probe`` and ``spans``.
        decoder: kept by the caller.
        detector: built for faces of :data:`DETECTOR_FACE_PX`.

    Returns:
        the video with ``tracks`` (rejected ones too), ``timeline`` and, where it was annotated, ``shift``; rejected
        when it cannot be decoded, is not the one annotated, or has no track left; and its snapshots.
    """
    info = VideoInfo(**video.probe)
    (network,) = weight_names(config)
    used = f"{config.detector} {weights.REGISTRY[network].sha256[:12]}"
    video = replace(video, versions=video.versions | {"detector": used})
    found: list[Found] = []
    seen: list[Seen] = []
    members: list[Member] = []
    try:
        with storage.local_file(video.blob) as local:
            args = str(local), info, decoder, detector, config
            if any(span.boxes for span in video.spans):
                video, found, annotated = follow_annotation(video, *args)
                seen.append(annotated)
            if video.live and not all(span.boxes for span in video.spans):
                kept = (track for _, track in found if track.state == "open")
                taken = {index for track in kept for index in track.indices}
                others, free = follow_detection(video, *args, taken)
                found += others
                seen.append(free)
            if video.live:
                video = finish(video, found, config.max_frames_per_video)
            if video.cause == Cause.TRACK_NO_FACE.value:
                video = tell_black(video, str(local), info, decoder)
            video, members = show(video, str(local), info, decoder, seen)
    except VideoError as error:
        return reject(video, error.cause, error.detail), []
    return video, members


class Tracker:
    """Actor: keeps a decoder and a detector."""

    def __init__(self, config: TracksConfig) -> None:
        self.config = config
        self.decoder = Decoder(for_every_frame(config.decoder))
        self.detector = load_detector(config.detector, DETECTOR_FACE_PX)
        use_one_thread()

    def __call__(self, row: VideoRow) -> VideoRow:
        return run_stage("tracks", self.follow, row)

    def follow(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """A stage of :func:`pipelines.schema.run_stage`."""
        video, pictures = follow(video, self.decoder, self.detector, self.config)
        return video, [*members, *pictures]


def add_tracks(videos: Dataset, config: TracksConfig) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`."""
    return add_actors(videos, Tracker, config.resources, config=config)
