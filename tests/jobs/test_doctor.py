"""The doctor, as a user calls it: one line for each thing tried, and an end that says whether to begin."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from jobs import demo, doctor, preprocess, train_aligner
from models.frozen import arcface, vgg
from pipelines import preflight
from pipelines.annotate import weight_names as of_annotate
from pipelines.crops import weight_names as of_crops
from pipelines.identities import weight_names as of_identities
from pipelines.tracks import weight_names as of_tracks
from tests.runs import run_job


def test_presets_try_the_weights_that_the_jobs_load() -> None:
    made = preprocess.PRESETS["voxceleb2"]
    wanted = {
        *of_tracks(made.tracks), *of_crops(made.crops), *of_identities(made.identities), *of_annotate(made.annotate),
    }  # fmt: skip
    assert set(doctor.PRESETS["preprocess"].weights) == wanted
    learner = train_aligner.PRESETS["base"].learner
    assert learner.vgg != "none"
    trained = {*arcface.WEIGHTS[learner.network.identity], *vgg.WEIGHTS[learner.vgg]}
    assert set(doctor.PRESETS["train"].weights) == trained
    assert doctor.PRESETS["train"].gpus == train_aligner.PRESETS["base"].cluster.num_workers


def lines(text: str) -> dict[str, str]:
    """What was tried → how its line begins."""
    found = re.findall(r"^(ok  |FAIL)  (?:.{24}) (\w[\w ]*?)  +", text, re.MULTILINE)
    return {what: state.strip() for state, what in found}


@pytest.mark.slow
def test_doctor_tells_what_is_well_and_what_is_not(tmp_path: Path) -> None:
    """The same machine twice: with all it needs, then with a site that says nothing, old cookies and no room."""
    demo.make_corpus(tmp_path, [clip for clip in demo.CORPUS if clip.video == "coffee-cup1"])
    with demo.serve(tmp_path / "videos") as url:
        common = [
            "preprocess", f"--output={tmp_path / 'out'}", "--download.canary=coffee-cup1",
        ]  # fmt: skip
        code, text = run_job(
            "doctor",
            *common,
            f"--download.url-template={url}/{{video}}.mp4",
            "--patience-seconds=90",
            "--ranks=2",
            "--min-disk-gb=0.001",
            folder=tmp_path,
        )
        assert code == 0, text
        told = lines(text)
        assert set(told.values()) == {"ok"}
        assert {*preflight.NODE_CHECKS, "canary", "clock", "gloo"} <= set(told), text
        assert "checks are well" in text
        assert list((tmp_path / "out" / "work").iterdir()) == []
        old = tmp_path / "cookies.txt"
        old.write_text(
            "# Netscape HTTP Cookie File\n.youtube.com\tTRUE\t/\tTRUE\t1000000000\tSID\thush5\n"
        )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        code, text = run_job(
            "doctor", *common, f"--download.url-template=http://127.0.0.1:{port}/{{video}}.mp4", "--min-disk-gb=1e9", "--gpus=1",
            "--weights", "dlib_landmarks", f"--download.cookies={old}", "--patience-seconds=5",
            folder=tmp_path,
        )  # fmt: skip
    assert code == 2, text
    bad = {what for what, state in lines(text).items() if state == "FAIL"}
    assert {"canary", "cookies", "disk"} <= bad
    assert "not fetched in 5 s" in text
    assert "hush5" not in text
    assert "Traceback" not in text
    assert re.search(r"^FAIL  cluster +1 GPUs +not there after 5 s", text, re.MULTILINE)
    assert re.search(r"^error: \d of \d+ checks failed", text, re.MULTILINE)
