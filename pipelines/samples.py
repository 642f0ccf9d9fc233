"""What the samples of all models share: random numbers, pictures, and the loaders that make batches ahead. No Ray.

A sample is drawn first, from (seed, number of the sample) and nothing else. Then its members are read, by range, and only
those are decoded. So a stream can begin at any sample, and neither the number of ranks nor that of loader processes changes
it. What a sample is, the ``samples_`` file of each model says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines import annotate
from pipelines.geometry import Floats, Image, invert
from pipelines.reader import Reader
from pipelines.schema import npy_array
from pipelines.shards import DatasetError

Wanted = TypeVar("Wanted", contravariant=True)
Batch = TypeVar("Batch", covariant=True)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How batches are made ahead; what is drawn, each model adds."""

    batch_size: int = 8
    """Samples of a step, over all workers; their number must divide it. So the batches do not depend on it."""
    loaders: int = 4
    """Processes of each worker that make batches ahead; 0: none, the worker makes them itself."""
    prefetch: int = 2
    """Batches that each loader keeps ready."""
    seed: int = 0
    """Of every draw."""
    check_hashes: bool = False
    """Read all shards at the start and compare their sha256, not only their sizes."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"samples.batch_size must be at least 1, got {self.batch_size}")
        if self.loaders < 0 or self.prefetch < 1:
            raise ValueError(
                f"samples.loaders must be at least 0 and prefetch 1, got {self.loaders} and {self.prefetch}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"samples.seed must be 0 to {2**32 - 1}, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """The samples of every evaluation and preview: always the same ones, identities in turn, as little changed as can be."""

    split: Literal["val", "test", "train"] = "test"
    """Whose people. With ``train`` the scores are of people who were trained on: only for a dataset with no other split."""
    batches: int = 8
    """Batches of the training's size."""

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"held_out.batches must be at least 1, got {self.batches}")


# --- draws ------------------------------------------------------------------------------------------------------

Frame = tuple[int, int]
"""Number of a track in its :class:`Reader`, and of a frame in the track."""


def generator(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    """Random numbers of one sample: a counter's hash of (seed, number, stream), so it costs nothing to start anywhere."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, stream], key=[seed, number]))


def require_size(reader: Reader, size: int) -> None:
    """Raise :class:`DatasetError` where windows would have to be enlarged."""
    if reader.window < size:
        raise DatasetError(
            f"{reader.dataset}: windows are {reader.window} px, too small for samples.output_size {size}"
        )


# --- pictures ---------------------------------------------------------------------------------------------------

REDUCED = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""Flags without a colour order of their own; libjpeg then inverts a smaller DCT, which takes a sixth less time and differs from
the mean over squares by half a grey level."""


def decode(jpeg: bytes, window: int, size: int, key: str) -> Image:
    """A picture (size, size, 3), RGB, of a JPEG of ``window`` pixels. Raises :class:`DatasetError` naming ``key``.

    cv2, Pillow and torchvision were measured: cv2 and torchvision take the same time (both libjpeg-turbo), Pillow half as
    much again, and cv2's releases the GIL and reads RGB at once.
    """
    factor = next((f for f in (8, 4, 2) if window == f * size), 1)
    flags = REDUCED.get(factor, 0) | cv2.IMREAD_COLOR_RGB
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flags) if jpeg else None
    side = window // factor
    if image is None or image.shape != (side, side, 3):
        raise DatasetError(f"{key}: not a JPEG of {window} x {window} pixels")
    return reduce(image, size)


def reduce(image: Any, size: int) -> Image:
    """A picture (h, w, 3) at (size, size, 3), smaller or the same; every pixel counts."""
    if image.shape[:2] == (size, size):
        return cast(Image, image)
    return cast(Image, cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))


def decode_labels(png: bytes, window: int, size: int, key: str) -> NDArray[np.uint8]:
    """Labels (size, size) of a PNG of ``window`` pixels. Raises :class:`DatasetError` naming ``key`` and what is wrong."""
    try:
        labels = annotate.decode_labels(png)
    except ValueError as error:
        raise DatasetError(f"{key}: {error}") from None
    if labels.shape != (window, window):
        raise DatasetError(
            f"{key}: its labels are {labels.shape[1]} x {labels.shape[0]} pixels, its picture {window} x {window}"
        )
    resized = cv2.resize(labels, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    return cast(NDArray[np.uint8], resized)


def inside_frame(matrix: Floats, frame_size: tuple[int, int], size: int) -> NDArray[np.bool_]:
    """Which pixels (size, size) of a window show a part of the frame.

    Args:
        matrix: 2x3, frame → window of ``size`` pixels.
        frame_size: (width, height).
        size: of the window.
    """
    back = invert(matrix)
    centres = np.arange(size) + 0.5
    inside = np.ones((size, size), bool)
    for row, limit in zip(back, frame_size, strict=True):
        place = row[0] * centres[None, :] + (row[1] * centres[:, None] + row[2])
        inside &= (place >= 0) & (place <= limit)
    return inside


def valid_mask(
    record: bytes, matrices: bytes, frame: int, window: int, size: int
) -> NDArray[np.bool_]:
    """Where a window shows its frame, at (size, size).

    Args:
        record: ``KEY.json`` of its track.
        matrices: ``KEY.matrix.npy``, for windows of ``window`` pixels.
        frame: its place in the track.
        window: side of the dataset's windows.
        size: of the mask.
    """
    told = json.loads(record)
    scaled = npy_array(matrices)[frame].astype(np.float64) * (size / window)
    return inside_frame(scaled, (told["width"], told["height"]), size)


def pictures(images: Sequence[Image]) -> Tensor:
    """uint8 RGB (h, w, 3) each, to float (n, 3, h, w) in [-1, 1]: the one place where training converts."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


# --- streams ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Which samples of a global batch are one rank's."""

    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"samples.batch_size {self.batch_size} cannot be divided among {self.world_size} workers"
            )

    def of(self, first: int) -> range:
        """Of the global batch that begins at sample ``first``."""
        size = self.batch_size // self.world_size
        return range(first + self.rank * size, first + (self.rank + 1) * size)


class Samples(Protocol[Wanted, Batch]):
    """A dataset in the sense of torch's ``DataLoader`` that makes whole batches."""

    @property
    def config(self) -> StreamConfig: ...

    def __getitems__(self, wanted: Sequence[Wanted]) -> Batch | DatasetError:
        """The batch. An error is returned, so that it crosses a process as one line and not as a traceback."""
        ...


def load(samples: Samples[Wanted, Batch], wanted: Iterator[Sequence[Wanted]]) -> Iterator[Batch]:
    """Batches in order, made ahead by the loader's processes.

    Args:
        samples: what makes the batches.
        wanted: for each batch what ``samples`` is asked for.

    Raises:
        DatasetError: that ``samples`` answered with instead of a batch.
    """
    config = samples.config
    if config.loaders:
        # OpenCV's pool of threads does not survive a fork: the child hung, or crashed, as soon as it set their number.
        # Here the pool ends in good order; the loaders inherit that there is none. torch sees to its own threads.
        cv2.setNumThreads(1)
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=wanted,  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=config.loaders,
        prefetch_factor=config.prefetch if config.loaders else None,
        # A fork shares the index, and has torch already: a fresh process would need 4 s and 0.6 GB to import it.
        multiprocessing_context="fork" if config.loaders else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader takes a number from the training's own
    )
    for batch in loader:
        if isinstance(batch, DatasetError):
            raise batch
        yield batch


def _same(batch: Any) -> Any:
    """In place of torch's collation: ``__getitems__`` has made the batch."""
    return batch
