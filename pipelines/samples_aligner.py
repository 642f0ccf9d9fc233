"""Published dataset → batches of the Aligner. Torch on the CPU; no Ray.

A sample is K pictures of a person, the sources, and one more, the target (HeSer §3.1). It is drawn first: identity, video,
frames. samples.py says what that is good for.

Everything is done by the loaders, processes on the CPU: a sample of 512 px takes one of them about 35 ms, of which the
augmentation is 7 (benchmarks/README.md). On the training's device that would be saved, but its batches would be its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.aligner import augment
from models.aligner.augment import AugmentConfig
from models.aligner.batch import AlignerBatch
from models.frozen.arcface import (
    ArcFace,
    DlibDescriptor,
    IdentityName,
    IdentityNetwork,
    MobileFaceNetFeatures,
)
from models.frozen.identity import five_points
from pipelines.geometry import (
    FLIP_68,
    Floats,
    Image,
    compose,
    fit_similarity,
    square_matrix,
    warp,
)
from pipelines.reader import JSON, LANDMARKS, MATRIX, Piece, Reader
from pipelines.samples import (
    Frame,
    HeldOutConfig,
    Share,
    StreamConfig,
    decode,
    decode_labels,
    generator,
    load,
    pictures,
    reduce,
    require_size,
    valid_mask,
)
from pipelines.schema import npy_array
from pipelines.shards import DatasetError

FACES: dict[IdentityName, type[IdentityNetwork]] = {
    "arcface": ArcFace,
    "mobilefacenet": MobileFaceNetFeatures,
    "dlib": DlibDescriptor,
}
"""Whose ``size`` and ``points`` the faces are cut for."""
EXPRESSION_SIDE = 1.25
"""Side of the expression crop, in longer sides of the landmarks' bounding box."""


@dataclass(frozen=True, kw_only=True)
class AlignerSamplesConfig(StreamConfig):
    """Which pictures meet in a sample, and how they are cut."""

    pairing: Literal["video", "identity"] = "video"
    """Sources and target are frames of one video, or of any videos of the person (HeSer's text). In other videos hair and
    clothes differ, which no pose explains."""
    min_sources: int = 1
    """Fewest sources; their number K is uniform from here to ``max_sources`` and the same within a batch."""
    max_sources: int = 8
    """Most sources (LPD: 8)."""
    output_size: int = 512
    """Side of the target, px; a multiple of ``encoder_size``, not above the dataset's windows."""
    encoder_size: int = 256
    """Side of what the encoders see, px (LPD: 256)."""
    identity: IdentityName = "arcface"
    """Network that the source faces are cut for."""
    flip: float = 0.5
    """Probability that a whole sample is mirrored."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What hides the target's identity from the encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_sources <= self.max_sources:
            raise ValueError(
                f"samples.min_sources must be 1 to max_sources, got {self.min_sources} and {self.max_sources}"
            )
        if self.encoder_size < 1 or self.output_size % self.encoder_size or self.output_size < 1:
            raise ValueError(
                f"samples.output_size must be a multiple of encoder_size, got {self.output_size} and {self.encoder_size}"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"samples.flip must be 0 to 1, got {self.flip}")


@dataclass(frozen=True, kw_only=True)
class AlignerHeldOutConfig(HeldOutConfig):
    """And how many sources they have."""

    sources: int = 4
    """Sources of each sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources < 1:
            raise ValueError(f"held_out.sources must be at least 1, got {self.sources}")


# --- draws ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What one sample is made of."""

    sources: tuple[Frame, ...]
    target: Frame
    flip: bool


def num_sources(config: AlignerSamplesConfig, first: int) -> int:
    """K of the global batch whose first sample has number ``first``."""
    rng = generator(config.seed, first, stream=1)
    return int(rng.integers(config.min_sources, config.max_sources + 1))


def draw(
    reader: Reader,
    config: AlignerSamplesConfig,
    rng: np.random.Generator,
    sources: int,
    identity: int | None = None,
) -> Draw:
    """Choose the frames of one sample: every identity as often as any other, then its videos, then their frames.

    Args:
        reader: of the split.
        config: pairing and flip.
        rng: of this sample.
        sources: K.
        identity: number of the person; None: any.
    """
    if identity is None:
        identity = int(rng.integers(len(reader.identities)))
    first, end = reader.videos_of[identity : identity + 2]
    frames: list[Frame]
    if config.pairing == "video":
        video = int(rng.integers(first, end))
        chosen = rng.choice(reader.frames_of(video), sources + 1, replace=False)
        frames = [reader.locate(video, frame) for frame in chosen.tolist()]
    else:
        distinct: dict[Frame, None] = {}  # a set that keeps its order
        while len(distinct) <= sources:
            video = int(rng.integers(first, end))
            distinct[reader.locate(video, int(rng.integers(reader.frames_of(video))))] = None
        frames = list(distinct)
    return Draw(tuple(frames[:-1]), frames[-1], bool(rng.random() < config.flip))


def require_frames(reader: Reader, pairing: Literal["video", "identity"], sources: int) -> None:
    """Raise :class:`DatasetError` unless every video, or every person, has a target beside ``sources`` sources."""
    ends = reader.tracks_of
    if pairing == "identity":
        ends = [ends[video] for video in reader.videos_of]
    counts = np.diff([reader.frames_before[end] for end in ends])
    short = int((counts <= sources).sum())
    if short:
        least = int(counts.argmin())
        name = reader.keys[ends[least]].rsplit("-", 1)[0]
        if pairing == "identity":
            name = reader.identities[least]
        raise DatasetError(
            f"{reader.dataset}: {sources} sources and a target are {sources + 1} frames, but {short} of {len(counts)}"
            f" {'videos' if pairing == 'video' else 'identities'} have fewer ({name} has {counts[least]}); at most"
            f" {counts[least] - 1} sources are possible"
        )


# --- pictures ---------------------------------------------------------------------------------------------------


def face_matrix(landmarks: Floats, identity: IdentityName) -> Floats:
    """2x3 similarity, window → the identity network's face, from landmarks (68, 2)."""
    return fit_similarity(five_points(landmarks), FACES[identity].points)


def expression_matrix(landmarks: Floats, size: int) -> Floats:
    """2x3 matrix, window → the square of ``size`` pixels around the face's landmarks (68, 2)."""
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    side = EXPRESSION_SIDE * float((high - low).max())
    return square_matrix((low + high) / 2, side, 0.0, size)


# --- one sample -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """One picture with what is known of it, in pixels of the output size."""

    image: Image
    landmarks: NDArray[np.float64]

    def flipped(self) -> Shot:
        """Its mirror image; the landmarks are those of a face again."""
        mirrored = (self.landmarks * [-1, 1] + [self.image.shape[1], 0])[FLIP_68]
        return Shot(cast(Image, cv2.flip(self.image, 1)), mirrored)


class AlignerSamples:
    """A dataset in the sense of torch's ``DataLoader``: from (number of the sample, K) of some samples to their batch."""

    def __init__(
        self, config: AlignerSamplesConfig, dataset: str, split: str, *, rotate: bool = False
    ):
        """Open a split.

        Args:
            config: of the samples.
            dataset: folder or URI.
            split: train, val or test.
            rotate: take the identities in turn instead of drawing them.

        Raises:
            DatasetError: damaged, too small pictures, or too few frames for ``max_sources``.
        """
        self.config = config
        self.reader = Reader(dataset, split, check_hashes=config.check_hashes)
        self.rotate = rotate
        require_size(self.reader, config.output_size)
        require_frames(self.reader, config.pairing, config.max_sources)

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> AlignerBatch | DatasetError:
        """The batch. An error is returned, so that it crosses a process as one line and not as a traceback."""
        try:
            return self.batch(wanted)
        except DatasetError as error:
            return error

    def batch(self, wanted: Sequence[tuple[int, int]]) -> AlignerBatch:
        """Draw, read all that the samples need at once, and make them. Raises :class:`DatasetError`."""
        rngs = [generator(self.config.seed, number) for number, _ in wanted]
        draws = []
        for rng, (number, sources) in zip(rngs, wanted, strict=True):
            identity = number % len(self.reader.identities) if self.rotate else None
            draws.append(draw(self.reader, self.config, rng, sources, identity))
        pieces = [self.pieces(drawn) for drawn in draws]
        contents = iter(self.reader.read(list(itertools.chain.from_iterable(pieces))))
        made = []
        for rng, drawn, own in zip(rngs, draws, pieces, strict=True):
            members = dict(zip(own, itertools.islice(contents, len(own)), strict=True))
            made.append(self.sample(drawn, members, rng))
        keys = [self.reader.frame_key(*drawn.target) for drawn in draws]
        names = [item.name for item in fields(AlignerBatch) if item.name != "keys"]
        return AlignerBatch(
            keys=keys, **{name: torch.stack([tensors[name] for tensors in made]) for name in names}
        )

    def pieces(self, drawn: Draw) -> list[Piece]:
        """The members that a sample needs: pictures, landmarks of their tracks, matrix, JSON and labels of the target."""
        reader, (track, frame) = self.reader, drawn.target
        frames = [*drawn.sources, drawn.target]
        pieces = [reader.picture(*each) for each in frames]
        pieces += [Piece(other, LANDMARKS, LANDMARKS) for other in sorted({t for t, _ in frames} - {track})]  # fmt: skip
        pieces.append(Piece(track, JSON, MATRIX))
        if reader.has_labels:
            pieces.append(reader.labels(track, frame))
        return pieces

    def sample(
        self, drawn: Draw, members: dict[Piece, list[bytes]], rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """The tensors of one sample, named as in :class:`AlignerBatch`."""
        config, size = self.config, self.config.output_size
        track, frame = drawn.target
        record, landmarks, matrices = members[Piece(track, JSON, MATRIX)]
        points = {track: npy_array(landmarks)}
        for piece, content in members.items():
            if (piece.first, piece.last) == (LANDMARKS, LANDMARKS):
                points[piece.track] = npy_array(content[0])
        target = self.shot(drawn.target, members, points)
        sources = [self.shot(each, members, points) for each in drawn.sources]
        valid = valid_mask(record, matrices, frame, self.reader.window, size)
        foreground = np.ones((size, size), bool)
        if self.reader.has_labels:
            png = members[self.reader.labels(track, frame)][0]
            key = self.reader.frame_key(track, frame)
            foreground = decode_labels(png, self.reader.window, size, key) != 0
        if drawn.flip:
            target, sources = target.flipped(), [source.flipped() for source in sources]
            valid, foreground = valid[:, ::-1], foreground[:, ::-1]
        return tensors_of(config, target, sources, (valid, foreground), rng)

    def shot(
        self, frame: Frame, members: dict[Piece, list[bytes]], points: dict[int, NDArray[Any]]
    ) -> Shot:
        """A decoded picture and its landmarks at the output size."""
        reader, size = self.reader, self.config.output_size
        jpeg = members[reader.picture(*frame)][0]
        image = decode(jpeg, reader.window, size, reader.keys[frame[0]])
        return Shot(image, points[frame[0]][frame[1]].astype(np.float64) * (size / reader.window))


def tensors_of(
    config: AlignerSamplesConfig,
    target: Shot,
    sources: Sequence[Shot],
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """One sample, named as in :class:`AlignerBatch`.

    Args:
        config: sizes and augmentation.
        target: what is to be made.
        sources: of the same person.
        masks: (S, S) of the target: inside the frame, on the person.
        rng: of the augmentation.
    """
    size = config.output_size
    height, width = FACES[config.identity].size
    faces = [
        warp(source.image, face_matrix(source.landmarks, config.identity), (width, height))
        for source in sources
    ]
    both = torch.from_numpy(np.stack(masks)).float()
    planes = torch.cat([pictures([target.image])[0], both])  # (5, S, S)
    shift = augment.draw_shift(rng, config.augment, size)
    planes = augment.shift(planes[None], shift)[0]
    moved = target.landmarks + shift
    return {
        "sources": pictures([reduce(s.image, config.encoder_size) for s in sources]),
        "source_faces": pictures(faces),
        "target": planes[:3],
        "target_valid": planes[3:4],
        "target_foreground": planes[4:],
        "target_face_matrix": torch.from_numpy(face_matrix(moved, config.identity)).float(),
        "landmarks": torch.from_numpy(moved).float(),
    } | driving_views(config, planes[:3], moved, rng)


def driving_views(
    config: AlignerSamplesConfig, target: Tensor, landmarks: Floats, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The augmented target (3, S, S) and its expression crop, ``driving`` and ``driving_face`` of a batch.

    Both are cut from the target itself, so the crop keeps its detail, and then go through the same operations at
    the size the encoders see.
    """
    size = config.encoder_size
    factor = config.output_size // size
    x, y = augment.draw_scales(rng, config.augment)
    centre = config.output_size / 2
    scale = np.array([[x, 0, centre * (1 - x)], [0, y, centre * (1 - y)]])
    whole = F.avg_pool2d(target[None], factor)
    if (x, y) != (1, 1):
        reduced = torch.from_numpy(scale / [1, 1, factor])
        whole = augment.resample(whole, reduced, size)
    crop = expression_matrix(landmarks * [x, y] + scale[:, 2], size)
    face = augment.resample(target[None], torch.from_numpy(compose(crop, scale)), size)
    views = augment.photometric(torch.cat([whole, face]), rng, config.augment)
    return {"driving": views[0], "driving_face": views[1]}


# --- streams ----------------------------------------------------------------------------------------------------


def aligner_batches(
    config: AlignerSamplesConfig, dataset: str, *, samples_seen: int, rank: int, world_size: int
) -> Iterator[AlignerBatch]:
    """This rank's share of the training batches, without end: ``partial(aligner_batches, config, dataset)`` is what
    ``pipelines.training`` wants of every model.

    The global batch of a step is the samples ``samples_seen`` to ``samples_seen + batch_size - 1``; rank r takes the r-th
    of ``world_size`` equal runs of it. Put together they are the batch of one rank, bit for bit.

    Args:
        config: of the samples.
        dataset: folder or URI; its split ``train`` is used.
        samples_seen: by all ranks in earlier steps.
        rank: of this worker.
        world_size: number of workers.

    Raises:
        DatasetError: before the first batch, or when a shard disappears.
        ValueError: ``batch_size`` cannot be divided by ``world_size``.
    """
    share = Share(config.batch_size, rank, world_size)
    samples = AlignerSamples(config, dataset, "train")
    wanted = (
        [(number, num_sources(config, first)) for number in share.of(first)]
        for first in itertools.count(samples_seen, config.batch_size)
    )
    return load(samples, wanted)


def held_out_batches(
    config: AlignerSamplesConfig,
    held_out: AlignerHeldOutConfig,
    dataset: str,
    *,
    rank: int,
    world_size: int,
) -> Iterator[AlignerBatch]:
    """This rank's share of the samples of every evaluation; identities take turns. See :func:`aligner_batches`."""
    share = Share(config.batch_size, rank, world_size)
    samples = _held_out(config, held_out, dataset)
    starts = range(0, held_out.batches * config.batch_size, config.batch_size)
    wanted = ([(number, held_out.sources) for number in share.of(first)] for first in starts)
    return load(samples, wanted)


def check(
    config: AlignerSamplesConfig, held_out: AlignerHeldOutConfig, dataset: str, world_size: int
) -> None:
    """Open what training will open, so that the user is told before workers start. Raises ``ValueError``."""
    Share(config.batch_size, 0, world_size)
    AlignerSamples(config, dataset, "train")
    _held_out(replace(config, check_hashes=False), held_out, dataset)


def _held_out(
    config: AlignerSamplesConfig, held_out: AlignerHeldOutConfig, dataset: str
) -> AlignerSamples:
    plain = replace(
        config,
        flip=0.0,
        augment=AugmentConfig(max_photometric=0, scale=0.0, shift=0.0),
        min_sources=held_out.sources,
        max_sources=held_out.sources,
    )
    try:
        return AlignerSamples(plain, dataset, held_out.split, rotate=True)
    except DatasetError as error:
        raise DatasetError(f"{error} (--held-out.split names another)") from None
