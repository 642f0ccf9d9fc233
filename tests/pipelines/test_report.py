"""The page: its numbers are the manifest's, its texts are harmless, its pictures show the landmarks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines import gallery, report, shards
from pipelines.preprocess import Tally
from pipelines.schema import Cause, reject, reject_track
from tests import datasets
from tests.datasets import face_jpeg, face_points, made_video, make_dataset

VOID = {"meta", "img", "image", "rect", "path", "br"}
OPTIONAL_END = {"li", "tr", "td", "th", "tbody", "thead"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    @property
    def text(self) -> str:
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())

    def find(self, tag: str, **attributes: str) -> list[Element]:
        return [
            element
            for element in self.walk()
            if element.tag == tag
            and all(
                value in element.attributes.get(name.rstrip("_"), "").split()
                for name, value in attributes.items()
            )
        ]


class Tree(HTMLParser):
    """The elements of a page; fails on an end tag that closes nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open = [Element("page", {})]
        self.feed(page)
        self.close()
        self.root = self.open[0]
        assert len(self.open) == 1, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in OPTIONAL_END:
            table = {"tr": {"tr", "td", "th"}, "td": {"td", "th"}, "th": {"th"}}.get(tag, set())
            while self.open[-1].tag in table:
                self.open.pop()
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        while self.open[-1].tag != tag and self.open[-1].tag in OPTIONAL_END:
            self.open.pop()
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(output: str) -> Element:
    return Tree(Path(output, report.PAGE).read_text()).root


def pictures(page: Element, labelled: bool = False) -> list[NDArray[np.uint8]]:
    """The frames with their landmarks, or those with their labels."""
    sources = [
        element.attributes["src"]
        for strip in page.find("div", class_="strip")
        for element in strip.find("img")
        if element.attributes["alt"].startswith("labels of") is labelled
    ]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [report.decode(base64.b64decode(source.split(",", 1)[1])) for source in sources]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A published dataset and its manifest."""
    output = str(tmp_path_factory.mktemp("report") / "out")
    return output, make_dataset(output, datasets.some_videos())


# --- numbers ------------------------------------------------------------------------------------------------------


def numbers_of(page: Element, table: str) -> dict[str, int]:
    (section,) = page.find("div", id=table)
    return {
        row.find("td", class_="cause")[0].text: int(
            row.find("td", class_="count")[0].text.replace(",", "")
        )
        for row in section.find("tr")
        if row.find("td")
    }


def test_the_numbers_are_those_of_the_manifest(made: tuple[str, dict[str, Any]]) -> None:
    output, manifest = made
    page = read_page(output)
    counts = manifest["counts"]
    for kind, total in (
        ("identities", counts["identities"]["listed"]),
        ("videos", counts["videos"]["listed"]),
        ("tracks", counts["tracks"]["found"]),
        ("frames", sum(counts["frames"].values())),
    ):
        (tile,) = page.find("div", id=f"published-{kind}")
        assert tile.text == f"{counts[kind]['published']} {kind} of {total}"
    for kind in ("videos", "tracks", "frames"):
        assert numbers_of(page, f"causes-{kind}") == counts["causes"][kind]
    assert "HeadRay dataset, version 1" in page.text
    assert not page.find("section", id="nothing")


def test_every_bar_of_the_funnel_adds_up(made: tuple[str, dict[str, Any]]) -> None:
    _, manifest = made
    for bar in report.funnel(manifest["counts"]):
        assert bar.kept + sum(count for _, count in bar.losses) == bar.total


def test_frames_of_tracks_that_the_identity_filter_rejected_are_not_lost_sight_of(
    tmp_path: Path,
) -> None:
    output = str(tmp_path)
    refused = {"id01-v0-000": (Cause.IDENTITY_DISAGREES.value, "0.3 < 0.6")}
    manifest = make_dataset(output, datasets.some_videos(), refused=refused)
    frames = report.funnel(manifest["counts"])[-1]
    assert frames.kept == 45
    assert ("of rejected tracks", 15) in frames.losses  # 5 of this one, 10 rejected before
    assert frames.kept + sum(count for _, count in frames.losses) == frames.total


def test_causes_come_with_examples(made: tuple[str, dict[str, Any]]) -> None:
    page = read_page(made[0])
    (videos,) = page.find("div", id="causes-videos")
    assert "id04-v0 Private video. Sign in if you've been granted access" in videos.text
    (tracks,) = page.find("div", id="causes-tracks")
    assert "id05-v0-000 window side 210 px < 384 px" in tracks.text
    (frames,) = page.find("div", id="causes-frames")
    assert "id05-v0-000 3 frames" in frames.text


def test_when_nothing_is_published_the_page_says_why(tmp_path: Path) -> None:
    output = str(tmp_path)
    manifest = make_dataset(
        output, [one for one in datasets.some_videos() if one[0].state != "open"]
    )
    page = read_page(output)
    (why,) = page.find("section", id="nothing")
    assert "None of 4 videos" in why.text
    assert f"1 × {Cause.DOWNLOAD_PRIVATE}" in why.text
    assert numbers_of(page, "causes-tracks") == manifest["counts"]["causes"]["tracks"]
    assert page.find("svg")  # how far the rejected track was from its gate
    assert not page.find("div", class_="strip")


def test_an_empty_ledger_gives_a_page(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [])
    assert read_page(str(tmp_path)).find("section", id="nothing")


def test_a_published_dataset_gets_the_same_page_again(made: tuple[str, dict[str, Any]]) -> None:
    path = Path(made[0], report.PAGE)
    before = path.read_bytes()
    path.unlink()
    report.rebuild(made[0])
    assert path.read_bytes() == before


# --- harmless -----------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_lists_and_tools_stay_texts(tmp_path: Path, text: str) -> None:
    output = str(tmp_path)
    video, members = made_video("id01", "v0", url=text, versions={text: text}, source={text: text})
    bad = replace(
        video, video="v1", tracks=(reject_track(video.tracks[0], Cause.TRACK_SHORT, text),)
    )
    scored = replace(video.tracks[1], scores={"window_side": 500.0, text: 1.0})
    manifest = make_dataset(
        output,
        [
            (replace(video, tracks=(video.tracks[0], scored)), members),
            (reject(bad, Cause.DOWNLOAD_OTHER, text), []),
            (replace(bad, video="v2", seconds={text: 1.0}), []),
        ],
    )
    tame = read_page(output)
    calm = str(tmp_path / "calm")
    make_dataset(calm, [made_video("id01", "v0"), (replace(bad, video="v2"), [])])
    assert {element.tag for element in tame.walk()} == {
        element.tag for element in read_page(calm).walk()
    }
    assert not any(name.startswith("on") for e in tame.walk() for name in e.attributes)
    assert " ".join(text.split()) in tame.text
    manifest["config"] = manifest["config"] | {"download.url_template": text}
    report.write(output, manifest)
    assert not read_page(output).find("script")


def test_nothing_is_loaded_from_elsewhere(made: tuple[str, dict[str, Any]]) -> None:
    page = read_page(made[0])
    for element in page.walk():
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
        assert element.tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert "url(" not in element.attributes.get("style", "")
    (style,) = page.find("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = [e for e in page.find("meta") if e.attributes.get("http-equiv")]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_every_inner_link_leads_somewhere(made: tuple[str, dict[str, Any]]) -> None:
    page = read_page(made[0])
    targets = {element.attributes.get("id") for element in page.walk()}
    links = [element.attributes["href"] for element in page.find("a")]
    assert links
    assert {link.removeprefix("#") for link in links} <= targets


# --- pictures -----------------------------------------------------------------------------------------------------


def test_landmarks_are_drawn_where_they_are() -> None:
    image = report.decode(face_jpeg(128, 0.0, 100))
    points = face_points(128)
    drawn = report.draw_landmarks(image, points, 160)
    plain = cv2.resize(image, (160, 160), interpolation=cv2.INTER_AREA)
    line = np.array(report.LINE_RGB)
    for x, y in points * 160 / 128:
        row, column = int(y), int(x)  # the pixel that holds the point
        near = drawn[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3).astype(int)
        assert np.abs(near - line).sum(axis=1).min() < 120
    changed = np.argwhere((drawn != plain).any(axis=-1))
    nearest = np.linalg.norm(changed[:, None] + 0.5 - points[None, :, ::-1] * 1.25, axis=-1).min(
        axis=1
    )
    assert 300 < len(changed) < 3000
    assert (
        nearest.max() < 12
    )  # lines run between neighbours only; the forehead and the corners are untouched


def test_landmarks_outside_the_window_do_no_harm() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    for points in (np.full((68, 2), 1e9), np.full((68, 2), -1e9), np.zeros((68, 2))):
        assert report.draw_landmarks(image, points, 32).shape == (32, 32, 3)


def test_the_page_shows_the_frames_of_the_shards(made: tuple[str, dict[str, Any]]) -> None:
    page = read_page(made[0])
    found = pictures(page)
    assert len(found) == 5 * (2 + 2 + 1)  # two tracks of id01 and id02, the only one of id03
    size = report.THUMB_PX
    hue = sum(map(ord, "id01")) * 37
    for number in range(10, 20):  # of id01, which is second
        plain = report.decode(face_jpeg(128, round(0.02 * (number % 5 - 2), 4), hue))
        plain = cv2.resize(plain, (size, size), interpolation=cv2.INTER_AREA)
        difference = np.abs(found[number].astype(int) - plain).sum(axis=-1)
        at_landmarks = [
            difference[y - 1 : y + 2, x - 1 : x + 2].max()
            for x, y in face_points(size, 0.02 * (number % 5 - 2)).astype(int)
        ]
        assert min(at_landmarks) > 90
        assert difference[:, : size // 5].max() < 40  # beside the head nothing was drawn
    captions = [element.text for element in page.find("figcaption")]
    assert captions[:5] == ["0.40 s", "0.60 s", "0.80 s", "1.00 s", "1.20 s"]


def test_the_first_track_of_each_person_shows_its_labels(made: tuple[str, dict[str, Any]]) -> None:
    page = read_page(made[0])
    found = pictures(page, labelled=True)
    assert len(found) == 5 * 3
    (legend,) = page.find("p", id="labels")
    assert legend.text == "skin hair"
    assert "coarse" in page.text
    for overlay in found:
        size = len(overlay)
        skin, hair = overlay[int(0.75 * size), size // 2], overlay[int(0.2 * size), size // 2]
        assert skin[0] > 130 > hair[1]  # orange over a face of any colour, violet
        assert skin[0] > skin[2]
        assert hair[2] > hair[1]


def test_a_dataset_without_labels_has_no_overlays(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0")
    plain = [member for member in members if not member[0].endswith(".png")]
    make_dataset(str(tmp_path), [(video, plain)])
    page = read_page(str(tmp_path))
    assert len(pictures(page)) == 10
    assert pictures(page, labelled=True) == []
    assert page.find("p", id="labels") == []


def test_thumbs_are_evenly_spaced_in_time(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [made_video("id01", "v0", tracks=1, frames=41)])
    (sample,) = shards.read_index(str(tmp_path)).to_pylist()
    thumbs = report.read_thumbs(str(tmp_path), sample, limit=5, size=32)
    times = [thumb.time for thumb in thumbs]
    assert times == pytest.approx(np.linspace(0.4, 8.4, 5))
    assert all(thumb.image.shape == (32, 32, 3) for thumb in thumbs)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_dataset(output, [made_video("id01", "v0")])
    (shard,) = Path(output, "shards").iterdir()
    content = shard.read_bytes()
    for damaged in (content[:2000], bytes(len(content))):
        shard.write_bytes(damaged)
        with pytest.raises(
            shards.DatasetError, match=rf"{shard.name}: sample id01-v0-000 .* verify"
        ):
            report.rebuild(output)
    shard.unlink()
    with pytest.raises(shards.DatasetError, match="verify"):
        report.rebuild(output)


# --- bounded ------------------------------------------------------------------------------------------------------


def rows_of(people: int) -> Iterator[dict[str, Any]]:
    """Ledger rows of many people, a third of them published, with unlike causes and scores."""
    template, _ = made_video("id", "v0", tracks=1)
    for number in range(people):
        split = ("train", "val", "test")[number % 40 % 3]
        scores = {"window_side": 300.0 + number % 700, "inside": 0.5}
        track = replace(template.tracks[0], scores=scores, embedding=())
        video = replace(template, identity=f"id{number:06d}", split=split, tracks=(track,))
        if number % 5 == 1:
            video = reject(video, Cause.DOWNLOAD_PRIVATE, f"private {number} " + "x" * 300)
        elif number % 3:
            track = reject_track(track, Cause.CROP_SMALL, f"side {number}")
            video = reject(replace(video, tracks=(track,)), Cause.NO_TRACKS)
        done = shards.Commit(video=video, tar_sha256="", slices={}, frames={})
        decided = {video.track_key(track): (split, "", "")} if video.live else {}
        yield from shards.ledger_rows(done, decided)


def page_of(output: str, people: int) -> tuple[int, set[str]]:
    """Length of the page of so many people, without pictures, and the samples it would show."""
    tally = Tally()
    shards.write_ledger([tally.see(row) for row in rows_of(people)], output)
    manifest = {
        "schema_version": 1,
        "dataset_version": 1,
        "config": datasets.CONFIG,
        "list_sha256": "0" * 64,
        "counts": tally.counts(),
        "splits": tally.splits(),
        "members": datasets.CROP,
        "shards": [],
        "tools": {},
    }
    report.write(output, manifest)
    return Path(output, report.PAGE).stat().st_size, report.choose(gallery.shelve_ledger(output))


@pytest.mark.slow
def test_the_page_does_not_grow_with_the_list(tmp_path: Path) -> None:
    small, some = page_of(str(tmp_path / "small"), 300)
    large, others = page_of(str(tmp_path / "large"), 6000)
    assert large < 1.1 * small
    assert len(some) == len(others) == report.MAX_IDENTITIES
    ledger = shards.read_ledger(str(tmp_path / "large")).to_pylist()
    splits = {row["split"] for row in ledger if row["key"] in others}
    assert splits == {"train", "val", "test"}
    page = read_page(str(tmp_path / "large"))
    rejected = sum(row["kind"] == "track" and row["state"] != "published" for row in ledger)
    assert rejected > 1000
    (small,) = page.find("div", id="rejected-crop--small-window")
    assert small.find("span", class_="small")[0].text.startswith(f"{gallery.PER_CAUSE} of ")
    assert len(small.find("figure")) == gallery.PER_CAUSE
    assert len(page.find("div", class_="timeline")) == gallery.DOUBTFUL + gallery.OTHERS


def test_identities_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    people = report.MAX_IDENTITIES + 3
    made = [made_video(f"id{number:02d}", "v0", tracks=3, frames=1) for number in range(people)]
    make_dataset(str(tmp_path), made)
    page = read_page(str(tmp_path))
    (line,) = page.find("p", id="hidden-identities")
    assert f"{report.MAX_IDENTITIES} of {people} identities are shown" in line.text
    assert "3 are not" in line.text
    shown = [card.find("h3")[0].text for card in page.find("div", class_="identity")]
    assert len(shown) == report.MAX_IDENTITIES
    assert shown[0] == "id00"
    assert shown[-1] == f"id{people - 1:02d}"
    assert len(pictures(page)) == report.MAX_IDENTITIES * report.TRACKS_PER_IDENTITY


@given(count=st.integers(0, 10_000), limit=st.integers(1, 50))
def test_spread_takes_the_ends_and_what_lies_between(count: int, limit: int) -> None:
    places = gallery.spread(count, limit)
    assert len(places) == min(count, limit)
    assert places == sorted(set(places))
    assert all(0 <= place < count for place in places)
    if len(places) > 1:
        assert (places[0], places[-1]) == (0, count - 1)
        steps = np.diff(places)
        assert steps.max() - steps.min() <= 1


# --- histograms ---------------------------------------------------------------------------------------------------

values = st.lists(st.floats(0, 5000), max_size=40).map(np.array)


@settings(deadline=None)
@given(
    published=values,
    others=values,
    threshold=st.just(0.0) | st.floats(0.01, 1000),
    axis=st.sampled_from(["plain", "angle", "decades"]),
)
def test_a_histogram_holds_every_value(
    published: NDArray[np.float64], others: NDArray[np.float64], threshold: float, axis: Any
) -> None:
    if not published.size + others.size:
        return
    gate = report.Gate(score="s", title="t", unit="u", threshold="x.y", axis=axis)
    if axis == "angle":
        published = -published
    chart = report.histogram(gate, published, others, threshold)
    assert sum(round(kept * chart.peak) for _, kept, _ in chart.bars) == published.size
    assert sum(round(rest * chart.peak) for _, _, rest in chart.bars) == others.size
    assert max(kept + rest for _, kept, rest in chart.bars) == pytest.approx(1)
    assert 2 <= len(chart.ticks) <= 21
    assert chart.ticks[0][0] == pytest.approx(0)
    assert chart.ticks[-1][0] == pytest.approx(1)
    assert len(chart.thresholds) == (threshold > 0) * (1 + (axis == "angle"))
    for place, _ in chart.thresholds:
        assert -1e-9 <= place <= 1 + 1e-9


def test_threshold_lines_are_drawn_where_the_configuration_has_them(
    made: tuple[str, dict[str, Any]],
) -> None:
    """Read back from the drawing: the line's place between two ticks is the threshold's."""
    output, manifest = made
    page = read_page(output)
    charts = {
        card.find("h3")[0].text: card
        for card in page.find("div", class_="charts")[0].children
        if isinstance(card, Element)
    }
    gates = {gate.title: gate for gate in report.GATES}
    assert {"Window side", "Share of the window inside the frame"} <= set(charts)
    for title, card in charts.items():
        gate = gates[title]
        wanted = float(manifest["config"][gate.threshold])
        lines = [
            float(path.attributes["d"].split()[0].removeprefix("M"))
            for path in card.find("path", class_="threshold")
        ]
        labels = {
            float(text.text): float(text.attributes["x"])
            for text in card.find("text")
            if text.attributes["y"] == "181"
        }
        (low, left), (high, right) = sorted(labels.items())[0], sorted(labels.items())[-1]
        read = [low + (line - left) / (right - left) * (high - low) for line in lines]
        expected = [] if not wanted else [-wanted, wanted] if gate.axis == "angle" else [wanted]
        assert read == pytest.approx(expected, abs=(high - low) / 500)
        if wanted:
            assert any(f" {wanted:g}" in text.text for text in card.find("text"))


def test_stage_seconds_are_summed_over_videos(made: tuple[str, dict[str, Any]]) -> None:
    told = report.stage_seconds(shards.ledger_batches(made[0]))
    assert [(row["stage"], row["seconds"], row["videos"]) for row in told] == [
        ("tracks", 36.0, 9),
        ("crops", 22.5, 9),
        ("download", 13.5, 9),
    ]
    assert sum(row["share"] for row in told) == pytest.approx(1)
