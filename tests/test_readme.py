"""The README's reading example, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import shards
from tests.datasets import CROP, made_video, make_dataset
from tests.material import REPOSITORY


def python_block(containing: str) -> str:
    """The one fenced Python block of the README that contains a word."""
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    found = [block for block in blocks if containing in block]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_two_frames_of_one_person_with_plain_webdataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(str(tmp_path), [made_video("id01", "v0"), made_video("id02", "v0", split="val")])
    code = python_block("webdataset").replace("DATASET = ", "_ = ")
    names: dict[str, Any] = {"DATASET": tmp_path}
    exec(compile(code, "README.md", "exec"), names)
    first, last = names["frames"][0], names["frames"][-1]
    for frame in (first, last):
        assert frame.shape == (CROP["size"], CROP["size"], 3)
        assert frame.dtype == np.uint8
    assert not np.array_equal(first, last)
    keys = shards.read_index(str(tmp_path))["key"].to_pylist()
    printed = capsys.readouterr().out
    assert keys
    assert all(key in printed for key in keys)
