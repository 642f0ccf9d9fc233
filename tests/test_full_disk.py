"""An output that is full or cannot be written: one clear line, and the same command finishes once it can."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import demo
from tests.runs import ledger, run_job

pytestmark = pytest.mark.slow

CLIPS = tuple(
    replace(clip, seconds=2.4)
    for clip in demo.CORPUS
    if clip.video in ("astronautA1", "mirroredB_2")
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with their list."""
    folder = tmp_path_factory.mktemp("corpus")
    demo.make_corpus(folder, CLIPS)
    return folder


@pytest.fixture(scope="module")
def flags(corpus: Path) -> Iterator[list[str]]:
    """Of the job, less the output."""
    with demo.serve(corpus / "videos") as url:
        yield [
            f"--input={corpus / 'list'}",
            f"--download.url-template={url}/{{video}}.mp4",
            "--identities.min-twin-cosine=1",  # all its people are one portrait
            "--crops.min-frames=5",
            "--tracks.min-frames=5",
        ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB; ``mount -o remount,size=`` makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_full_disk_is_said_in_one_line_and_a_rerun_completes(
    flags: list[str], small_disk: Path, tmp_path: Path
) -> None:
    output = small_disk / "out"
    code, text = run_job("preprocess", *flags, f"--output={output}", folder=tmp_path)
    assert code == 2, text
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"error: {output}/"), last
    assert last.endswith("no space left on the device; make room and run the same command again")
    assert not (output / "dataset.json").exists()

    enlarge = ["mount", "-o", "remount,size=200m", str(small_disk)]
    subprocess.run(enlarge, check=True)
    code, text = run_job("preprocess", *flags, f"--output={output}", folder=tmp_path)
    assert code == 0, text
    states = [row["state"] for row in ledger(output).values() if row["kind"] == "video"]
    assert states == ["published"] * 2


def test_output_that_cannot_be_written_is_said_before_anything_starts(
    flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    for output in (tmp_path / "file" / "out", Path("/proc/headray")):
        code, text = run_job("preprocess", *flags, f"--output={output}", folder=tmp_path)
        assert code == 2, text
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert str(output) in line
        assert "Traceback" not in text
