"""A site and a list that misbehave in every way we know: each video ends in the ledger with its cause, never a crash."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data

from jobs import demo
from tests import clips
from tests.runs import ledger, outcome, run_job
from tests.site import Page, VideoSite, cut_transfer, status, web_page

pytestmark = pytest.mark.slow

GOOD = demo.Clip(
    identity="id00001", video="good-mp4", size=(960, 540), scale=1.25, seconds=1.8, seed=3
)
NARROW = replace(GOOD, video="pillar-boxed", size=(720, 540), seed=6)
LINE = "000010 \t0.400 \t0.200 \t0.200 \t0.356 \n"


def film(folder: Path, clip: demo.Clip, name: str, **how: Any) -> Path:
    """Encode a clip of the demo's portrait with the options of ``clips.encode``."""
    times = np.asarray(how["times"]) if "times" in how else demo.frame_times(clip)
    portrait, coffee = skimage.data.astronaut(), skimage.data.coffee()
    pictures = (
        demo.picture(clip, portrait, coffee, homography, 0.0)
        for homography in demo.motion(clip, times)
    )
    return clips.encode(folder / name, pictures, fps=clip.rate, **how)


def vp9(folder: Path) -> Path:
    clip = replace(GOOD, size=(1920, 1080), scale=2.5, video="vp9-1080p")
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
    return film(folder, clip, "vp9.webm", codec="libvpx-vp9", options=options)


def variable(folder: Path) -> Path:
    steps = np.where(np.arange(50) % 7 < 3, 1 / 50, 1 / 22)
    return film(folder, GOOD, "variable.mp4", times=list(np.cumsum(steps) - steps[0]))


def still(folder: Path, name: str, shots: list[tuple[demo.Clip, float]]) -> Path:
    """Stills one after the other, each shown for so many seconds, every frame with its own noise."""
    portrait, coffee = skimage.data.astronaut(), skimage.data.coffee()
    random = np.random.default_rng(0)

    def pictures() -> Iterator[clips.Picture]:
        for clip, seconds in shots:
            homography = demo.motion(clip, np.zeros(1))[0]
            shown = demo.picture(clip, portrait, coffee, homography, 0.0)
            for _ in range(round(seconds * 25)):
                noisy = shown + random.normal(0, 2, shown.shape)
                yield np.clip(noisy, 0, 255).astype(np.uint8)

    return clips.encode(folder / name, pictures())


def frozen(clip: demo.Clip) -> str:
    """The annotation of a clip whose box never moves from where it is first."""
    head, rows = demo.annotation(clip).split("FRAME", 1)
    columns, *lines = rows.strip().splitlines()
    box = lines[0].split()[1:]
    told = [" \t".join([line.split()[0], *box]) for line in lines]
    return "\n".join([f"{head}FRAME {columns}", *told, ""])


def pillar_boxed(folder: Path) -> Path:
    """A 4:3 picture in the middle of a 16:9 frame."""
    times = demo.frame_times(NARROW)
    portrait, coffee = skimage.data.astronaut(), skimage.data.coffee()
    pictures = (
        np.pad(
            demo.picture(NARROW, portrait, coffee, homography, 0.0), ((0, 0), (120, 120), (0, 0))
        )
        for homography in demo.motion(NARROW, times)
    )
    return clips.encode(folder / "pillar.mp4", pictures, fps=NARROW.rate)


def black(folder: Path) -> Path:
    return clips.encode(folder / "black.mp4", [np.zeros((540, 960, 3), np.uint8)] * 45)


GOOD_FILES: dict[str, Callable[[Path], Path]] = {
    "good-mp4": lambda folder: film(folder, GOOD, "good.mp4"),
    "av1": lambda folder: film(
        folder, GOOD, "av1.mp4", codec="libsvtav1", options={"preset": "12"}
    ),
    "vp9-1080p": vp9,
    "rotated": lambda folder: film(folder, GOOD, "rotated.mp4", rotation=90),
    "variable-rate": variable,
    "thirty": lambda folder: film(folder, replace(GOOD, rate=Fraction(30)), "thirty.mp4"),
    "pillar-boxed": pillar_boxed,
}

BAD = {
    "truncated-mp4": "download: truncated",
    "truncated-webm": "download: truncated",
    "cut-transfer": "download: truncated",
    "audio-only": "video: no video stream",
    "html": "download: not a video",
    "empty-file": "download: empty",
    "gone": "download: not found",
    "malformed-txt": "list: malformed",
    "negative-boxes": "list: boxes",
    "nan-boxes": "list: boxes",
    "beyond-the-end": "timeline: short",
    "hdr": "video: hdr",
    "interlaced": "video: interlaced",
    "black": "video: black",
    "static": "clip: static",
    "slideshow": "clip: static",
    "stretched": "annotation: aspect",
}
SHOTS: dict[str, list[tuple[demo.Clip, float]]] = {
    "static": [(GOOD, 1.8)],
    "slideshow": [
        (GOOD, 1.1),
        (replace(GOOD, what="coffee"), 0.1),
        (replace(GOOD, mirrored=True), 0.6),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made files, the list, and the output."""
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def pages(folder: Path) -> dict[str, Page]:
    """What the site answers, by path."""
    made = {name: make(folder) for name, make in GOOD_FILES.items()}
    types = {".mp4": "video/mp4", ".webm": "video/webm"}
    pages = {f"/{name}": Page(body=path, type=types[path.suffix]) for name, path in made.items()}
    mp4, webm = made["good-mp4"], made["vp9-1080p"]
    for name, source, suffix in (("truncated-mp4", mp4, ".mp4"), ("truncated-webm", webm, ".webm")):
        broken = clips.truncate(source, folder / f"{name}{suffix}", 0.6)
        pages[f"/{name}"] = Page(body=broken, type=types[suffix])
    ten_bits = {"codec": "libx265", "pixel_format": "yuv420p10le", "colour": clips.PQ}
    odd = {
        "hdr": film(folder, replace(GOOD, seconds=0.4), "hdr.mp4", **ten_bits),
        "interlaced": film(
            folder,
            replace(GOOD, seconds=0.4),
            "interlaced.mp4",
            options={"x264-params": "interlaced=1"},
        ),
        "black": black(folder),
        "stretched": film(folder, replace(GOOD, size=(720, 540)), "stretched.mp4"),
    } | {name: still(folder, f"{name}.mp4", shots) for name, shots in SHOTS.items()}
    pages |= {f"/{name}": Page(body=path, type="video/mp4") for name, path in odd.items()}
    audio = clips.encode_audio(folder / "audio.mp4", 2.0)
    pages["/cut-transfer"] = replace(cut_transfer(mp4.read_bytes(), 0.5), type="video/mp4")
    pages["/audio-only"] = Page(body=audio, type="video/mp4")
    pages["/html"] = web_page()
    pages["/empty-file"] = Page(type="video/mp4")
    pages["/gone"] = status(404)
    for name in ("malformed-txt", "negative-boxes", "nan-boxes", "beyond-the-end"):
        pages[f"/{name}"] = pages["/good-mp4"]
    return pages


@pytest.fixture(scope="module")
def listing(folder: Path) -> Path:
    """A VoxCeleb2 zip in which some names and texts are hostile."""
    path = folder / "list.zip"
    with zipfile.ZipFile(path, "w") as archive:

        def add(video: str, text: str, utterance: str = "00001") -> None:
            archive.writestr(f"txt/id00001/{video}/{utterance}.txt", text)

        for video in (*GOOD_FILES, *BAD):
            size, scale = ((1920, 1080), 2.5) if video == "vp9-1080p" else (GOOD.size, GOOD.scale)
            text = demo.annotation(replace(GOOD, video=video, size=size, scale=scale))
            if video in SHOTS:
                text = frozen(replace(GOOD, video=video))
            if video == NARROW.video:
                text = demo.annotation(NARROW)
            head, rows = text.split("FRAME", 1)
            if video == "malformed-txt":
                text = head + rows
            if video == "negative-boxes":
                text += LINE.replace("000010", "000900").replace("0.356", "-0.356")
            if video == "nan-boxes":
                text += LINE.replace("000010", "000900").replace("0.400", "nan")
            if video == "beyond-the-end":
                text += "".join(LINE.replace("000010", f"{900 + i:06d}") for i in range(120))
            add(video, text)
        add("good-mp4", demo.annotation(GOOD), "00002")  # the same stretch once more
        escape = demo.annotation(GOOD)
        archive.writestr("txt/id00001/../../../../escaped/00001.txt", escape)
        archive.writestr("txt/id00001/dots.in.it/00001.txt", escape)
    return path


@pytest.fixture(scope="module")
def rows(folder: Path, pages: dict[str, Page], listing: Path) -> dict[str, dict[str, Any]]:
    """The ledger of the run."""
    with VideoSite(folder, pages=pages) as site:
        code, text = run_job(
            "preprocess",
            f"--input={listing}",
            f"--output={folder / 'out'}",
            f"--download.url-template={site.url('/')}{{video}}",
            "--download.tries=1",  # what is tried again, and how often, is in test_download.py
            "--tracks.min-frames=4",
            "--crops.min-frames=4",
            "--quality.max-hash-distance=0",  # all good files show one clip
            "--identities.min-track-frames=4",
            "--identities.min-identity-frames=4",
            folder=folder,
        )
    assert code == 0, text
    return ledger(folder / "out")


def test_every_kind_of_file_ends_with_its_cause(rows: dict[str, dict[str, Any]]) -> None:
    found = {name: outcome(rows[f"id00001-{name}"]) for name in (*GOOD_FILES, *BAD)}
    assert found == dict.fromkeys(GOOD_FILES, "published") | BAD


def test_hostile_names_stay_inside(rows: dict[str, dict[str, Any]], folder: Path) -> None:
    unsafe = [
        row for row in rows.values() if outcome(row) == "list: unsafe" and row["kind"] == "video"
    ]
    assert len(unsafe) == 2
    assert not list(folder.rglob("escaped*"))
    assert not list(folder.parent.glob("escaped*"))
    assert all("." not in row["key"] and "/" not in row["key"] for row in rows.values())


def test_the_same_stretch_twice_is_used_once(rows: dict[str, dict[str, Any]]) -> None:
    tracks = [row for row in rows.values() if row["key"].startswith("id00001-good-mp4-")]
    assert sorted(outcome(row) for row in tracks) == ["published", "track: overlap"]


def test_detail_tells_what_is_wrong(rows: dict[str, dict[str, Any]]) -> None:
    """The tool's own words, or file, line and value, stand beside every cause."""
    assert "404" in rows["id00001-gone"]["detail"]
    assert "nan" in rows["id00001-nan-boxes"]["detail"].lower()
    assert all(row["detail"] for row in rows.values() if outcome(row) != "published")


def test_empty_list_is_usage(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    code, text = run_job(
        "preprocess",
        f"--input={tmp_path / 'list'}",
        f"--output={tmp_path / 'out'}",
        folder=tmp_path,
    )
    assert code == 2
    last = text.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert str(tmp_path / "list") in last
