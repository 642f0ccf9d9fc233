"""The one row that travels through the data half; its reasons for rejection are in pipelines/causes.py.

A row is one video. Every stage takes a :class:`Video` and the tar members made so far, and returns both, longer.
The tracks inside a video (one person's face through one span without a cut) become the samples of the dataset.

Ray Data carries a video as four plain columns (:class:`VideoRow`): two strings and two lists. Nested records
travel as JSON because Arrow columns that mix shapes or missing values fall back to pickles.
"""

from __future__ import annotations

import io
import logging
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipelines import metrics, snapshots, storage
from pipelines.causes import TRANSIENT, Cause, one_line

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)
T = TypeVar("T")

PARSING = threading.Lock()
"""Held while a ``.npy`` header is parsed; see :func:`npy_array`."""

SCHEMA_VERSION = 1
"""Of the dataset on disk (docs/formats.md). A change bumps it and ships a reader or a clear refusal."""

ID_PATTERN = r"[A-Za-z0-9_-]{1,40}"
"""Identities and video ids. No dots (a WebDataset key ends at the first), no slashes, and short enough that
``<identity>-<video>-<track>.landmarks.npy`` fits the 100 characters of a plain tar header."""

State = Literal["open", "rejected", "failed", "kept"]
"""``rejected`` is final; ``failed`` may succeed on another day and is tried again by the next run."""

BoxUnits = Literal["fraction", "height360", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """One annotated stretch of a video (an utterance of VoxCeleb), as the list gave it."""

    name: str
    """Utterance name (``00001``) or row number; letters, digits, ``-`` and ``_``."""
    times: tuple[float, ...] = ()
    """Seconds of each box on the annotators' timeline (``FRAME / 25`` for VoxCeleb), increasing."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """(left, top, right, bottom) for each time. Empty: no annotation, the face is found by detection."""
    units: BoxUnits = "fraction"
    """``fraction`` of the displayed frame, ``height360``: pixels of the frame scaled to 360 lines,
    ``pixels`` of a frame of ``reference`` size."""
    reference: tuple[float, float] = (0.0, 0.0)
    """(width, height) that ``pixels`` refer to."""
    start: float = 0.0
    """Seconds. With no boxes, the part of the video to use; ``end`` 0 means to the end."""
    end: float = 0.0
    audio_offset: int = 0
    """VoxCeleb's ``Offset``: audio against video, in 25 fps frames. Concerns audio only; never shifts a frame."""
    fv_conf: float = 0.0
    """Face-verification confidence of VoxCeleb (0 where the list has none)."""
    asd_conf: float = 0.0
    """Active-speaker confidence of VoxCeleb (0 where the list has none)."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One person's face through one span without a cut. Sizes are in displayed source pixels, times in seconds."""

    name: str
    """``000``, ``001``, ... within the video: the last part of the sample's key. ``span-000``, ... are spans that the
    list stage rejected: they have no frames and stay on record."""
    span: str
    """Name of the span it came from."""
    times: tuple[float, ...] = ()
    """Presentation time of each kept frame, counted from the container's start."""
    indices: tuple[int, ...] = ()
    """Index of each kept frame in presentation order; names the frame's members."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Detected face box (left, top, right, bottom) of each kept frame, displayed pixels. Never interpolated."""
    box_scores: tuple[float, ...] = ()
    """Detector score of each box."""
    state: State = "open"
    cause: str = ""
    detail: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    """Frames of this track that were not kept, by cause."""
    scores: dict[str, float] = field(default_factory=dict)
    """Medians over the kept frames (window side, share inside the frame, ...) and embedding agreement."""
    embedding: tuple[float, ...] = ()
    """Mean identity embedding, unit length. Empty before the identities stage."""
    hashes: tuple[tuple[float, float, float, str], ...] = ()
    """Of some windows the time, the middle of the face (shares of the frame's width and height) and a perceptual hash,
    hexadecimal: finds the same clip in another upload. Empty before quality."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of one identity and everything the stages learned about it."""

    identity: str
    video: str
    url: str = ""
    """Where yt-dlp finds it. Empty when ``path`` is given."""
    path: str = ""
    """A local file or fsspec URI given by the list instead of a URL."""
    split: str = ""
    """Official split of the list (``train``, ``val``, ``test``) or empty: decided by the identity's hash."""
    gender: str = ""
    spans: tuple[Span, ...] = ()
    state: State = "open"
    cause: str = ""
    detail: str = ""
    attempts: int = 0
    blob: str = ""
    """Path or URI of the downloaded file."""
    sha256: str = ""
    size: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    """What was fetched: format id, codec, size, fps, bitrate, extractor, yt-dlp version."""
    probe: dict[str, Any] = field(default_factory=dict)
    """``dataclasses.asdict`` of :class:`pipelines.video.VideoInfo`."""
    shift: dict[str, Any] = field(default_factory=dict)
    """The time map: ``delta_seconds``, ``delta_confidence``, ``median_iou``, ``face_found``."""
    timeline: dict[str, Any] = field(default_factory=dict)
    """Where faces were looked for, found and kept, and the cuts: :func:`pipelines.snapshots.timeline`."""
    tracks: tuple[Track, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage (not part of what is published byte for byte)."""
    stage_frames: dict[str, int] = field(default_factory=dict)
    """Frames of open tracks after each stage from ``tracks`` on."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """``<identity>-<video>``; no dots, safe as a file name (the list stage validated both)."""
        return f"{self.identity}-{self.video}"

    def track_key(self, track: Track) -> str:
        """``<identity>-<video>-<track>``, the WebDataset key of a sample."""
        return f"{self.key}-{track.name}"

    @property
    def frames(self) -> int:
        """Frames of all tracks that are still open; 0 once the video has ended."""
        return sum(len(track.times) for track in self.tracks if track.state == "open" and self.live)

    @property
    def live(self) -> bool:
        """False once rejected or failed: later stages pass the row through untouched."""
        return self.state in ("open", "kept")


Member = tuple[str, bytes]
"""(file name inside the tar, content). Members of one sample are adjacent, ``KEY.json`` first."""


class VideoRow(TypedDict):
    """A :class:`Video` as Ray Data carries it."""

    key: str
    record: str
    names: list[str]
    blobs: list[bytes]


def reject(video: Video, cause: Cause, detail: str = "") -> Video:
    """End a video with a cause from the closed list; its spans and everything learned so far stay on record.

    Args:
        video: the row.
        cause: ends the row as ``failed`` when it is in :data:`TRANSIENT`, else as ``rejected``.
        detail: one line for people: the offending value, the tool's own words. Newlines are folded.
    """
    state: State = "failed" if cause in TRANSIENT else "rejected"
    return replace(video, state=state, cause=cause.value, detail=one_line(detail))


def reject_track(track: Track, cause: Cause, detail: str = "") -> Track:
    """End one track with a cause; the video goes on."""
    return replace(track, state="rejected", cause=cause.value, detail=one_line(detail))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter (``itertools.batched`` of Python 3.12)."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


STAGES = (
    "list", "download", "video", "timeline", "annotation", "track", "crop", "identity", "clip",
    "quality",
)  # fmt: skip
"""Stages that causes name, in the order a video passes them."""


def end_if_empty(video: Video) -> Video:
    """The video as it is while a track is open, else rejected with the cause of the track that got furthest.

    Among tracks that got equally far the most common cause counts; the detail says what became of all of them.
    """
    if any(track.state == "open" for track in video.tracks):
        return video
    if not video.tracks:
        return reject(video, Cause.NO_TRACKS)
    causes = Counter(track.cause for track in video.tracks)
    told = "; ".join(f"{track.name} {track.cause}: {track.detail}" for track in video.tracks)
    furthest = max(causes, key=lambda cause: (STAGES.index(Cause(cause).stage), causes[cause]))
    return reject(video, Cause(furthest), told)


@cache
def _adapter() -> TypeAdapter[Video]:
    return TypeAdapter(Video)


def to_json(video: Video) -> str:
    """The record as JSON; :func:`from_json` restores an equal value."""
    return _adapter().dump_json(video).decode()


def from_json(text: str | bytes) -> Video:
    """Inverse of :func:`to_json`. Raises ``pydantic.ValidationError`` on anything else."""
    return _adapter().validate_json(text)


def to_row(video: Video, members: list[Member] | None = None) -> VideoRow:
    """Pack for Ray Data."""
    members = members or []
    return {
        "key": video.key,
        "record": to_json(video),
        "names": [name for name, _ in members],
        "blobs": [data for _, data in members],
    }


def from_row(row: VideoRow) -> tuple[Video, list[Member]]:
    """Unpack what :func:`to_row` packed."""
    return from_json(row["record"]), list(zip(row["names"], row["blobs"], strict=True))


OFF_GPU_NODES = {"pool": "!gpu"}
"""Label selector of what needs no GPU: where videos and pictures may lie. A node without the label is as good as one of another
pool, so that this holds on one machine, too; ray_cluster.yaml and infra/kuberay label their nodes ``cpu`` and ``gpu``."""
OFF_CPU_NODES = {"pool": "!cpu"}
"""Label selector of what needs a GPU."""


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one actor of a stage asks Ray for, and how far its pool may grow."""

    num_cpus: float = 1.0
    """Logical CPUs of one actor."""
    num_gpus: float = 0.0
    """Share of a GPU of one actor."""
    memory_gb: float = 1.0
    """Memory one actor is expected to need, GiB; Ray places no more actors on a node than fit."""
    min_actors: int = 0
    """Actors that are always there. 0: one in a cluster that may grow; elsewhere what the stage's share of the work makes of the
    cores: of one machine, or of a cluster without its largest node."""
    first_actors: int = 0
    """Actors that are there from the beginning, and may go when they have nothing to do. 0: in a cluster that cannot grow what the
    stage's share of the work makes of all its CPUs; elsewhere min_actors."""
    max_actors: int = 64
    """Actors the pool may grow to while the stage is the bottleneck."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_actors <= self.max_actors or self.max_actors < 1:
            raise ValueError(
                f"actors: 0 <= min_actors <= max_actors, 1 <= max_actors, got {self.min_actors} and {self.max_actors}"
            )
        if self.first_actors and not self.min_actors <= self.first_actors <= self.max_actors:
            raise ValueError(
                f"actors: min_actors <= first_actors <= max_actors, got {self.min_actors}, {self.first_actors}, {self.max_actors}"
            )


def check_at_once(videos_at_once: int, network: str, sharing: Collection[str]) -> None:
    """Raises ``ValueError`` unless it is one video, or a network that several can share."""
    if videos_at_once < 1:
        raise ValueError(f"videos_at_once must be at least 1, got {videos_at_once}")
    if videos_at_once > 1 and network not in sharing:
        raise ValueError(
            f"videos_at_once is {videos_at_once}, but {network} shares nothing between videos; it is for {', '.join(sharing)}"
        )


Stage = Callable[[Video, list[Member]], tuple[Video, list[Member]]]
"""What a stage does to one video. Expected trouble becomes ``reject``; anything raised is our fault."""


def run_stage(name: str, stage: Stage, row: VideoRow) -> VideoRow:
    """Run one stage on one row: skip finished rows, time it, and turn a crash into a ``failed`` row.

    An exception inside a Ray Data ``map`` ends the whole job, so this is the one place where everything is caught; the
    row keeps the exception's type and text and is tried again by the next run. Only a :class:`storage.PlaceError`, a full
    disk say, does end the job.
    """
    video, members = from_row(row)
    if not video.live:
        return row
    started = time.perf_counter()
    try:
        with storage.writing(f"{tempfile.gettempdir()} of {platform.node()}", storage.FULL):
            video, members = stage(video, members)
    except storage.PlaceError:  # not this video's fault, and the next one would meet it too
        raise
    except Exception as error:
        logger.exception("stage %s crashed on %s", name, video.key)
        video = reject(video, Cause.CRASH, f"{name}: {type(error).__name__}: {error}")
    seconds = round(time.perf_counter() - started, 4)
    video = replace(
        video,
        seconds=video.seconds | {name: seconds},
        stage_frames=video.stage_frames | ({name: video.frames} if video.tracks else {}),
    )
    metrics.observe_stage(name, video.state, video.frames, seconds)
    if not video.live:
        members = [member for member in members if snapshots.is_snapshot(member[0])]
    return to_row(video, members)


def use_one_thread() -> None:
    """For an actor that has loaded its networks: more speed comes from more actors, and torch's sums depend on the
    number of threads, which Ray takes from ``num_cpus``."""
    cv2.setNumThreads(1)
    if "torch" in sys.modules:  # not imported here: it costs 0.6 GB
        sys.modules["torch"].set_num_threads(1)


VIDEOS_IN_FLIGHT = 4
"""One that an actor works on, the others wait for it. A pool grows when all its actors have so many: with Ray's own two, stages that
take a video in no time grew with every handful that came at once, and ended the new actors, just started, soon after."""


def add_actors(
    videos: Dataset, actor: type, resources: StageResources, at_once: int = 1, **arguments: Any
) -> Dataset:
    """Append a stage to a plan: each row goes through one actor of a pool that grows while it is the bottleneck.

    Args:
        videos: plan over :class:`VideoRow`.
        actor: class whose instances take a row and return a row.
        resources: of one actor, and how many there may be.
        at_once: videos that one actor works on, each in a thread. More than one for actors that share a network between them.
        arguments: of its constructor.
    """
    import ray.data

    return videos.map(
        actor,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=max(resources.min_actors, 1),
            initial_size=max(resources.first_actors, resources.min_actors, 1),
            max_size=resources.max_actors,
            max_tasks_in_flight_per_actor=VIDEOS_IN_FLIGHT * at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        memory=int(resources.memory_gb * 2**30),
        label_selector=OFF_CPU_NODES if resources.num_gpus else OFF_GPU_NODES,
    )


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the content of a ``.npy`` member. No pickles."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npy_array(data: bytes) -> NDArray[Any]:
    """Inverse of :func:`npy_bytes`."""
    # numpy parses the header with ``ast``, which in Python 3.11.7 fails now and then when two threads do it at once
    # ("AST constructor recursion depth mismatch", seen in the report's reading threads)
    with PARSING:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def frame_member(key: str, index: int, extension: str = "jpg") -> str:
    """Name of one frame's member: ``KEY.000123.jpg``; ``index`` is the frame's presentation index."""
    return f"{key}.{index:06d}.{extension}"


def select_frames(
    video: Video, track: Track, members: list[Member], keep: NDArray[np.bool_], cause: Cause
) -> tuple[Track, list[Member]]:
    """Drop frames of one track everywhere at once: record, per-frame arrays and pictures.

    Args:
        video: owner of the track.
        track: has ``n`` frames.
        members: all members of the video; those of other tracks pass through.
        keep: (n,) True for frames that stay.
        cause: counted in ``track.dropped`` for those that go.
    """
    if keep.shape != (len(track.times),):
        raise ValueError(f"keep has shape {keep.shape}, the track has {len(track.times)} frames")
    if keep.all():
        return track, members
    key = video.track_key(track)
    kept = np.flatnonzero(keep)
    gone = {f"{key}.{track.indices[i]:06d}" for i in np.flatnonzero(~keep)}
    selected: list[Member] = []
    for name, data in members:
        if name.startswith(f"{key}.") and name.endswith(".npy"):
            selected.append((name, npy_bytes(npy_array(data)[kept])))
        elif name.rsplit(".", 1)[0] not in gone:
            selected.append((name, data))
    dropped = dict(track.dropped)
    dropped[cause.value] = dropped.get(cause.value, 0) + len(gone)
    track = replace(
        track,
        times=tuple(track.times[i] for i in kept),
        indices=tuple(track.indices[i] for i in kept),
        boxes=tuple(track.boxes[i] for i in kept),
        box_scores=tuple(track.box_scores[i] for i in kept),
        dropped=dropped,
    )
    return track, selected


def drop_members(members: list[Member], key: str) -> list[Member]:
    """Members without those of the sample ``key`` (of a track that was rejected); its snapshot stays."""
    return [
        (name, data)
        for name, data in members
        if not name.startswith(f"{key}.") or snapshots.is_snapshot(name)
    ]


def own_members(members: list[Member], key: str) -> list[Member]:
    """Members of the sample ``key``."""
    return [
        (name, data)
        for name, data in members
        if name.startswith(f"{key}.") and not snapshots.is_snapshot(name)
    ]
