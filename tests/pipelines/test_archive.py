"""Which file of an archive is which video."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.archive import Archive, ids_of, take_from
from pipelines.listing import ListError
from pipelines.schema import Cause, Video

YOUTUBE = "https://www.youtube.com/watch?v={}"


def put(root: Path, files: dict[str, int]) -> Archive:
    for name, size in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return Archive(str(root))


def video(name: str, url: str = "") -> Video:
    return Video(identity="id1", video=name, url=url or YOUTUBE.format(name))


@pytest.mark.parametrize(
    "name",
    [
        "21Uxsk56VDQ.mp4",
        "deep/er/21Uxsk56VDQ.WEBM",
        "A title [with brackets] [21Uxsk56VDQ].mkv",
        "A title-21Uxsk56VDQ.mp4",
        "21Uxsk56VDQ.f137.mp4",
        "A title [21Uxsk56VDQ].f248-1.webm",
        "id00012/21Uxsk56VDQ/whatever.mp4",
        "mp4/id00012/21Uxsk56VDQ/00001.mp4",
    ],
)
def test_a_file_is_found_by_its_id(name: str, tmp_path: Path) -> None:
    other = {"id00012/_____otherX/00001.mp4": 9, "21Uxsk56VDQ.info.json": 9, "21Uxsk56VDQ.m4a": 9}
    archive = put(tmp_path, other | {name: 5})
    taken = archive.take(video("21Uxsk56VDQ"))
    assert (taken.path, taken.live) == (str(tmp_path / name), True)
    assert taken.url == YOUTUBE.format("21Uxsk56VDQ"), "where it comes from stays on record"
    by_url = archive.take(video("table-row-7", YOUTUBE.format("21Uxsk56VDQ") + "&t=4"))
    assert by_url.path == taken.path
    short = archive.take(video("table-row-7", "https://youtu.be/21Uxsk56VDQ"))
    assert short.path == taken.path


def test_the_best_of_several(tmp_path: Path) -> None:
    archive = put(
        tmp_path,
        {
            "a/-dash_id-01.mp4": 3,
            "b/Title [-dash_id-01].mkv": 7,
            "c/-dash_id-01.f137.mp4": 6,
            "-dash_id-01/cut.mp4": 99,
        },
    )
    assert archive.take(video("-dash_id-01")).path.endswith("b/Title [-dash_id-01].mkv")


def test_cuts_of_a_video_are_not_the_video(tmp_path: Path) -> None:
    archive = put(tmp_path, {f"id1/21Uxsk56VDQ/0000{n}.mp4": 5 for n in (1, 2, 3)})
    refused = archive.take(video("21Uxsk56VDQ"))
    assert refused.cause == Cause.DOWNLOAD_NOT_FOUND.value
    assert "3 files in a folder 21Uxsk56VDQ, none named 21Uxsk56VDQ" in refused.detail


def test_only_videos_that_would_be_fetched_are_looked_up(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": 1, ".hidden/b.mp4": 1})
    own = Video(identity="id1", video="own", path="/elsewhere/own.mp4")
    given = [video("a"), video("b"), own]
    a, b, same = take_from(str(tmp_path), iter(given))
    assert a.path == str(tmp_path / "a.mp4")
    assert (b.cause, b.detail) == (
        Cause.DOWNLOAD_NOT_FOUND.value,
        f"{tmp_path} has no file named b",
    )
    assert same == own
    with pytest.raises(ListError, match="no such file or folder"):
        take_from(str(tmp_path / "gone"), iter(given))


def test_names_that_stand_for_no_id_of_their_own() -> None:
    assert ids_of("21Uxsk56VDQ") == {"21Uxsk56VDQ"}
    assert ids_of("A talk - part two") == {"A talk - part two"}
    assert ids_of("Talk [21Uxsk56VDQ].f137") == {"Talk [21Uxsk56VDQ]", "21Uxsk56VDQ"}
