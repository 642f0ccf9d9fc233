"""Published dataset → batches of the Blender. Torch on the CPU; no Ray.

A sample is one frame in other colours, the same mirrored, and a frame of another person (HeSer §2; models/blender/pairs.py). Identity,
video and frames are drawn first; samples.py says what that is good for. A dataset without labels cannot be used.

Loaders, processes on the CPU, make everything: 53 ms of one thread for a sample of 512 px, of which other colours are 22. Where an
Aligner is given, a share of the samples also brings what it needs to make the frame's head again. It runs in the worker, not
here: a picture of 512 px costs it 51 G multiply-accumulates, seconds of a loader's CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.aligner.augment import AugmentConfig
from models.aligner.network import AlignerConfig
from models.blender import pairs
from models.blender.batch import BlenderBatch, join
from models.blender.pairs import Draws, PairConfig, make_pair
from pipelines import samples_aligner
from pipelines.reader import JSON, MATRIX, Piece, Reader
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
    require_size,
    valid_mask,
)
from pipelines.samples_aligner import FACES, AlignerSamples, AlignerSamplesConfig
from pipelines.shards import DatasetError


@dataclass(frozen=True, kw_only=True)
class BlenderSamplesConfig(StreamConfig):
    """What a sample is made of."""

    output_size: int = 512
    """Side of the pictures, px; not above the dataset's windows."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """How far a sample is taken from its frame."""
    sources: int = 4
    """Other frames of the video that an Aligner makes a head from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_size < 1 or self.sources < 1:
            raise ValueError(
                f"samples.output_size and sources must be at least 1, got {self.output_size} and {self.sources}"
            )


@dataclass(frozen=True)
class Draw:
    """What one sample is made of."""

    frame: Frame
    same: Frame
    """Another one of the same clip, or the same where there is no other."""
    stranger: Frame
    """Of another person, or of the same where the split has no other."""
    sources: tuple[Frame, ...]
    """What an Aligner makes the head from; none where its picture is not wanted."""
    chances: Draws
    """What is done to the frames."""
    noise: torch.Generator


def draw(
    reader: Reader,
    config: BlenderSamplesConfig,
    number: int,
    *,
    has_aligner: bool,
    identity: int | None = None,
) -> Draw:
    """Choose all there is to choose of one sample: every identity as often as any other, then its videos, then their frames.

    Args:
        reader: of the split.
        config: of the samples.
        number: of the sample.
        has_aligner: whether sources are chosen; everything else is the same without.
        identity: number of the person; None: any.
    """
    rng = generator(config.seed, number)
    people = len(reader.identities)
    if identity is None:
        identity = int(rng.integers(people))
    track, place = frame = draw_frame(reader, rng, identity)
    count = int(reader.frames[track])
    same = (track, (place + int(rng.integers(1, max(count, 2)))) % count)
    other = (identity + int(rng.integers(1, max(people, 2)))) % people
    stranger = draw_frame(reader, rng, other)
    chance = torch.Generator().manual_seed(int(rng.integers(2**63)))
    chances = pairs.draw(chance, config.pairs)
    wanted = config.sources if has_aligner and chances.reenacted else 0
    sources = draw_sources(reader, rng, frame, wanted)
    return Draw(frame, same, stranger, sources, chances, chance)


def draw_frame(reader: Reader, rng: np.random.Generator, identity: int) -> Frame:
    """Any frame of a person, videos being equally likely."""
    first, end = reader.videos_of[identity : identity + 2]
    video = int(rng.integers(first, end))
    return reader.locate(video, int(rng.integers(reader.frames_of(video))))


def draw_sources(
    reader: Reader, rng: np.random.Generator, frame: Frame, count: int
) -> tuple[Frame, ...]:
    """``count`` other frames of the frame's video."""
    track, place = frame
    video = int(np.searchsorted(reader.tracks_of, track, side="right")) - 1
    own = reader.frames_before[track] - reader.frames_before[reader.tracks_of[video]] + place
    chosen = rng.choice(reader.frames_of(video) - 1, count, replace=False).tolist()
    return tuple(reader.locate(video, number + (number >= own)) for number in chosen)


class BlenderSamples:
    """A dataset in the sense of torch's ``DataLoader``: from the numbers of some samples to their batch."""

    def __init__(
        self,
        config: BlenderSamplesConfig,
        dataset: str,
        split: str,
        aligner: AlignerConfig | None = None,
        *,
        rotate: bool = False,
    ):
        """Open a split.

        Args:
            config: of the samples.
            dataset: folder or URI.
            split: train, val or test.
            aligner: network that makes a share of the heads, of the same size; None: there is none.
            rotate: take the identities in turn instead of drawing them.

        Raises:
            DatasetError: damaged, without labels, too small pictures, or too few frames for the Aligner's sources.
        """
        self.config = config
        self.rotate = rotate
        self.aligner: AlignerSamples | None = None
        if aligner is None:
            self.reader = Reader(dataset, split, check_hashes=config.check_hashes)
            require_size(self.reader, config.output_size)
        else:
            self.aligner = AlignerSamples(aligner_samples(config, aligner), dataset, split)
            self.reader = self.aligner.reader
        if not self.reader.has_labels:
            raise DatasetError(
                f"{dataset}: not all samples of split {split!r} have labels, which the Blender needs (--annotate.parser of"
                " jobs/preprocess.py)"
            )

    def __getitems__(self, wanted: Sequence[int]) -> BlenderBatch | DatasetError:
        """The batch. An error is returned, so that it crosses a process as one line and not as a traceback."""
        try:
            return self.batch(wanted)
        except DatasetError as error:
            return error

    def batch(self, wanted: Sequence[int]) -> BlenderBatch:
        """Draw, read all that the samples need at once, and make them. Raises :class:`DatasetError`."""
        draws = []
        for number in wanted:
            identity = number % len(self.reader.identities) if self.rotate else None
            has_aligner = self.aligner is not None
            drawn = draw(self.reader, self.config, number, has_aligner=has_aligner, identity=identity)  # fmt: skip
            draws.append(drawn)
        needed = list(dict.fromkeys(piece for drawn in draws for piece in self.pieces(drawn)))
        members = dict(zip(needed, self.reader.read(needed), strict=True))
        return join([self.sample(drawn, members) for drawn in draws])

    def pieces(self, drawn: Draw) -> list[Piece]:
        """The members that a sample needs."""
        frames = (drawn.frame, drawn.same, drawn.stranger)
        pieces = [piece for frame in frames for piece in self.pieces_of(frame)]
        if self.aligner is not None and drawn.sources:
            pieces += self.aligner.pieces(driven(drawn))
        return pieces

    def pieces_of(self, frame: Frame) -> list[Piece]:
        """Picture and labels of a frame, and the first members of its track."""
        reader = self.reader
        return [reader.picture(*frame), reader.labels(*frame), Piece(frame[0], JSON, MATRIX)]

    def sample(self, drawn: Draw, members: Mapping[Piece, list[bytes]]) -> BlenderBatch:
        """One sample of what was read."""
        made = make_pair(
            self.reader.frame_key(*drawn.frame),
            self.shot(drawn.frame, members),
            self.shot(drawn.same, members),
            self.shot(drawn.stranger, members),
            drawn.chances,
            drawn.noise,
        )
        if self.aligner is None:
            return made
        views = self.views(self.aligner, drawn, members)
        return replace(
            made,
            sources=views["sources"][None],
            source_faces=views["source_faces"][None],
            driving=views["driving"][None],
            driving_face=views["driving_face"][None],
        )

    def shot(self, frame: Frame, members: Mapping[Piece, list[bytes]]) -> pairs.Frame:
        """One frame at the output size."""
        reader, size = self.reader, self.config.output_size
        picture, labels, first = (members[piece] for piece in self.pieces_of(frame))
        key = reader.frame_key(*frame)
        record, _, matrices = first
        valid = valid_mask(record, matrices, frame[1], reader.window, size)
        return pairs.Frame(
            image=pictures([decode(picture[0], reader.window, size, key)])[0],
            labels=torch.from_numpy(decode_labels(labels[0], reader.window, size, key))[None],
            valid=torch.from_numpy(valid)[None].float(),
        )

    def views(
        self, aligner: AlignerSamples, drawn: Draw, members: Mapping[Piece, list[bytes]]
    ) -> dict[str, Tensor]:
        """What the Aligner makes the frame's head from, named as in :class:`BlenderBatch`; 0 where its picture is not wanted."""
        count, side = self.config.sources, aligner.config.encoder_size
        shapes = {
            "sources": (count, 3, side, side),
            "source_faces": (count, 3, *FACES[aligner.config.identity].size),
            "driving": (3, side, side),
            "driving_face": (3, side, side),
        }
        if not drawn.sources:
            return {name: torch.zeros(shape) for name, shape in shapes.items()}
        wanted = driven(drawn)
        own = {piece: members[piece] for piece in aligner.pieces(wanted)}
        tensors = aligner.sample(wanted, own, generator(0, 0))  # nothing is left to chance
        return {name: tensors[name] for name in shapes}


def driven(drawn: Draw) -> samples_aligner.Draw:
    """The Aligner's sample of a frame that drives itself."""
    return samples_aligner.Draw(drawn.sources, drawn.frame, flip=False)


def aligner_samples(config: BlenderSamplesConfig, aligner: AlignerConfig) -> AlignerSamplesConfig:
    """How an Aligner's pictures are cut for a frame that drives itself: as in its own training, without augmentation."""
    return AlignerSamplesConfig(
        batch_size=config.batch_size,
        seed=config.seed,
        check_hashes=config.check_hashes,
        min_sources=config.sources,
        max_sources=config.sources,
        output_size=config.output_size,
        encoder_size=aligner.encoder_size,
        identity=aligner.identity,
        flip=0.0,
        augment=AugmentConfig(max_photometric=0, scale=0.0, shift=0.0),
    )


# --- streams ----------------------------------------------------------------------------------------------------


def blender_batches(
    config: BlenderSamplesConfig,
    dataset: str,
    aligner: AlignerConfig | None = None,
    *,
    samples_seen: int,
    rank: int,
    world_size: int,
) -> Iterator[BlenderBatch]:
    """This rank's share of the training batches, without end: ``partial(blender_batches, config, dataset)`` is what
    ``pipelines.training`` wants of every model. Put together, the shares are the batch of one rank, bit for bit.

    Args:
        config: of the samples.
        dataset: folder or URI; its split ``train`` is used.
        aligner: network that makes a share of the heads; None: there is none.
        samples_seen: by all ranks in earlier steps.
        rank: of this worker.
        world_size: number of workers.

    Raises:
        DatasetError: before the first batch, or when labels are not labels or a shard disappears.
        ValueError: ``batch_size`` cannot be divided by ``world_size``.
    """
    share = Share(config.batch_size, rank, world_size)
    samples = BlenderSamples(config, dataset, "train", aligner)
    starts = itertools.count(samples_seen, config.batch_size)
    return load(samples, (share.of(first) for first in starts))


def held_out_batches(
    config: BlenderSamplesConfig,
    held_out: HeldOutConfig,
    dataset: str,
    aligner: AlignerConfig | None = None,
    *,
    rank: int,
    world_size: int,
) -> Iterator[BlenderBatch]:
    """This rank's share of the samples of every evaluation; identities take turns. See :func:`blender_batches`."""
    share = Share(config.batch_size, rank, world_size)
    samples = _held_out(config, held_out, dataset, aligner)
    starts = range(0, held_out.batches * config.batch_size, config.batch_size)
    return load(samples, (share.of(first) for first in starts))


def check(
    config: BlenderSamplesConfig,
    held_out: HeldOutConfig,
    dataset: str,
    aligner: AlignerConfig | None,
    world_size: int,
) -> None:
    """Open what training will open and make a sample of each, so that the user is told before workers start.

    Raises:
        ValueError: as :func:`blender_batches`.
    """
    Share(config.batch_size, 0, world_size)
    BlenderSamples(config, dataset, "train", aligner).batch([0])
    _held_out(replace(config, check_hashes=False), held_out, dataset, aligner).batch([0])


def _held_out(
    config: BlenderSamplesConfig,
    held_out: HeldOutConfig,
    dataset: str,
    aligner: AlignerConfig | None,
) -> BlenderSamples:
    """T is the mirrored frame always; colours and the Aligner's share stay as in training, or nothing would be to do."""
    plain = replace(
        config.pairs, p_mirror=1.0, p_other_frame=0.0, p_noise=0.0, p_background=0.0, p_affine=0.0
    )
    try:
        return BlenderSamples(
            replace(config, pairs=plain), dataset, held_out.split, aligner, rotate=True
        )
    except DatasetError as error:
        raise DatasetError(f"{error} (--held-out.split names another)") from None
