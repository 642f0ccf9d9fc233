"""What a run writes down goes on where the run before ended; the picture of a preview: names above columns, columns below."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import bundle
from models.blender.learner import PREVIEW_COLUMNS
from pipelines import checkpoints, health
from pipelines.journal import PROGRESS, Journal, picture
from tests.pipelines.test_training import LEARNER, SHORT, toy_training
from tests.toy_learner import ToyLearner


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


def test_what_was_recorded_is_in_the_checkpoint_and_the_next_run_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest records of a history, the time of all runs, the last value of every metric, and no speed as a score."""
    monkeypatch.setattr(health, "REMEMBERED", 5)
    learner = ToyLearner(LEARNER, wrap=lambda network: network, device=torch.device("cpu"))
    notes: dict[str, object] = {"seconds": 1000.0, "values": {"eval/old": 0.25}}
    for run in range(2):
        journal = Journal(toy_training(tmp_path), notes, 8 * run)
        for step in range(4 * run, 4 * run + 4):
            journal.write(
                step, {"loss/all": 10.0 - step, "speed/samples_per_second": 5.0}, {}, None, ()
            )
        journal.checkpoint(learner, step)
        notes = checkpoints.read(checkpoints.newest(str(tmp_path)))["notes"]
    assert [record["samples"] for record in notes["history"]] == [3, 4, 5, 6, 7]
    assert 1000 < notes["seconds"] < 2000
    assert notes["values"] == {"eval/old": 0.25, "loss/all": 3.0, "speed/samples_per_second": 5.0}
    journal.export(learner, 7)
    progress = json.loads((tmp_path / PROGRESS).read_text())
    assert (progress["samples_seen"], progress["samples"]) == (7, SHORT.samples)
    card = bundle.read_card(str(tmp_path / "bundle"))
    assert card["scores"] == {"eval/old": 0.25, "loss/all": 3.0}
