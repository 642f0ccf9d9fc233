"""The picture of a preview: names above columns, columns below."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.blender.learner import PREVIEW_COLUMNS
from pipelines.journal import picture


@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_name_is_read_whole_within_its_own_column(width: int) -> None:
    preview = torch.rand(2, 3, width, width * len(PREVIEW_COLUMNS)) * 2 - 1
    drawn = picture(preview, PREVIEW_COLUMNS)
    assert drawn.shape == (20 + 2 * width, width * len(PREVIEW_COLUMNS), 3)
    wanted = ((preview + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(drawn[20:], np.concatenate(list(wanted)))
    for head in np.split(drawn[:20], len(PREVIEW_COLUMNS), axis=1):
        assert (head < 128).any(), "there is a name"
        assert (head[:, [0, -1]] == 255).all(), "which nothing cuts"


def test_columns_too_narrow_for_a_name_have_none() -> None:
    assert picture(torch.zeros(1, 3, 32, 64), ("a", "b")).shape == (32, 64, 3)
