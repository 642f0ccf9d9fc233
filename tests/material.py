"""Where tests find the real clips, photos, lists and weights that stand beside the checkout, and the one network from a wheel."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from models.frozen import weights

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "videos").is_dir(), reason=f"real test material not found at {SHARED}"
)

WHEEL = [
    "mediapipe==0.10.21",
    "--no-deps",
    "--retries=1",
    "--only-binary=:all:",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
]
"""What pip is asked for; the wheel is opened, never installed."""
IN_WHEEL = "mediapipe/modules/iris_landmark/iris_landmark.tflite"


def fetch_iris(folder: Path) -> Path:
    """A folder with the pupils' network: where it is on this machine, else ``folder``, into which it is taken out of its wheel.

    Skips the test if there is no package registry to ask.
    """
    entry = weights.REGISTRY["iris"]
    for known in (*weights.folders(), folder):
        if (known / entry.file).is_file():
            return known
    with (folder / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as aside:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / entry.file).is_file():
            return folder
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        try:
            subprocess.run(
                [*command, "--dest", aside, *WHEEL], check=True, timeout=300, capture_output=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            why = (error.stderr or b"").decode().strip().splitlines()
            pytest.skip(f"{entry.file} is nowhere here, and pip cannot fetch its wheel: {why[-1:]}")
        (wheel,) = Path(aside).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            (Path(aside) / entry.file).write_bytes(content.read(IN_WHEEL))
        (Path(aside) / entry.file).replace(folder / entry.file)
    return folder
