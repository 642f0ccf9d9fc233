"""Who is it: a unit vector per face, compared by cosine.

``dlib`` is dlib's ResNet descriptor, whose weights come in a wheel; ``arcface`` is IR-SE-50 trained with ArcFace's loss (Deng
et al. 2019), ``mobilefacenet`` a small network of the same kind; these two have a gradient. All take crops of any size with
their 68 landmarks and cut their own small, aligned picture (*chip*) from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.frozen.chips import fit_similarity, warp
from models.frozen.together import Together
from models.frozen.weights import find

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]
EmbedderName = Literal["dlib", "mobilefacenet", "arcface"]
WEIGHTS: dict[EmbedderName, tuple[str, ...]] = {
    "dlib": ("dlib_descriptor",),
    "mobilefacenet": ("mobilefacenet",),
    "arcface": ("ir_se50",),
}
"""Entries of ``models.frozen.weights`` that each embedder loads."""

DLIB_CHIP, DLIB_PADDING = 150, 0.25
"""Side in pixels and padding of dlib's chips, as its descriptor was trained."""
MOBILEFACENET_CHIP = (96, 112)
"""(width, height)"""
FIVE_POINTS = np.array(
    [
        [30.2946, 51.6963],
        [65.5318, 51.5014],
        [48.0252, 71.7366],
        [33.5493, 92.3655],
        [62.7299, 92.2041],
    ]
)
"""Eyes, nose tip and mouth corners of a 96 x 112 chip (SphereFace), pixel centres at integers."""
BATCH = 8
"""Faces in one forward pass; for torch it is filled up, so that a vector never depends on its neighbours."""


class Embedder(Protocol):
    """Turns faces into unit vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    @property
    def same_person(self) -> float:
        """Cosine from which two single frames of one identity are believed to show the same person."""
        ...

    def embed(self, crops: Sequence[Image], landmarks: NDArray[np.floating]) -> NDArray[np.float32]:
        """RGB crops (h, w, 3) and their landmarks (n, 68, 2) in crop pixels to unit rows (n, dimension)."""
        ...


def load_embedder(name: EmbedderName, *, random_init: bool = False) -> Embedder:
    """Build an embedder with its weights.

    Args:
        name: ``dlib``, ``mobilefacenet`` or ``arcface``.
        random_init: ``arcface`` only, for tests of speed and shape where its weights cannot be had.

    Raises:
        WeightsError: a weights file is missing or wrong.
    """
    if random_init and name != "arcface":
        raise ValueError(f"embedder {name!r} has real weights, random_init is for arcface only")
    match name:
        case "dlib":
            return DlibEmbedder()
        case "mobilefacenet":
            return MobileFaceNetEmbedder()
        case "arcface":
            return ArcFaceEmbedder(random_init=random_init)
    raise ValueError(f"no embedder called {name!r}; known: {', '.join(WEIGHTS)}")


class DlibEmbedder:
    """dlib's ResNet descriptor, 128 numbers; about 75 ms a face on one core.

    Its vectors share a large mean, so cosines are high: on 1,392 pairs of frames of one person (8 people in 12 clips, 5 in
    18 photos) they were 0.940 to 0.999, median 0.980, and on 11,649 pairs of different people 0.733 to 0.926, median
    0.835. A vector does not depend on the batch it was computed in.
    """

    dimension = 128
    same_person = 0.933

    def __init__(self) -> None:
        import dlib

        self.dlib = dlib
        self.network = dlib.face_recognition_model_v1(str(find("dlib_descriptor")))

    def embed(self, crops: Sequence[Image], landmarks: NDArray[np.floating]) -> NDArray[np.float32]:
        """See :class:`Embedder`."""
        chips = [self._chip(*pair) for pair in zip(crops, landmarks, strict=True)]
        vectors: list[NDArray[np.float64]] = []
        for start in range(0, len(chips), BATCH):
            chunk = chips[start : start + BATCH]
            vectors.extend(np.array(v) for v in self.network.compute_face_descriptor(chunk))
        return _unit(vectors, self.dimension)

    def _chip(self, crop: Image, landmarks: NDArray[np.floating]) -> Image:
        # dlib counts pixel centres from 0; its chip uses the points only, not the box
        points = [self.dlib.point(*map(round, point.tolist())) for point in landmarks - 0.5]
        shape = self.dlib.full_object_detection(self.dlib.rectangle(0, 0, 0, 0), points)
        chip: Image = self.dlib.get_face_chip(
            np.ascontiguousarray(crop), shape, size=DLIB_CHIP, padding=DLIB_PADDING
        )
        return chip


class MobileFaceNetEmbedder:
    """MobileFaceNet on chips of 96 x 112 pixels, 128 numbers; about 5 ms a face on one core.

    On the pairs of :class:`DlibEmbedder`: one person 0.512 to 0.997, median 0.856; different people -0.289 to 0.376,
    median 0.026.
    """

    dimension = 128
    same_person = 0.44

    def __init__(self) -> None:
        from models.frozen.mobilefacenet import load_mobilefacenet

        self.network = load_mobilefacenet(find("mobilefacenet"))
        self.vectors = Together(partial(_batches, self._embedding, device="cpu"))

    def _embedding(self, x: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.network((x - 127.5) / 128)
        return embedding

    def embed(self, crops: Sequence[Image], landmarks: NDArray[np.floating]) -> NDArray[np.float32]:
        """See :class:`Embedder`."""
        chips = [mobilefacenet_chip(*pair) for pair in zip(crops, landmarks, strict=True)]
        return _unit(self.vectors(chips), self.dimension)


class ArcFaceEmbedder:
    """IR-SE-50 on chips of 112 x 112 pixels, 512 numbers; wants a GPU, about 0.2 s a face on one core.

    ``same_person`` was not measured, for want of the weights: it is between the 0.25 at which the authors of this network
    (TreB1eN/InsightFace_Pytorch, squared distance 1.5) and the 0.36 at which OpenCV tells people apart with its SFace. ``--identities.min-frame-cosine`` and ``min-video-cosine`` override it.
    """

    dimension = 512
    same_person = 0.3

    def __init__(self, *, random_init: bool = False) -> None:
        import torch

        from models.frozen.arcface import load_identity_network

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_identity_network("arcface", random_init=random_init)
        self.network = network.to(self.device)
        self.vectors = Together(partial(_batches, self._embedding, device=self.device))

    def _embedding(self, x: torch.Tensor) -> torch.Tensor:
        embedding: torch.Tensor = self.network.embedding(x / 127.5 - 1)
        return embedding

    def embed(self, crops: Sequence[Image], landmarks: NDArray[np.floating]) -> NDArray[np.float32]:
        """See :class:`Embedder`."""
        network = self.network
        height, width = network.size
        chips = [
            warp(crop, fit_similarity(five_points(points), network.points), (width, height))
            for crop, points in zip(crops, landmarks, strict=True)
        ]
        return _unit(self.vectors(chips), self.dimension)


def five_points(landmarks: NDArray[np.floating]) -> NDArray[np.floating]:
    """68 points (68, 2) to eye centres, nose tip and mouth corners (5, 2)."""
    eyes = landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0)
    return np.stack([*eyes, landmarks[30], landmarks[48], landmarks[54]])


def mobilefacenet_chip(crop: Image, landmarks: NDArray[np.floating]) -> Image:
    """The aligned picture (112, 96, 3) that MobileFaceNet is shown."""
    matrix = fit_similarity(five_points(landmarks), FIVE_POINTS + 0.5)
    return warp(crop, matrix, MOBILEFACENET_CHIP)


def _batches(
    embed: Callable[[torch.Tensor], torch.Tensor], chips: Sequence[Image], device: str
) -> list[NDArray[np.float64]]:
    """Vectors of RGB chips (h, w, 3), which the network is shown as float 0..255, (b, 3, h, w), in full batches."""
    import torch

    vectors: list[NDArray[np.float64]] = []
    for start in range(0, len(chips), BATCH):
        chunk = chips[start : start + BATCH]
        padded = np.zeros((BATCH, *chunk[0].shape), dtype=np.float32)
        padded[: len(chunk)] = chunk
        with torch.inference_mode():
            pictures = torch.from_numpy(padded).permute(0, 3, 1, 2).to(device)
            vectors.extend(embed(pictures)[: len(chunk)].double().cpu().numpy())
    return vectors


def _unit(vectors: Sequence[NDArray[np.float64]], dimension: int) -> NDArray[np.float32]:
    rows = np.array(vectors, dtype=np.float64).reshape(-1, dimension)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
