"""The whole job against a site that has had enough of it: everybody waits, one asks, and nothing is lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clips
from tests.runs import ledger, outcome, run_job
from tests.site import Page, Storm, VideoSite, bot_page, status

pytestmark = pytest.mark.slow

GOOD = [f"good{number:02d}" for number in range(10)]
NO_FACE = "track: no face"
"""How a good file ends here: it is a test picture, fetched, checked and looked at in every frame."""
PAUSE = 2.0
QUICK = [
    f"--download.first-pause-seconds={PAUSE}",
    "--download.longest-pause-seconds=8",
    "--download.backoff-seconds=0.2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short video."""
    root = tmp_path_factory.mktemp("site")
    clips.encode(root / "clip.mp4", clips.indexed(30, (320, 240)))
    return root


@pytest.fixture
def site(folder: Path) -> Iterator[VideoSite]:
    """Every good name answers with the same video."""
    pages = {f"/{name}.mp4": Page(body=folder / "clip.mp4") for name in GOOD}
    with VideoSite(pages=pages) as running:
        yield running


def arguments(folder: Path, site: VideoSite, names: list[str]) -> list[str]:
    """Of the job, for a table of these names."""
    table = folder / "list.csv"
    rows = [f"id1,{name},{site.url(f'/{name}.mp4')}\n" for name in names]
    table.write_text("identity,video,url\n" + "".join(rows))
    return [f"--input={table}", f"--output={folder / 'out'}", *QUICK]


def test_a_storm_stops_everybody_until_it_is_over(site: VideoSite, tmp_path: Path) -> None:
    site.storm = Storm(
        after=6, seconds=3 * PAUSE
    )  # the first probe still meets it, however slow the machine
    site.pages["/gone.mp4"] = status(404)
    site.pages["/broken.mp4"] = status(500)
    site.pages["/forbidden.mp4"] = status(403)
    names = [*GOOD, "gone", "broken", "forbidden"]
    flags = [
        f"--download.canary={site.url('/good00.mp4')}",
        "--download.resources.min-actors=3",
        "--download.resources.max-actors=3",
    ]
    code, text = run_job("preprocess", *arguments(tmp_path, site, names), *flags, folder=tmp_path)
    assert code == 3, text
    rows = ledger(tmp_path / "out")
    found = {name: outcome(rows[f"id1-{name}"]) for name in names}
    wanted = dict.fromkeys(GOOD, NO_FACE) | {
        "gone": "download: not found",
        "broken": "download: server error",
        "forbidden": "download: forbidden",
    }
    assert found == wanted
    assert {rows[f"id1-{name}"]["attempts"] for name in names} == {1}

    refused = [visit for visit in site.visits if visit.status == 429]
    assert 2 <= len(refused) <= 3 + 3, "three actors were on their way, then one probe a pause"
    first, last = refused[0].time, refused[-1].time
    answered = [visit.time for visit in site.visits if visit.status != 429]
    assert not any(first < time < last for time in answered)
    recovered = min(time for time in answered if time > last)
    assert recovered - first >= PAUSE
    quiet = [b.time - a.time for a, b in itertools.pairwise(site.visits)]
    assert max(quiet) >= PAUSE, "nobody asked while the address waited"
    assert recovered - (first + site.storm.seconds) < 120, "and went on after"
    paused = (
        r"address node [\d.]+ is paused at 127\.0\.0\.1 \(rate limited, \d in a row\): .*under way"
    )
    assert re.search(paused, text), "whoever watches is told"
    assert re.search(r"address node [\d.]+ goes on with 127\.0\.0\.1", text)


def test_an_address_that_is_given_up_leaves_the_list_for_another_day_or_another_source(
    site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    names = GOOD[:3]
    site.pages = {f"/{name}.mp4": bot_page() for name in names}
    job = [*arguments(tmp_path, site, names), "--max-attempts=1", "--download.max-blocks=2"]
    code, text = run_job("preprocess", *job, folder=tmp_path)
    assert code == 3
    last = text.strip().splitlines()[-1]
    assert last.startswith("nothing usable: all 3 videos")
    assert "3 × download: bot check" in last
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert (tmp_path / "out" / "report" / "index.html").exists()
    rows = ledger(tmp_path / "out")
    videos = [rows[f"id1-{name}"] for name in names]
    assert {(row["state"], row["attempts"]) for row in videos} == {("failed", 0)}
    assert all("given up after 2 blocks in a row" in row["detail"] for row in videos)

    visits = site.count()
    archive = tmp_path / "archive" / "some" / "where"
    archive.mkdir(parents=True)
    (archive / f"A title [{names[0]}].mp4").write_bytes((folder / "clip.mp4").read_bytes())
    clips.truncate(folder / "clip.mp4", archive / f"{names[1]}.mp4", 0.6)
    run_job("preprocess", *job, "--download.from-downloads=archive", folder=tmp_path)
    rows = ledger(tmp_path / "out")
    found = [outcome(rows[f"id1-{name}"]) for name in names]
    assert found == [NO_FACE, "download: truncated", "download: not found"]
    assert [rows[f"id1-{name}"]["attempts"] for name in names] == [1, 1, 1]
    assert rows[f"id1-{names[0]}"]["url"] == site.url(f"/{names[0]}.mp4")
    assert site.count() == visits


def test_a_canary_that_fails_ends_the_run_before_it_began(site: VideoSite, tmp_path: Path) -> None:
    site.pages["/canary.mp4"] = bot_page()
    canary = site.url("/canary.mp4")
    flags = [*arguments(tmp_path, site, GOOD), f"--download.canary={canary}"]
    code, text = run_job("preprocess", *flags, folder=tmp_path)
    assert code == 3, text
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"nothing usable: the canary {canary} could not be fetched: download: ")
    assert "bot check" in last
    assert {visit.path for visit in site.visits} == {"/canary.mp4"}
