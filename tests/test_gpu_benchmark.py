"""What is measured on a GPU runs, at the size of a toy and on a CPU, where nothing but torch, numpy and OpenCV can be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.material import REPOSITORY

CODE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"ray", "mlflow", "scipy", "skimage", "tyro", "rich", "pyarrow", "av", "dlib", "psutil", "pipelines", "jobs", "tests", "numba"}:
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from benchmarks.gpu import PARTS, table
rows = {}
for name, (title, part, limit) in PARTS.items():
    if name != "fan":  # seconds a face
        rows[name] = list(part(torch.device("cpu"), True))
        table(rows[name])
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_every_part_runs_without_what_a_bare_machine_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert all(row["within 1e-4"] for row in rows["check"])
    assert {row["back-end"] for row in rows["exemplar"]} == {"dense", "blocks", "chunked"}
    assert all(row["off by"] < 1e-4 for row in rows["exemplar"] if row["off by"] == row["off by"])
    assert {row["setting"] for row in rows["animate"]} == {"fp32", "bf16", "bf16, channels_last"}
    for name in ("aligner", "blender", "motion"):
        assert [row["variant"] for row in rows[name]] == [
            "fp32",
            "+ bf16",
            "+ channels_last",
            "+ fused",
        ]
        assert all(row["peak MiB"] > 1 for row in rows[name])
    assert rows["swap"][-1]["network"] == "a frame, parsed twice"
