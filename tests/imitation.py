"""How well a motion model follows a driver: held-out frames, against what the source itself would get had nothing moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models.frozen.detector import load_detector
from models.frozen.landmarks import load_landmarker
from models.motion.batch import MotionBatch
from models.motion.network import Motion
from pipelines.geometry import box_sizes

SIDE = 256
"""Pixels of the pictures in which faces are looked for: the distances' unit."""
Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """Means over pairs: of the generated frame, and of the source, to the driving frame."""

    pairs: int
    l1: float
    """In [0, 1]."""
    l1_source: float
    l1_unmoved: float
    """Of the frame that is generated for the source's own landmarks: what the model makes without being moved."""
    landmarks: float = float("nan")
    """Mean absolute difference of a coordinate, pixels of 256, over pairs with a face in all three pictures."""
    landmarks_source: float = float("nan")
    missed: int = 0
    """Generated pictures in which the detector finds no face where it does in the driving frame."""

    @property
    def gain(self) -> float:
        """Share of the pixels' distance that is gone."""
        return 1 - self.l1 / self.l1_source

    @property
    def moved(self) -> float:
        """Share of the pixels' distance that is gone because landmarks moved, whatever the pictures are like."""
        return 1 - self.l1 / self.l1_unmoved

    @property
    def landmark_gain(self) -> float:
        """Share of the landmarks' distance that is gone."""
        return 1 - self.landmarks / self.landmarks_source


class Finder:
    """The points of the largest face of a picture, found without being told where it is."""

    def __init__(self) -> None:
        self._detector = load_detector("dlib", SIDE / 5)
        self._landmarker = load_landmarker("dlib")

    def __call__(self, tensor: torch.Tensor) -> NDArray[np.float64] | None:
        """(68, 2) pixels of 256, of a picture (3, s, s) in [-1, 1]; None without a face."""
        small = ((tensor.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        image = cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        boxes = self._detector.detect(image)[:, :4]
        if not len(boxes):
            return None
        largest = boxes[int(np.prod(box_sizes(boxes), axis=1).argmax())]
        return self._landmarker.locate(image, largest[None])[0].astype(np.float64)


@torch.inference_mode()
def measure(
    model: Motion, batches: Iterable[MotionBatch], *, with_landmarks: bool = True
) -> Imitation:
    """Over all pairs of the batches.

    Args:
        model: in eval mode, on the CPU.
        batches: held-out.
        with_landmarks: also look for faces, 0.1 s a picture.
    """
    pixels, faces, missed = [], [], 0
    find = Finder() if with_landmarks else None
    for batch in batches:
        made, _ = model(batch.source, batch.source_landmarks, batch.driving_landmarks)
        still, _ = model(batch.source, batch.source_landmarks, batch.source_landmarks)
        pictures = zip(batch.source, batch.driving, made, still, strict=True)
        for source, driving, generated, unmoved in pictures:
            compared = (generated, source, unmoved)
            pixels.append([float((each - driving).abs().mean()) / 2 for each in compared])
            if find:
                wanted, own, first = find(driving), find(generated), find(source)
                missed += wanted is not None and own is None
                if wanted is not None and own is not None and first is not None:
                    faces.append([float(np.abs(each - wanted).mean()) for each in (own, first)])
    l1, l1_source, l1_unmoved = np.mean(pixels, axis=0).tolist()
    landmarks, landmarks_source = np.mean(faces, axis=0).tolist() if faces else [np.nan] * 2
    return Imitation(
        pairs=len(pixels),
        l1=l1,
        l1_source=l1_source,
        l1_unmoved=l1_unmoved,
        landmarks=landmarks,
        landmarks_source=landmarks_source,
        missed=missed,
    )
