"""Windows of the real clips as the Blender takes them: picture, labels of the ``geometric`` parser, landmarks."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
import torch

from models.blender.pairs import Frame
from models.frozen.detector import Detector, load_detector
from models.frozen.landmarks import Landmarker, load_landmarker
from models.frozen.parsing import Parser, load_parser
from pipelines.annotate import frame_mask
from pipelines.geometry import heser_window, transform, warp
from tests.material import SHARED

CUT = 512
"""Side at which windows are cut and labelled before they are made smaller."""


class Window(NamedTuple):
    """One moment of a clip."""

    frame: Frame
    landmarks: torch.Tensor
    """(68, 2) pixels of the window."""


@cache
def tools() -> tuple[Detector, Landmarker, Parser]:
    """What finds, measures and labels a face; loading takes longer than using."""
    return load_detector("dlib", 100), load_landmarker("dlib"), load_parser("geometric")


@cache
def cut(clip: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Picture (512, 512, 3), labels, what is inside the frame, and landmarks of one frame of a clip."""
    video = cv2.VideoCapture(str(SHARED / "videos" / f"{clip}.mp4"))
    video.set(cv2.CAP_PROP_POS_FRAMES, index)
    found, picture = video.read()
    assert found, (clip, index)
    image = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    detector, landmarker, parser = tools()
    landmarks = landmarker.locate(image, detector.detect(image)[:1, :4])[0]
    matrix = heser_window(landmarks, CUT)
    crop = warp(image, matrix, (CUT, CUT))
    inside = frame_mask(matrix, image.shape[1::-1], CUT)
    points = transform(matrix, landmarks)
    return crop, parser.parse([crop], points[None], [inside])[0], inside, points


def window(clip: str, index: int, size: int) -> Window:
    """The same as tensors of one size."""
    crop, labels, inside, points = cut(clip, index)
    picture = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    small = [
        cv2.resize(x.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)
        for x in (labels, inside)
    ]
    frame = Frame(
        torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1,
        torch.from_numpy(small[0])[None],
        torch.from_numpy(small[1])[None].float(),
    )
    return Window(frame, torch.from_numpy(points * size / CUT).float())
