"""The studies run as commands, and refuse what they cannot read."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest

from models import bundle
from models.blender.network import Blender
from tests.material import REPOSITORY
from tests.models.blender.scenes import TINY, drawn


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "exemplar.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_studies_print_a_table_and_chunked_needs_least(tmp_path):
    labels = str(tmp_path / "labels.png")
    cv2.imwrite(labels, np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((128, 128), np.uint8)))  # fmt: skip
    done = run("memory", "--strides", "16", "--repeats", "1", "--labels", labels, labels)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| 16")]
    peaks = {row[1].strip(): float(row[3]) for row in rows}
    assert set(peaks) == {"dense", "blocks", "chunked"}
    assert peaks["chunked"] < peaks["dense"]


@pytest.mark.slow
def test_colour_pictures_are_no_label_maps(tmp_path):
    picture = str(tmp_path / "plot.png")
    cv2.imwrite(picture, np.zeros((512, 512, 3), np.uint8))
    done = run("warp", "--labels", picture, picture)
    assert done.returncode == 2
    assert "coloured picture" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_attention_is_that_of_a_bundle_at_its_size(tmp_path):
    labels, window = str(tmp_path / "labels.png"), str(tmp_path / "window.png")
    drawn_labels = drawn(0).labels[0].numpy()
    cv2.imwrite(labels, np.kron(drawn_labels, np.ones((16, 16), np.uint8)))
    cv2.imwrite(window, np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8))
    bundle.save(Blender(TINY), str(tmp_path / "b"), {}, np.zeros((8, 8, 3), np.uint8))
    done = run("attention", "--blender", str(tmp_path / "b"), "--windows", window, window, "--labels", labels, labels, "--output", str(tmp_path / "heat"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    shares = {name.strip(): float(share) for name, share in rows[1:]}
    assert set(shares) == {"skin", "l_eye", "nose", "hair", "ring"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert {path.stem for path in (tmp_path / "heat").glob("*.png")} == set(shares)
