"""Face detectors behind one method, with boxes brought to one convention.

Every detector was trained on somebody's idea of a face box: dlib's are squares from the brows to the chin, those in the
manner of WIDER FACE (YuNet, RetinaFace, S3FD) are upright rectangles from the forehead to the chin. All that leaves this
file is the *tight box*, dlib's square, because the landmark predictor was trained on it and rules about overlap need
one meaning. The corrections are medians measured against the HOG detector on 117 faces of 11 clips and 18 photos
(overlap with the HOG box 0.70 before, 0.82 after; HOG boxes themselves step by 8 to 20 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.weights import find

Image = NDArray[np.uint8]
DetectorName = Literal["dlib", "yunet", "sfd", "retinaface"]


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
RETINAFACE_FIT = BoxFit(side=0.913, down=0.068)
