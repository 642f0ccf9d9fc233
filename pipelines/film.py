"""A held-out clip as a learner sees it: successive frames of its preview as a video, for models of motion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.journal import picture
from pipelines.samples import HeldOutConfig
from pipelines.samples_motion import MotionSamplesConfig, open_held_out, successive
from pipelines.training import Learner
from pipelines.video import encode

FRAMES = 48
RATE = Fraction(25)
CRF = 20


def film(
    config: MotionSamplesConfig,
    held_out: HeldOutConfig,
    dataset: str,
    *,
    learner: Learner[Any],
    device: torch.device,
) -> bytes:
    """An mp4 of the preview's columns over two seconds of a clip that is not trained on.

    Args:
        config: of the samples.
        held_out: whose clip.
        dataset: folder or URI.
        learner: as it is now.
        device: where it is.
    """
    samples = open_held_out(config, held_out, dataset)

    def rows() -> Iterator[NDArray[np.uint8]]:
        for batch in successive(samples, FRAMES):
            for row in learner.preview(batch.to(device)).cpu():
                yield picture(row[None], learner.preview_columns)

    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        made = Path(folder, "film.mp4")
        encode(made, rows(), RATE, CRF)
        return made.read_bytes()
