"""Face detectors behind one method, with boxes brought to one convention.

Every detector was trained on somebody's idea of a face box: dlib's are squares from the brows to the chin, those in the
manner of WIDER FACE (YuNet, RetinaFace, S3FD) are upright rectangles from the forehead to the chin. All that leaves this
file is the *tight box*, dlib's square, because the landmark predictor was trained on it and rules about overlap need
one meaning. The corrections are medians measured against the HOG detector on 117 faces of 11 clips and 18 photos: the
overlap of WIDER FACE boxes with HOG's rose from 0.70 to 0.82. It cannot come closer to 1, because HOG boxes themselves
step by 10 % in place and 20 % in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.weights import find

Image = NDArray[np.uint8]
DetectorName = Literal["dlib", "yunet", "sfd", "retinaface"]
WEIGHTS: dict[DetectorName, tuple[str, ...]] = {
    "dlib": ("dlib_mmod",),
    "yunet": ("yunet",),
    "sfd": ("sfd",),
    "retinaface": ("retinaface",),
}
"""Entries of ``models.frozen.weights`` that each detector loads."""


class Detector(Protocol):
    """Finds faces in one image."""

    def detect(self, image: Image) -> NDArray[np.float32]:
        """Faces of an RGB image (h, w, 3): (m, 5) left, top, right, bottom, score; tight boxes, best score first.

        Scores mean what the detector means by them (HOG margin, probability) and are above its own threshold.
        """
        ...


@dataclass(frozen=True)
class BoxFit:
    """How a detector's boxes relate to the tight box, in units of sqrt(width x height) of its own box."""

    side: float
    """Side of the tight box."""
    down: float
    """How far the tight box's centre lies below the detector's."""

    def tight(self, boxes: NDArray[np.floating]) -> NDArray[np.float32]:
        """Detector boxes (m, 4+) to tight boxes; further columns are kept."""
        boxes = np.asarray(boxes, dtype=np.float64)
        unit = np.sqrt(np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1, keepdims=True))
        centres = (boxes[:, :2] + boxes[:, 2:4]) / 2 + [[0.0, self.down]] * unit
        half = unit * self.side / 2
        return np.hstack([centres - half, centres + half, boxes[:, 4:]]).astype(np.float32)


MMOD_FIT = BoxFit(side=1.087, down=0.080)
YUNET_FIT = BoxFit(side=0.896, down=0.076)
WIDER_FIT = BoxFit(side=0.913, down=0.068)
"""RetinaFace, measured. Also S3FD, which learned from the same annotation: the size of its boxes that latent pose
reenactment implies (1.31 times the landmarks' hull) is within 2 % of this."""

HOG_FACE, HOG_THRESHOLD = 72, 0.0
"""Smallest tight box the HOG detector finds, px; score from which it is believed. At 0 it found all 106 faces of 70 px
and more on 120 pictures without one false face; the first false one scores -0.47."""
MMOD_FACE, MMOD_THRESHOLD = 86, 0.8
MMOD_PIXELS = 100_000
"""The CNN detector takes about 7 µs a pixel, 50 times what HOG takes; larger images are shrunk to this."""
YUNET_FACE, YUNET_THRESHOLD, YUNET_OVERLAP = 32, 0.8, 0.3
WIDER_FACE, WIDER_THRESHOLD = 32, 0.9


def load_detector(name: DetectorName, min_face: float, *, random_init: bool = False) -> Detector:
    """Build a detector with its weights.

    Args:
        name: ``dlib`` (weights in a wheel; HOG, then a CNN where HOG finds nothing), ``yunet``, ``sfd``, ``retinaface``.
        min_face: side in pixels of the smallest tight box worth finding. Images are shrunk or enlarged so that such
            a face just suffices, which also decides the speed; faces up to 10 times as large are found.
        random_init: ``sfd`` only, for tests where its weights cannot be had.

    Raises:
        WeightsError: a weights file is missing or wrong.
    """
    if not min_face > 0:
        raise ValueError(f"min_face must be positive, got {min_face}")
    if random_init and name != "sfd":
        raise ValueError(f"detector {name!r} has real weights, random_init is for sfd only")
    match name:
        case "dlib":
            return DlibDetector(min_face)
        case "yunet":
            return YunetDetector(min_face)
        case "retinaface":
            return RetinaFaceDetector(min_face)
        case "sfd":
            return SfdDetector(min_face, random_init=random_init)
    raise ValueError(f"no detector called {name!r}; known: dlib, yunet, sfd, retinaface")


class DlibDetector:
    """dlib's HOG detector for faces that look about into the camera, its CNN detector where that finds nothing."""

    def __init__(self, min_face: float) -> None:
        import dlib

        self.min_face = min_face
        self.hog = dlib.get_frontal_face_detector()
        self.mmod = dlib.cnn_face_detection_model_v1(str(find("dlib_mmod")))

    def detect(self, image: Image) -> NDArray[np.float32]:
        """See :class:`Detector`. Scores: the HOG margin, or the CNN's confidence (about 1)."""
        faces = self.detect_hog(image)
        return faces if len(faces) else self.detect_mmod(image)

    def detect_hog(self, image: Image) -> NDArray[np.float32]:
        """HOG alone: 7 ms for 400 x 225 pixels."""
        scaled, factors = _resized(image, HOG_FACE / self.min_face)
        boxes, scores, _ = self.hog.run(scaled, 0, HOG_THRESHOLD)
        rows = [(*_corners(box), score) for box, score in zip(boxes, scores, strict=True)]
        return _sorted(_rows(rows) / factors)

    def detect_mmod(self, image: Image) -> NDArray[np.float32]:
        """The CNN alone: also profiles and tilted heads; about 0.5 s for 400 x 225 pixels."""
        pixels = image.shape[0] * image.shape[1]
        scale = min(MMOD_FACE / self.min_face, np.sqrt(MMOD_PIXELS / pixels))
        scaled, factors = _resized(image, scale)
        rows = [(*_corners(face.rect), face.confidence) for face in self.mmod(scaled, 0)]
        found = _rows([row for row in rows if row[4] >= MMOD_THRESHOLD])
        return _sorted(MMOD_FIT.tight(found / factors))


class YunetDetector:
    """YuNet through OpenCV: about 20 ms for 1000 x 560 pixels on one core."""

    def __init__(self, min_face: float) -> None:
        self.min_face = min_face
        self.network = cv2.FaceDetectorYN.create(
            str(find("yunet")), "", (320, 320), YUNET_THRESHOLD, YUNET_OVERLAP
        )

    def detect(self, image: Image) -> NDArray[np.float32]:
        """See :class:`Detector`. Scores: probability."""
        scaled, factors = _resized(image, YUNET_FACE / self.min_face)
        self.network.setInputSize((scaled.shape[1], scaled.shape[0]))
        _, faces = self.network.detect(cv2.cvtColor(scaled, cv2.COLOR_RGB2BGR))
        if faces is None:
            return _rows([])
        boxes = np.hstack([faces[:, :2], faces[:, :2] + faces[:, 2:4], faces[:, 14:15]])
        return _sorted(YUNET_FIT.tight(boxes / factors))


class RetinaFaceDetector:
    """RetinaFace (MobileNet-0.25) of face-alignment."""

    def __init__(self, min_face: float) -> None:
        from face_alignment.detection.retinaface import FaceDetector

        self.min_face = min_face
        self.network = FaceDetector(
            _device(), str(find("retinaface")), confidence_threshold=WIDER_THRESHOLD
        )

    def detect(self, image: Image) -> NDArray[np.float32]:
        """See :class:`Detector`. Scores: probability.

        The network is given BGR, as it was trained; face-alignment 1.5 hands it RGB, with which the lowest score over
        117 faces falls from 0.975 to nothing found.
        """
        scaled, factors = _resized(image, WIDER_FACE / self.min_face)
        found = _rows(self.network.detect_from_image(cv2.cvtColor(scaled, cv2.COLOR_RGB2BGR)))
        return _sorted(WIDER_FIT.tight(found / factors))


class SfdDetector:
    """S3FD of face-alignment, the detector its landmark network grew up with. Wants a GPU."""

    def __init__(self, min_face: float, *, random_init: bool = False) -> None:
        from face_alignment.detection.sfd import FaceDetector

        self.min_face = min_face
        if random_init:
            import torch
            from face_alignment.detection.sfd.net_s3fd import s3fd

            with TemporaryDirectory() as folder:
                path = Path(folder) / "random.pth"
                torch.save(s3fd().state_dict(), path)
                self.network = FaceDetector(_device(), str(path), filter_threshold=WIDER_THRESHOLD)
        else:
            self.network = FaceDetector(
                _device(), str(find("sfd")), filter_threshold=WIDER_THRESHOLD
            )

    def detect(self, image: Image) -> NDArray[np.float32]:
        """See :class:`Detector`. Scores: probability."""
        scaled, factors = _resized(image, WIDER_FACE / self.min_face)
        found = _rows(list(self.network.detect_from_image(scaled)))
        return _sorted(WIDER_FIT.tight(found / factors))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resized(image: Image, scale: float) -> tuple[Image, NDArray[np.float64]]:
    """The image at about ``scale``, and what rows (box, score) found in it are divided by."""
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    x, y = size[0] / width, size[1] / height
    if size == (width, height):
        resized = np.ascontiguousarray(image)
    else:
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        resized = np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)
    return resized, np.array([x, y, x, y, 1.0])


def _corners(rectangle: Any) -> tuple[int, int, int, int]:
    """A dlib rectangle, whose right and bottom are inclusive."""
    return rectangle.left(), rectangle.top(), rectangle.right() + 1, rectangle.bottom() + 1


def _rows(rows: Sequence[Any]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 5)


def _sorted(faces: NDArray[np.floating]) -> NDArray[np.float32]:
    return faces[np.argsort(-faces[:, 4], kind="stable")].astype(np.float32)
