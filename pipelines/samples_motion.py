"""Published dataset → batches of the motion model. Torch on the CPU; no Ray.

A sample is two frames of one clip and their landmarks (supplement, section 2): a clip is a track of the dataset, best made
by the preset ``motion`` of jobs/preprocess.py, whose window stands still while the head moves in it.

The supplement draws every "video" 75 times an epoch. Here that is exact: samples come in rounds, a round has each identity
once, in an order of its own, and 75 rounds are an epoch. Which clip of the identity and which two frames of the clip is
drawn (first order model's ``id_sampling``). The frames differ; first order model allows a frame to be its own target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from models.motion.batch import MotionBatch
from models.motion.flow import normalise
from models.motion.learner import samples_in_epoch
from pipelines.reader import LANDMARKS, PUPILS, Piece, Reader
from pipelines.samples import (
    HeldOutConfig,
    Share,
    StreamConfig,
    decode,
    generator,
    load,
    pictures,
)
from pipelines.schema import npy_array
from pipelines.shards import DatasetError

Unit = Literal["identity", "video", "clip"]
ROUND = 1
"""Stream of the random numbers that order a round; 0 is that of the samples."""


@dataclass(frozen=True, kw_only=True)
class MotionSamplesConfig(StreamConfig):
    """Which frames meet in a pair, and how many pairs are an epoch."""

    batch_size: int = 40
    """Samples of a step, over all workers (supplement); their number must divide it."""
    size: int = 256
    """Side of the pictures, px (supplement); not above the dataset's windows."""
    num_landmarks: Literal[68, 70] = 68
    """Points of a face; 70 needs a dataset with pupils."""
    unit: Unit = "identity"
    """What the supplement calls a video, drawn as often as any other: a person, a file, or a clip. Only persons fit the
    paper's hours on VoxCeleb1, only files its FaceForensics, which names no persons."""
    repeats: int = 75
    """Draws of each unit in an epoch (supplement)."""
    flip: float = 0.5
    """Probability that a pair is mirrored (first order model)."""
    jitter: float = 0.1
    """Greatest change of brightness, contrast, saturation and hue, the same for both frames (first order model)."""
    reserve: float = 0.0
    """Share of each clip, its end, that is not trained on: with ``--held-out.split train`` it is what is evaluated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.repeats < 1:
            raise ValueError(
                f"samples.size and repeats must be at least 1, got {self.size} and {self.repeats}"
            )
        if not 0 <= self.flip <= 1 or not 0 <= self.jitter <= 0.5:
            raise ValueError(
                f"samples.flip must be 0 to 1 and jitter 0 to 0.5, got {self.flip} and {self.jitter}"
            )
        if not 0 <= self.reserve < 1:
            raise ValueError(f"samples.reserve must be 0 or more and below 1, got {self.reserve}")


# --- draws ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What one sample is made of: two frames of one track."""

    track: int
    source: int
    driving: int
    flip: bool = False


def num_trained(frames: int, reserve: float) -> int:
    """Frames of a clip that training may draw, from its beginning."""
    return frames - int(frames * reserve)


@lru_cache(maxsize=4)
def order_of(seed: int, number: int, units: int) -> NDArray[np.int64]:
    """The units of a round, each once."""
    return generator(seed, number, ROUND).permutation(units)


def unit_bounds(reader: Reader, unit: Unit) -> Sequence[int]:
    """(units + 1): tracks of unit u are ``bounds[u]`` to ``bounds[u + 1]``."""
    match unit:
        case "identity":
            return [reader.tracks_of[video] for video in reader.videos_of]
        case "video":
            return reader.tracks_of
        case "clip":
            return range(len(reader.keys) + 1)


def draw(
    reader: Reader,
    bounds: Sequence[int],
    config: MotionSamplesConfig,
    number: int,
    rng: np.random.Generator,
) -> Pair:
    """Choose the frames of training sample ``number``, in either order alike: first order model's reversal of time.

    Args:
        reader: of the split.
        bounds: of :func:`unit_bounds`.
        config: of the samples.
        number: of the sample, from 0.
        rng: of this sample.
    """
    units = len(bounds) - 1
    turn, place = divmod(number, units)
    unit = int(order_of(config.seed, turn, units)[place])
    track = int(rng.integers(bounds[unit], bounds[unit + 1]))
    trained = num_trained(int(reader.frames[track]), config.reserve)
    source, driving = rng.choice(trained, 2, replace=False).tolist()
    return Pair(track, source, driving, bool(rng.random() < config.flip))


def draw_held_out(
    reader: Reader,
    bounds: Sequence[int],
    config: MotionSamplesConfig,
    number: int,
    rng: np.random.Generator,
) -> Pair:
    """The pair of an evaluation: units in turn, a clip's first frame is the source (first order model's reconstruction).

    The driving frame is any other, or any of those that training leaves out.
    """
    units = len(bounds) - 1
    unit = number % units
    track = int(rng.integers(bounds[unit], bounds[unit + 1]))
    frames = int(reader.frames[track])
    trained = num_trained(frames, config.reserve)
    return Pair(track, 0, int(rng.integers(trained if trained < frames else 1, frames)))


# --- samples ----------------------------------------------------------------------------------------------------


class MotionSamples:
    """A dataset in the sense of torch's ``DataLoader``: from the numbers of some samples to their batch."""

    def __init__(
        self, config: MotionSamplesConfig, dataset: str, split: str, *, held_out: bool = False
    ) -> None:
        """Open a split.

        Args:
            config: of the samples.
            dataset: folder or URI.
            split: train, val or test.
            held_out: draw as an evaluation does.

        Raises:
            DatasetError: damaged, too small pictures, clips of too few frames, or no pupils where they are wanted.
        """
        self.config = config
        self.held_out = held_out
        self.reader = Reader(dataset, split, check_hashes=config.check_hashes)
        self.bounds = unit_bounds(self.reader, config.unit)
        if self.reader.window < config.size:
            raise DatasetError(
                f"{dataset}: windows are {self.reader.window} px, too small for samples.size {config.size}"
            )
        if config.num_landmarks == 70 and not self.reader.has_pupils:
            raise DatasetError(
                f"{dataset}: its samples have no pupils.npy, which 70 landmarks need: make it with --annotate.pupils iris; or train"
                " with 68 (--learner.network.num-landmarks 68), whose model does not move the gaze"
            )
        require_frames(self.reader, config.reserve)

    @property
    def units(self) -> int:
        """Identities, videos or clips, as the configuration counts them."""
        return len(self.bounds) - 1

    def __getitems__(self, wanted: Sequence[int]) -> MotionBatch | DatasetError:
        """The batch. An error is returned, so that it crosses a process as one line and not as a traceback."""
        try:
            return self.batch(wanted)
        except DatasetError as error:
            return error

    def batch(self, wanted: Sequence[int]) -> MotionBatch:
        """Draw the samples of these numbers and make them. Raises :class:`DatasetError`."""
        rngs = [generator(self.config.seed, number) for number in wanted]
        choose = draw_held_out if self.held_out else draw
        pairs = [
            choose(self.reader, self.bounds, self.config, number, rng)
            for number, rng in zip(wanted, rngs, strict=True)
        ]
        return self.make(pairs, rngs)

    def make(self, pairs: Sequence[Pair], rngs: Sequence[np.random.Generator] = ()) -> MotionBatch:
        """The batch of these pairs, all read at once; colours change only with ``rngs``. Raises :class:`DatasetError`."""
        pieces = [self.pieces(pair) for pair in pairs]
        contents = iter(self.reader.read(list(itertools.chain.from_iterable(pieces))))
        images, points = [], []
        for index, (pair, own) in enumerate(zip(pairs, pieces, strict=True)):
            members = [content[0] for content in itertools.islice(contents, len(own))]
            key = self.reader.keys[pair.track]
            both = [decode(jpeg, self.reader.window, self.config.size, key) for jpeg in members[:2]]
            shown = pictures(both)  # (2, 3, S, S)
            images.append(change_colours(shown, rngs[index], self.config.jitter) if rngs else shown)
            points.append(self.landmarks(members[2:], [pair.source, pair.driving]))
        shown, faces = torch.stack(images), torch.stack(points)  # (b, 2, ...)
        batch = MotionBatch(
            keys=[self.key(pair) for pair in pairs],
            source=shown[:, 0],
            driving=shown[:, 1],
            source_landmarks=faces[:, 0],
            driving_landmarks=faces[:, 1],
        )
        return batch.flipped(torch.tensor([pair.flip for pair in pairs]))

    def pieces(self, pair: Pair) -> list[Piece]:
        """The members that a sample needs: two pictures and the points of their clip."""
        reader, track = self.reader, pair.track
        pieces = [reader.picture(track, pair.source), reader.picture(track, pair.driving)]
        pieces.append(Piece(track, LANDMARKS, LANDMARKS))
        if self.config.num_landmarks == 70:
            pieces.append(Piece(track, PUPILS, PUPILS))
        return pieces

    def landmarks(self, members: Sequence[bytes], frames: Sequence[int]) -> Tensor:
        """Points (2, K, 2) in [-1, 1] of two frames, from the arrays of their clip."""
        parts = [npy_array(content)[list(frames)] for content in members]
        window_px = np.concatenate(parts, axis=1).astype(np.float64)
        return normalise(torch.from_numpy(window_px), self.reader.window).float()

    def key(self, pair: Pair) -> str:
        """``<sample key>.<source frame>.<driving frame>``."""
        source, driving = (
            self.reader.frame_key(pair.track, frame) for frame in (pair.source, pair.driving)
        )
        return f"{source}.{driving.rpartition('.')[2]}"


def require_frames(reader: Reader, reserve: float) -> None:
    """Raise :class:`DatasetError` unless every clip has a pair to train on, and with ``reserve`` a frame besides."""
    least = int(reader.frames.argmin())
    frames = int(reader.frames[least])
    trained = num_trained(frames, reserve)
    if trained < 2 or (reserve and trained == frames):
        raise DatasetError(
            f"{reader.dataset}: {reader.keys[least]} has {frames} frames, {trained} of them to train on"
            f" (samples.reserve {reserve:g}); a pair needs two, and something must be left to reserve"
        )


def change_colours(shown: Tensor, rng: np.random.Generator, jitter: float) -> Tensor:
    """Brightness, contrast, saturation and hue changed by up to ``jitter``, alike for all pictures (n, 3, h, w) in [-1, 1]."""
    if not jitter:
        return shown
    *factors, hue = rng.uniform(-jitter, jitter, 4).tolist()
    x = (shown + 1) / 2
    changes = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation)
    for change, factor in zip(changes, factors, strict=True):
        x = change(x, 1 + factor)
    return T.adjust_hue(x, hue).clamp(0, 1) * 2 - 1


# --- streams ----------------------------------------------------------------------------------------------------


def motion_batches(
    config: MotionSamplesConfig, dataset: str, *, samples_seen: int, rank: int, world_size: int
) -> Iterator[MotionBatch]:
    """This rank's share of the training batches, without end: see ``samples_aligner.aligner_batches``.

    Args:
        config: of the samples.
        dataset: folder or URI; its split ``train`` is used.
        samples_seen: by all ranks in earlier steps of this stage.
        rank: of this worker.
        world_size: number of workers.

    Raises:
        DatasetError: before the first batch, or when a shard disappears.
        ValueError: ``batch_size`` cannot be divided by ``world_size``.
    """
    share = Share(config.batch_size, rank, world_size)
    samples = MotionSamples(config, dataset, "train")
    starts = itertools.count(samples_seen, config.batch_size)
    return load(samples, (list(share.of(first)) for first in starts))


def held_out_batches(
    config: MotionSamplesConfig,
    held_out: HeldOutConfig,
    dataset: str,
    *,
    rank: int,
    world_size: int,
) -> Iterator[MotionBatch]:
    """This rank's share of the samples of every evaluation. See :func:`motion_batches`."""
    share = Share(config.batch_size, rank, world_size)
    samples = open_held_out(config, held_out, dataset)
    starts = range(0, held_out.batches * config.batch_size, config.batch_size)
    return load(samples, (list(share.of(first)) for first in starts))


def open_held_out(
    config: MotionSamplesConfig, held_out: HeldOutConfig, dataset: str
) -> MotionSamples:
    """The samples of evaluations: nothing mirrored or changed in colour. Raises :class:`DatasetError`."""
    reserve = config.reserve if held_out.split == "train" else 0.0
    plain = replace(config, jitter=0.0, reserve=reserve, check_hashes=False)
    try:
        return MotionSamples(plain, dataset, held_out.split, held_out=True)
    except DatasetError as error:
        raise DatasetError(f"{error} (--held-out.split names another)") from None


def successive(samples: MotionSamples, frames: int, at_once: int = 8) -> Iterator[MotionBatch]:
    """Up to ``frames`` successive frames of the longest held-out clip, driven from its first one, some at once."""
    track = int(samples.reader.frames.argmax())
    total = int(samples.reader.frames[track])
    trained = num_trained(total, samples.config.reserve)
    first = trained if trained < total else 1
    last = min(first + frames, total)
    for start in range(first, last, at_once):
        driving = range(start, min(start + at_once, last))
        yield samples.make([Pair(track, 0, frame) for frame in driving])


def check(
    config: MotionSamplesConfig, held_out: HeldOutConfig, dataset: str, world_size: int
) -> int:
    """Open what training will open, so that the user is told before workers start. Raises ``ValueError``.

    Returns:
        units of the training split.
    """
    Share(config.batch_size, 0, world_size)
    trained = MotionSamples(config, dataset, "train")
    seen = open_held_out(config, held_out, dataset).reader
    is_legacy = seen.manifest["config"].get("identities.split") == "legacy"
    shared = sorted(set(trained.reader.identities) & set(seen.identities))
    if shared and held_out.split != "train" and not is_legacy:
        raise DatasetError(
            f"{dataset}: {shared[0]}{f' and {len(shared) - 1} more' if shared[1:] else ''} of split {held_out.split} are"
            " in split train, too: scores would be of people who were trained on; make the dataset anew"
        )
    return trained.units


def epoch_samples(config: MotionSamplesConfig, units: int) -> int:
    """Pairs of an epoch of a dataset with so many units."""
    return samples_in_epoch(units, config.repeats)
