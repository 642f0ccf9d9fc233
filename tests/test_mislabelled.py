"""The identity filter on real people: clips cut into many videos, one of each identity listed under a wrong name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.clips import encode
from tests.material import SHARED, needs_shared
from tests.runs import ledger, run_job

pytestmark = [pytest.mark.real, pytest.mark.slow, needs_shared]

RIGHT = {
    "m003": [("m003_a", 0), ("m003_a", 36), ("m003_a", 72), ("m003_b", 10)],
    "kitchen": [("kitchen_a", 0), ("kitchen_a", 100), ("kitchen_a", 200), ("kitchen_b", 150)],
    "phone": [("phone_a", 0), ("phone_a", 90), ("phone_a", 180), ("phone_a", 270)],
    "franck": [("franck_a", 0), ("franck_a", 100), ("franck_b", 0), ("franck_b", 100)],
}
"""Clip and first frame of the videos of each identity."""
WRONG = {
    "m003": ("franck_a", 200),
    "franck": ("phone_a", 135),
    "phone": ("kitchen_a", 150),
    "kitchen": ("w036_a", 20),
}
"""What is listed under each identity but shows another."""
ALIAS = [("kitchen_b", 50), ("kitchen_b", 110)]
"""Videos of kitchen under another name."""
SECONDS = 1.2
HALVED = ("m003", "w036", "kitchen")
"""Large clips are halved, for time."""


def cut(clip: str, first: int, path: Path) -> None:
    """``SECONDS`` of a real clip as a video of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(SHARED / "videos" / f"{clip}.mp4")) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None

        def pictures() -> Iterator[NDArray[np.uint8]]:
            frames = container.decode(video=0)
            for frame in islice(frames, first, first + round(SECONDS * rate)):
                picture = frame.to_ndarray(format="rgb24")
                if clip.startswith(HALVED):
                    half = (picture.shape[1] // 2, picture.shape[0] // 2)
                    picture = cv2.resize(picture, half, interpolation=cv2.INTER_AREA)
                yield picture

        encode(path, pictures(), fps=rate)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDENTITY/VIDEO.mp4."""
    folder = tmp_path_factory.mktemp("videos")
    for identity, pieces in RIGHT.items():
        for number, (clip, first) in enumerate(pieces):
            cut(clip, first, folder / identity / f"right{number}.mp4")
        cut(*WRONG[identity], folder / identity / "wrong.mp4")
    for number, (clip, first) in enumerate(ALIAS):
        cut(clip, first, folder / "alias" / f"alias{number}.mp4")
    # and one of these files under a second name, byte for byte
    (folder / "double").mkdir()
    (folder / "double" / "again.mp4").write_bytes((folder / "phone" / "right0.mp4").read_bytes())
    return folder


@pytest.fixture(
    scope="module", params=["dlib", pytest.param("mobilefacenet", marks=pytest.mark.soak)]
)
def dataset(
    videos: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Made with either embedder; gates that are about length and stillness are lowered, since the pieces are short."""
    folder = tmp_path_factory.mktemp("run")
    code, text = run_job(
        "preprocess",
        f"--input={videos}",
        f"--output={folder / 'out'}",
        f"--identities.embedder={request.param}",
        "--identities.min-track-frames=5",
        "--identities.min-identity-frames=5",
        "--identities.test-share=0.5",
        "--tracks.min-frames=5",
        "--crops.min-frames=5",
        "--quality.min-frames=5",
        "--quality.min-clip-change=4",
        folder=folder,
        extra={"HEADRAY_WEIGHTS": str(SHARED / "weights")},
    )
    assert code == 0, text
    return folder / "out"


def tracks(dataset: Path) -> dict[str, dict[str, Any]]:
    """Rows of the ledger's tracks by ``identity/video``."""
    rows = ledger(dataset).values()
    return {f"{row['identity']}/{row['video']}": row for row in rows if row["kind"] == "track"}


def test_every_wrong_video_is_found_and_every_right_one_stays(dataset: Path) -> None:
    found = tracks(dataset)
    assert len(found) == sum(map(len, RIGHT.values())) + len(WRONG) + len(ALIAS) + 1
    gone = {name: row["cause"] for name, row in found.items() if row["state"] != "published"}
    assert gone == {f"{identity}/wrong": "disagrees" for identity in WRONG}


def test_one_person_and_one_video_under_two_names_are_on_one_side(dataset: Path) -> None:
    published = [row for row in tracks(dataset).values() if row["state"] == "published"]
    splits = {row["identity"]: row["split"] for row in published}
    assert splits["alias"] == splits["kitchen"]
    assert splits["double"] == splits["phone"]
    manifest = json.loads((dataset / "dataset.json").read_text())
    assert {(one, other) for one, other, _ in manifest["twins"]} == {
        ("alias", "kitchen"),
        ("double", "phone"),
    }
