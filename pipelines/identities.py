"""Stage 5. Is it one person? Within a track by its frames, here; across videos by the tracks' means, in the driver.

``embed`` takes a video with crops, adds ``KEY.embedding.npy`` (n, d) to each open track, drops frames that show somebody
else than the track's majority, and stores the mean in the track. CPU, or a GPU for torch embedders.

``decide`` takes the means of all tracks of a dataset, metadata only: a track stays if it looks like its identity's *other*
videos, since whole videos can be mislabelled; then identities are split so that no person and no video is on two sides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.frozen import identity as embedders
from models.frozen import weights
from models.frozen.identity import Embedder, EmbedderName
from pipelines import snapshots
from pipelines.crops import SCORE_COLUMNS
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
    npy_array,
    npy_bytes,
    own_members,
    reject_track,
    run_stage,
    select_frames,
    use_one_thread,
)

if TYPE_CHECKING:
    from ray.data import Dataset

Vectors = NDArray[np.float64]
Image = NDArray[np.uint8]

SAME_PERSON: dict[EmbedderName, float] = {
    "dlib": embedders.DlibEmbedder.same_person,
    "mobilefacenet": embedders.MobileFaceNetEmbedder.same_person,
    "arcface": embedders.ArcFaceEmbedder.same_person,
}
"""Least cosine of two pictures of one person."""
STRICTNESS = {"": -1, "train": 0, "val": 1, "test": 2}
"""Who gives way when one person or video is on two sides: the side that is trained on."""

IDENTITIES_AT_ONCE = 256
"""Rows of the table of cosines between identities that are held in memory."""
CROPS_AT_ONCE = 64
"""Decoded crops held in memory."""
MAX_CENTRES = 512
"""Frames of a track that are tried as its centre; a longer track is sampled evenly."""
DECIMALS = 6
"""Cosines are rounded before they are compared, so that the order of a sum cannot change a decision."""


@dataclass(frozen=True, kw_only=True)
class IdentitiesConfig:
    """Which tracks show the person they are listed under, and who is kept for testing."""

    embedder: EmbedderName = "dlib"
    """``dlib`` (weights in a wheel, 75 ms a face on a CPU), ``mobilefacenet`` (5 ms), or ``arcface`` (wants a GPU; its threshold
    was not measured here)."""
    min_frame_cosine: float = 0.0
    """Frames below this cosine to the centre of their track are dropped; 0: the embedder's own threshold."""
    min_majority: float = 0.6
    """Least share of a track's frames that must agree, or all of it is rejected."""
    min_track_frames: int = 9
    """Fewest frames that must agree."""
    min_video_cosine: float = 0.0
    """Tracks below this cosine to the identity's other videos are rejected; 0: the embedder's own threshold."""
    min_twin_cosine: float = 0.0
    """Two identities whose means are at least this alike count as one person under two names: both stay, but on one side
    of the split. 0: halfway between the embedder's own threshold and 1; 1: never."""
    min_identity_videos: int = 1
    """Fewest videos of an identity."""
    min_identity_frames: int = 9
    """Fewest frames of an identity, over all its videos."""
    split: Literal["clean", "legacy"] = "clean"
    """``clean``: nobody and nothing that is tested on is trained on. ``legacy``: the list's split as it is, people and clips on
    both sides and all: only to compare with numbers published on vox-metadata.csv."""
    test_share: float = 0.05
    """Share of the identities kept for testing, by hash of the name, where the list has no official split. Of a few people it may
    well be nobody: the job says so, with a share that takes one."""
    resources: StageResources = field(default_factory=lambda: StageResources(memory_gb=1.0))
    """Of an actor; with ``arcface`` give it a share of a GPU."""
    videos_at_once: int = 1
    """Videos that one actor works on side by side, so that their faces fill the network's batches; for GPUs, 2 to 8. Not with
    ``dlib``. Memory is needed for all of them."""

    def __post_init__(self) -> None:
        check_at_once(self.videos_at_once, self.embedder, ("mobilefacenet", "arcface"))
        for name in ("min_frame_cosine", "min_video_cosine"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a cosine from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.min_twin_cosine <= 1:
            raise ValueError(f"min_twin_cosine is a cosine from 0 to 1, got {self.min_twin_cosine}")
        if not 0.5 < self.min_majority <= 1:
            raise ValueError(f"min_majority must be above 0.5, at most 1, got {self.min_majority}")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"test_share is a share from 0 to 1, got {self.test_share}")
        for name in ("min_track_frames", "min_identity_videos", "min_identity_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def frame_threshold(self) -> float:
        """``min_frame_cosine`` or the embedder's own."""
        return self.min_frame_cosine or SAME_PERSON[self.embedder]

    @property
    def video_threshold(self) -> float:
        """``min_video_cosine`` or the embedder's own."""
        return self.min_video_cosine or SAME_PERSON[self.embedder]

    @property
    def twin_threshold(self) -> float:
        """``min_twin_cosine`` or halfway between the embedder's own threshold and 1."""
        return self.min_twin_cosine or (1 + SAME_PERSON[self.embedder]) / 2


def weight_names(config: IdentitiesConfig) -> tuple[str, ...]:
    """Entries of ``models.frozen.weights`` that this stage loads."""
    return embedders.WEIGHTS[config.embedder]


def describe(config: IdentitiesConfig) -> dict[str, Any]:
    """What a reader of the dataset must know about its embeddings."""
    return {"embedder": config.embedder}


# ---------------------------------------------------------------------------------------------- who agrees


def unit(vector: Vectors) -> Vectors:
    """(..., d) scaled to length 1."""
    scaled: Vectors = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    return scaled


def agreeing(vectors: Vectors, weights: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """The largest set of vectors that agree with one of them.

    Args:
        vectors: (n, d) unit rows, n >= 1.
        weights: (n,) what each counts.
        threshold: least cosine of two that agree.

    Returns:
        (n,) True for the row with the most weight agreeing with it (then: the closest ones; then: the first), and for
        those that do.
    """
    centres = np.unique(np.linspace(0, len(vectors) - 1, MAX_CENTRES).astype(int))
    cosines = np.round(vectors[centres] @ vectors.T, DECIMALS)
    agrees = cosines >= threshold
    agrees[np.arange(len(centres)), centres] = True
    support = np.round(agrees @ np.asarray(weights, dtype=np.float64), DECIMALS)
    closeness = np.round((cosines * agrees).sum(axis=1), DECIMALS)
    chosen: NDArray[np.bool_] = agrees[np.lexsort((-closeness, -support))[0]]
    return chosen


# ---------------------------------------------------------------------------------------------- one track


def same_as_most(vectors: Vectors, threshold: float) -> tuple[NDArray[np.bool_], Vectors]:
    """Frames of a track that show its majority: (n,) True for those, and (n,) cosines to their mean."""
    keep = agreeing(vectors, np.ones(len(vectors)), threshold)
    cosines = np.round(vectors @ unit(vectors[keep].mean(axis=0)), DECIMALS)
    return cosines >= threshold, cosines


def embed_track(
    video: Video, track: Track, members: list[Member], embedder: Embedder, config: IdentitiesConfig
) -> tuple[Track, list[Member]]:
    """Embed the frames of one track and drop those that show somebody else.

    Args:
        video: owner of the track.
        track: with n >= 1 frames.
        members: of this track only: its landmarks, scores and n crops.
        embedder: of ``config.embedder``.
        config: of the stage.

    Returns:
        the track with ``embedding`` and the scores ``same_person`` (median cosine of the kept frames to their mean) and
        ``same_person_least``, and its members with ``KEY.embedding.npy``; or the track, rejected, and none.
    """
    key = video.track_key(track)
    content = dict(members)
    landmarks = npy_array(content[f"{key}.landmarks.npy"])
    names = [frame_member(key, index) for index in track.indices]
    rows = [
        embedder.embed([_decode(content[name]) for name, _ in some], np.stack([p for _, p in some]))
        for some in batched(zip(names, landmarks, strict=True), CROPS_AT_ONCE)
    ]
    vectors = np.concatenate(rows).astype(np.float32)
    threshold = config.frame_threshold
    keep, cosines = same_as_most(vectors.astype(np.float64), threshold)
    count, total = int(keep.sum()), len(keep)
    if count < config.min_majority * total or count < config.min_track_frames:
        detail = (
            f"{count} of {total} frames show one person (cosine {threshold:g}); "
            f"{config.min_majority:g} of them and {config.min_track_frames} frames needed"
        )
        return reject_track(track, Cause.IDENTITY_DRIFT, detail), []
    mean = unit(vectors[keep].astype(np.float64).mean(axis=0))
    medians = np.median(npy_array(content[f"{key}.scores.npy"])[keep], axis=0)
    scores = {name: round(float(v), 4) for name, v in zip(SCORE_COLUMNS, medians, strict=True)}
    scores |= {
        "same_person": round(float(np.median(cosines[keep])), 4),
        "same_person_least": round(float(cosines[keep].min()), 4),
    }
    track = replace(
        track,
        embedding=tuple(round(value, DECIMALS) for value in mean.tolist()),
        scores=track.scores | scores,
    )
    members = [*members, (f"{key}.embedding.npy", npy_bytes(vectors))]
    return select_frames(video, track, members, keep, Cause.IDENTITY_DRIFT)


def _decode(jpeg: bytes) -> Image:
    """A crop as RGB (h, w, 3)."""
    image = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), cv2.IMREAD_COLOR)
    assert image is not None, "a crop this pipeline wrote does not decode"
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def embed(
    video: Video, members: list[Member], embedder: Embedder, config: IdentitiesConfig
) -> tuple[Video, list[Member]]:
    """Embed all open tracks of a video.

    Args:
        video: with cropped tracks.
        members: of its open tracks, as ``crops.cut`` makes them.
        embedder: of ``config.embedder``.
        config: of the stage.

    Returns:
        the video, rejected when no track is left, and the members of the tracks that stay, with all snapshots.
    """
    tracks = []
    kept = [member for member in members if snapshots.is_snapshot(member[0])]
    for track in video.tracks:
        if track.state == "open":
            own = own_members(members, video.track_key(track))
            track, own = embed_track(video, track, own, embedder, config)
            kept += own
        tracks.append(track)
    (network,) = weight_names(config)
    used = f"{config.embedder} {weights.REGISTRY[network].sha256[:12]}"
    video = replace(video, tracks=tuple(tracks), versions=video.versions | {"identity": used})
    return end_if_empty(video), kept


# ---------------------------------------------------------------------------------------------- all tracks


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Candidate:
    """What is known of one finished track when the dataset is put together."""

    key: str
    """Of the sample."""
    identity: str
    video: str
    sources: tuple[Hashable, ...]
    """What would tell that two identities list one video: its URL or path, and the sha256 of its file, or hashes of
    these; false where it is not known."""
    frames: int
    split: str
    """Official split of the list, or empty."""
    embedding: ArrayLike
    """(d,) unit mean of the frames' embeddings; kept as float32."""
    window_side: float = 0.0
    """Median side of its windows in source pixels."""
    hash_marks: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    """(k, 3) of its hashed windows the time, and where the face is in the frame: shares of width and height."""
    hashes: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 32), np.uint8))
    """(k, 32) perceptual hashes of those windows."""

    def __post_init__(self) -> None:
        # a million tuples of 128 Python numbers would take 4 GB
        object.__setattr__(self, "embedding", np.asarray(self.embedding, dtype=np.float32))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where a track goes, or why it does not stay."""

    split: str
    """``train``, ``val`` or ``test``; of a rejected track what the list said."""
    cause: str = ""
    """Value of a :class:`Cause`; empty: the track stays."""
    detail: str = ""


Reasons = dict[str, tuple[Cause, str]]
"""Why tracks do not stay, by key."""


def decide(candidates: Iterable[Candidate], config: IdentitiesConfig) -> dict[str, Decision]:
    """Decide for every track of a dataset; the order of the candidates does not matter.

    First the tracks that look unlike their identity's other videos go, then :func:`settle`.

    Returns:
        a decision for the key of each candidate.
    """
    everyone = sorted(candidates, key=lambda track: (track.identity, track.video, track.key))
    gone = strangers(everyone, config.video_threshold)
    people = itertools.groupby(Without(everyone, gone), lambda track: track.identity)
    twins = find_twins({name: mean(tracks) for name, tracks in people}, config.twin_threshold)
    splits, gone = settle(everyone, gone, twins, config)
    decisions = {}
    for track in everyone:
        if track.key in gone:
            cause, detail = gone[track.key]
            decision = Decision(split=track.split, cause=cause.value, detail=detail)
        else:
            decision = Decision(split=side_of(splits, track.identity, track.video))
        decisions[track.key] = decision
    return decisions


def settle(
    tracks: Tracks, gone: Reasons, twins: Iterable[Twins], config: IdentitiesConfig
) -> tuple[dict[str, str], Reasons]:
    """What is decided over all identities, without a look at a vector.

    Identities that are too small go, then what would put one video or one person on two sides of the split, then
    identities that this made too small.

    Args:
        tracks: sorted by identity; gone through several times, never held.
        gone: those of them that do not stay already.
        twins: of :func:`find_twins`.
        config: of the stage.

    Returns:
        the split of every identity that had a track left before the last two steps (with a legacy split also of every
        video, as ``IDENTITY/VIDEO``), and ``gone`` with what went here.
    """
    gone = dict(gone)
    gone |= too_small(Without(tracks, gone), config)
    staying = Without(tracks, gone)
    splits = split_identities(staying, config.test_share, twins)
    if config.split == "clean":
        gone |= twin_leaks(staying, splits, twins) | leaks(staying, splits)
    else:
        splits |= {
            f"{track.identity}/{track.video}": track.split for track in staying if track.split
        }
    gone |= too_small(Without(tracks, gone), config)
    return splits, gone


class Tracks(Protocol):
    """Candidates that can be gone through again and again: a list, or a table that makes them anew."""

    def __iter__(self) -> Iterator[Candidate]: ...


@dataclass(frozen=True)
class Without:
    """Tracks without some of them."""

    tracks: Tracks
    gone: Reasons

    def __iter__(self) -> Iterator[Candidate]:
        return (track for track in self.tracks if track.key not in self.gone)


def strangers(tracks: list[Candidate], threshold: float) -> Reasons:
    """Tracks that look unlike the rest of their identity; ``tracks`` are sorted by identity and video."""
    gone: Reasons = {}
    for _, group in itertools.groupby(tracks, lambda track: track.identity):
        people = list(group)
        cosines, num_others = compare_videos(people, threshold)
        for track, cosine, others in zip(people, cosines, num_others, strict=True):
            if cosine < threshold:
                rest = f"{others} other videos" if others else "the rest of the video"
                detail = f"cosine {cosine:.3f} to {rest} of {track.identity}, below {threshold:g}"
                gone[track.key] = (Cause.IDENTITY_DISAGREES, detail)
    return gone


def compare_videos(
    tracks: list[Candidate], threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How much each track looks like the other videos of its identity.

    A video's vector is the mean of its largest set of tracks that agree, by frames. The identity's core is the largest
    set of videos that agree, by number, then by frames. A track is compared with the mean of the core without its own
    video. So of two videos that disagree the one with more frames is the core and stays, and of three or more the
    majority; a single video is compared with itself, which tells its tracks apart.

    Args:
        tracks: n >= 1 of one identity, sorted by video.
        threshold: least cosine of two that agree.

    Returns:
        (n,) cosines, and (n,) the number of other videos each was compared with, 0: with its own.
    """
    vectors = unit(np.stack([track.embedding for track in tracks]).astype(np.float64))
    frames = np.array([track.frames for track in tracks])
    _, first, owner = np.unique([t.video for t in tracks], return_index=True, return_inverse=True)
    means = vectors[first]
    video_frames = np.add.reduceat(frames, first)
    for video, count in enumerate(np.bincount(owner)):
        if count > 1:
            own = slice(first[video], first[video] + count)
            agree = agreeing(vectors[own], frames[own], threshold)
            means[video] = unit((frames[own] * agree) @ vectors[own])
            video_frames[video] = frames[own][agree].sum()
    core = agreeing(means, 1 + video_frames / (1 + video_frames.sum()), threshold)
    num_others = core.sum() - core[owner]
    others = core @ means - core[owner, None] * means[owner]
    others[num_others == 0] = means[owner[num_others == 0]]
    cosines = np.round((vectors * unit(others)).sum(axis=1), DECIMALS)
    return cosines, num_others


def too_small(tracks: Tracks, config: IdentitiesConfig) -> Reasons:
    """All tracks of identities with too few videos or frames; ``tracks`` are sorted by identity."""
    gone: Reasons = {}
    for identity, group in itertools.groupby(tracks, lambda track: track.identity):
        people = list(group)
        num_videos = len({track.video for track in people})
        num_frames = sum(track.frames for track in people)
        if num_videos < config.min_identity_videos:
            detail = f"{identity} has {num_videos} videos, needs {config.min_identity_videos}"
            reason = Cause.IDENTITY_FEW_VIDEOS, detail
        elif num_frames < config.min_identity_frames:
            detail = f"{identity} has {num_frames} frames, needs {config.min_identity_frames}"
            reason = Cause.IDENTITY_FEW_FRAMES, detail
        else:
            continue
        gone |= dict.fromkeys((track.key for track in people), reason)
    return gone


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Two identities that look like one person."""

    one: str
    other: str
    """Later in the alphabet than ``one``."""
    cosine: float
    """Of their means."""


def mean(tracks: Iterable[Candidate]) -> Vectors:
    """(d,) unit mean over all frames of tracks of one identity, at least one."""
    vectors = [track.frames * np.asarray(track.embedding, np.float64) for track in tracks]
    return unit(np.sum(vectors, axis=0))


def find_twins(means: Mapping[str, Vectors], threshold: float) -> list[Twins]:
    """Pairs of identities whose means have at least this cosine, sorted by name.

    Args:
        means: of every identity, :func:`mean`.
        threshold: least cosine; from 1 on there are none.
    """
    names = sorted(means)
    if len(names) < 2 or threshold >= 1:
        return []
    found = []
    for first, second in itertools.combinations_with_replacement(
        range(0, len(names), IDENTITIES_AT_ONCE), 2
    ):
        ones, others = (names[start : start + IDENTITIES_AT_ONCE] for start in (first, second))
        left, right = (np.stack([means[name] for name in some]) for some in (ones, others))
        cosines = np.round(left @ right.T, DECIMALS)
        for row, column in np.argwhere(cosines >= threshold).tolist():
            if first + row < second + column:
                pair = Twins(
                    one=ones[row], other=others[column], cosine=float(cosines[row, column])
                )
                found.append(pair)
    return sorted(found, key=lambda pair: (pair.one, pair.other))


def side_of(splits: Mapping[str, str], identity: str, video: str) -> str:
    """The split of a video, by what :func:`settle` says."""
    return splits.get(f"{identity}/{video}") or splits[identity]


def split_identities(
    tracks: Tracks, test_share: float, twins: Iterable[Twins] = ()
) -> dict[str, str]:
    """The split of each identity: the list's (of several the one that is tested on), else by hash.

    Identities without an official split that share a video or look like one person, directly or through others, are
    hashed as one, by the first of their names.
    """
    splits: dict[str, str] = {}
    for track in tracks:
        splits[track.identity] = max(
            splits.get(track.identity, ""), track.split, key=STRICTNESS.__getitem__
        )
    leader = {name: name for name, split in splits.items() if not split}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    listed_by: dict[Hashable, str] = {}
    for track in tracks:
        if track.identity in leader:
            for source in filter(None, track.sources):
                one, other = (
                    find(track.identity),
                    find(listed_by.setdefault(source, track.identity)),
                )
                leader[max(one, other)] = min(one, other)
    for pair in twins:
        if pair.one in leader and pair.other in leader:
            one, other = find(pair.one), find(pair.other)
            leader[max(one, other)] = min(one, other)
    for name in leader:
        splits[name] = "test" if hash_share(find(name)) < test_share else "train"
    return splits


def advise_test_share(names: Iterable[str], test_share: float) -> float | None:
    """A ``test_share`` that splits these few people, when the present one puts all of them on one side; else None.

    Args:
        names: of identities without an official split.
        test_share: of the configuration; 0 is taken to be meant.
    """
    shares = sorted({hash_share(name) for name in names})
    if not test_share or len(shares) < 2 or shares[0] < test_share <= shares[-1]:
        return None
    tested = max(1, round(len(shares) / 5))
    low, high = shares[tested - 1], shares[tested]
    digits = 2
    while not low < (advised := round((low + high) / 2, digits)) <= high:
        digits += 1
    return advised


def hash_share(name: str) -> float:
    """A number from 0 to 1 that only depends on ``name``, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def leaks(tracks: Tracks, splits: dict[str, str]) -> Reasons:
    """Tracks that would let the training see what is tested on.

    Those are tracks that the list puts in another split than their identity, and tracks of a video that a stricter split
    has under another name.
    """
    gone: Reasons = {}
    for track in tracks:
        split = splits[track.identity]
        if track.split and track.split != split:
            detail = f"listed for {track.split}, but {track.identity} is also listed for {split}"
            gone[track.key] = (Cause.IDENTITY_SPLIT_LEAK, detail)
    left = Without(tracks, gone)
    # without the many that are trained on: nothing gives way to them
    strictest: dict[Hashable, str] = {}
    for track in left:
        if STRICTNESS[splits[track.identity]] > STRICTNESS["train"]:
            for source in filter(None, track.sources):
                held = strictest.setdefault(source, track.identity)
                if STRICTNESS[splits[track.identity]] > STRICTNESS[splits[held]]:
                    strictest[source] = track.identity
    for track in left:
        for held in (strictest[source] for source in track.sources if source in strictest):
            if STRICTNESS[splits[held]] > STRICTNESS[splits[track.identity]]:
                detail = f"the same video is in {splits[held]} as {held}"
                gone[track.key] = (Cause.IDENTITY_SPLIT_LEAK, detail)
    return gone


def twin_leaks(tracks: Tracks, splits: dict[str, str], twins: Iterable[Twins]) -> Reasons:
    """Tracks of identities that look like one of a stricter split."""
    stricter: dict[str, Twins] = {}
    for pair in twins:
        if pair.one not in splits or pair.other not in splits:
            continue
        lax, strict = sorted((pair.one, pair.other), key=lambda name: STRICTNESS[splits[name]])
        if splits[lax] != splits[strict]:
            stricter.setdefault(lax, pair)
    gone: Reasons = {}
    for track in tracks:
        if track.identity in stricter:
            pair = stricter[track.identity]
            held = pair.other if track.identity == pair.one else pair.one
            detail = f"looks like {held} of {splits[held]}, cosine {pair.cosine:.3f}"
            gone[track.key] = (Cause.IDENTITY_SPLIT_LEAK, detail)
    return gone


# ---------------------------------------------------------------------------------------------- on Ray


class IdentityEmbedder:
    """Holds an embedder for the life of an actor."""

    def __init__(self, config: IdentitiesConfig) -> None:
        self.config = config
        self.embedder = embedders.load_embedder(config.embedder)
        use_one_thread()

    def __call__(self, row: VideoRow) -> VideoRow:
        """One video."""
        return run_stage("identities", self.embed, row)

    def embed(self, video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
        """The stage on an unpacked row."""
        return embed(video, members, self.embedder, self.config)


def add_embeddings(videos: Dataset, config: IdentitiesConfig) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`."""
    return add_actors(
        videos, IdentityEmbedder, config.resources, config.videos_at_once, config=config
    )
