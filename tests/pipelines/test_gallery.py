"""What the page shows of rejects and of time: chosen the same way every time, bounded, and what was really there."""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import gallery, report, shards, snapshots
from pipelines.preprocess import Tally
from pipelines.schema import Cause, Span, Video, reject, reject_track
from tests import datasets
from tests.datasets import made_video, make_dataset, only_snapshots, some_videos

CONFIG = datasets.CONFIG


def rejected(number: int, cause: Cause, **scores: float) -> datasets.Made:
    """A video whose only track was rejected, with its snapshots."""
    video, members = made_video(f"id{number:02d}", "v0", tracks=1)
    track = replace(video.tracks[0], scores=scores)
    video = replace(video, tracks=(reject_track(track, cause, f"detail {number}"),))
    return reject(video, cause, "1 track"), only_snapshots(members)


def test_who_is_shown_depends_on_the_ledger_and_not_on_its_order(tmp_path: Path) -> None:
    rows = [
        row
        for number in range(40)
        for video, _ in [rejected(number, (Cause.CROP_SMALL, Cause.QUALITY_BLURRED)[number % 2])]
        for row in shards.ledger_rows(
            shards.Commit(video=video, tar_sha256="", slices={}, frames={}), {}
        )
    ]
    shuffled = random.Random(1).sample(rows, len(rows))
    told = []
    for name, some in (("one", rows), ("other", shuffled)):
        output = str(tmp_path / name)
        shards.write_ledger(some, output)
        choice = gallery.choose(output, gallery.shelve_ledger(output))
        assert [(cause, total, len(shown)) for cause, total, shown in choice.rejects] == [
            ("crop: small window", 20, gallery.PER_CAUSE),
            ("quality: blurred", 20, gallery.PER_CAUSE),
        ]
        assert len(choice.strips) == gallery.DOUBTFUL + gallery.OTHERS
        assert choice.num_strips == 40
        told.append(
            (
                [[row["key"] for row in shown] for _, _, shown in choice.rejects],
                [row["key"] for row in choice.strips],
            )
        )
    assert told[0] == told[1]
    small = told[0][0][0]
    assert (small[0], small[-1]) == ("id00-v0-000", "id38-v0-000"), "from all over the list"


def test_a_reject_is_shown_with_its_window_value_and_threshold(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_dataset(
        output,
        [
            made_video("id90", "v0"),
            rejected(1, Cause.CROP_OUTSIDE, inside=0.26, window_side=900.0),
            rejected(2, Cause.CROP_SMALL, inside=0.9, window_side=165.4),
        ],
    )
    choice = gallery.choose(output, gallery.shelve_ledger(output))
    pictures = gallery.as_pictures(gallery.read_album(output))
    outside, small = sorted(
        gallery.draw_rejects(choice, pictures, CONFIG), key=lambda group: group.shown[0].key
    )
    assert (outside.cause, outside.total) == ("crop: outside frame", 1)
    (one,) = outside.shown
    assert (one.measured, one.needed) == ("0.26 inside the frame", "at least 0.4")
    (two,) = small.shown
    assert (two.measured, two.needed) == ("window side 165 px", "at least 384")
    assert two.picture is None
    window = report.decode(base64.b64decode(two.window))
    plain = report.decode(
        snapshots.shrink(datasets.face_jpeg(128, 0.0, sum(map(ord, "id02")) * 37))
    )
    np.testing.assert_array_equal(window, plain)


def test_a_value_that_passes_is_not_blamed() -> None:
    row = {"scores": [("yaw", 30.0), ("sharpness", 2.0)], "frames": 12}
    assert gallery.judge(row, "quality: extreme pose", {}, CONFIG) == ("", "")
    assert gallery.judge(row, "quality: blurred", {}, CONFIG) == ("sharpness 2.0", "at least 4")
    turned = {"scores": [("yaw", -85.0)], "frames": 12}
    assert gallery.judge(turned, "quality: extreme pose", {}, CONFIG) == (
        "turned -85°",
        "at most 80",
    )
    assert gallery.judge(row, "track: no face", {"face_found": 0.1}, CONFIG) == (
        "a face in 0.10 of the frames",
        "at least 0.8",
    )
    assert gallery.judge(row, "identity: drift", {}, CONFIG) == ("", "")


def test_every_measure_is_of_a_cause_and_a_threshold_that_exist() -> None:
    causes = {cause.value for cause in Cause}
    for cause, measure in gallery.MEASURES.items():
        assert cause in causes
        assert measure.threshold in CONFIG


def test_what_has_no_window_is_shown_by_its_nearest_frame(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0", tracks=1)
    nobody = replace(video.tracks[0], times=(), indices=(), boxes=(), box_scores=(), scores={})
    late = replace(nobody, name="001", times=(1.55,), indices=(40,))
    tracks = tuple(reject_track(track, Cause.TRACK_SHORT, "x") for track in (nobody, late))
    frames = [member for member in only_snapshots(members) if member[0].startswith("id01-v0.")]
    gone = reject(replace(video, tracks=tracks), Cause.TRACK_SHORT, "x")
    unseen = reject(replace(video, video="v1", tracks=(), timeline={}), Cause.TIMELINE_SHORT, "y")
    make_dataset(
        str(tmp_path),
        [(gone, frames), (unseen, [(snapshots.only("id01-v1"), datasets.face_jpeg(64, 0, 3))])],
    )
    choice = gallery.choose(str(tmp_path), gallery.shelve_ledger(str(tmp_path)))
    pictures = gallery.as_pictures(gallery.read_album(str(tmp_path)))
    groups = {group.cause: group for group in gallery.draw_rejects(choice, pictures, CONFIG)}
    first, second = groups["track: short"].shown
    assert first.picture
    assert second.picture
    assert first.picture.time == pytest.approx(1.2), "the middle one"
    assert second.picture.time == pytest.approx(1.6), "the nearest"
    assert first.picture.view == (0, 0, 1920, 1080)
    assert second.picture.detected == (410, 330, 380, 390)
    (third,) = groups["timeline: short"].shown
    assert third.key == "id01-v1"
    assert third.picture
    assert third.picture.jpeg


def test_a_time_line_says_what_is_where(tmp_path: Path) -> None:
    video, members = made_video("id01", "v0", tracks=2, frames=5)
    late = reject_track(video.tracks[1], Cause.CROP_SMALL, "210 px")
    span = Span(name="a", start=0.5, end=1.5)
    make_dataset(
        str(tmp_path),
        [
            (
                replace(video, tracks=(video.tracks[0], late), spans=(span,)),
                [m for m in members if "-001." not in m[0]],
            )
        ],
    )
    choice = gallery.choose(str(tmp_path), gallery.shelve_ledger(str(tmp_path)))
    pictures = gallery.as_pictures(gallery.read_album(str(tmp_path)))
    (strip,) = gallery.draw_strips(choice, pictures)

    def seconds(share: float) -> float:
        return strip.start + share * (strip.end - strip.start)

    listed, faces, kept = strip.lanes
    (left, length, kind), *_ = listed.runs
    assert (listed.name, kind) == ("annotated", "span")
    assert [seconds(left), seconds(left + length)] == pytest.approx([0.5, 1.5], abs=0.01)
    assert [kind for *_, kind in faces.runs] == ["found"] * 10
    assert len(kept.runs) == 5
    assert seconds(kept.runs[-1][0]) < 0.4 + 5 * 0.2
    assert [seconds(cut) for cut in strip.cuts] == pytest.approx([0.9], abs=0.01)
    assert [frame.time for frame in strip.frames if frame.jpeg] == pytest.approx([0.8, 1.2, 1.6])


def test_the_worst_mark_of_a_moment_does_not_hide_a_better_one() -> None:
    order = snapshots.marks([1.0, 1.0, 1.0, 1.0], "-ox-", 0.0, 10.0)
    assert set(order) == {".", "o"}
    line = snapshots.marks([0.0, 0.0, 5.0, 10.0, 99.0], "-ox-o", 0.0, 10.0)
    assert len(line) == snapshots.BINS
    assert (line[0], line[snapshots.BINS // 2], line[-1]) == ("o", "x", "-")
    assert line.count(".") == snapshots.BINS - 3
    assert gallery.runs("..oo-", {"o": "found", "-": "missing"}) == [
        (0.4, 0.4, "found"),
        (0.8, 0.2, "missing"),
    ]


def test_the_strip_of_a_time_map_shows_the_three_boxes() -> None:
    strip = [
        {"time": 1.0, "annotated": [100, 100, 300, 300], "detected": [150, 180, 250, 280]},
        {"time": 2.0, "annotated": [100, 100, 300, 300], "detected": []},
    ]
    relation = {"right": 0.0, "down": 0.1, "width": 0.5, "height": 0.5}
    first, second = gallery.overlays("v", {"strip": strip, "relation": relation}, {}, {})
    assert first.annotated == (100, 100, 200, 200)
    assert first.expected == (150, 170, 100, 100)  # left, top, width, height
    assert first.detected == (150, 180, 100, 100)
    assert second.detected == ()
    for left, top, width, height in (first.annotated, first.expected, first.detected):
        assert first.view[0] < left
        assert left + width < first.view[0] + first.view[2]
        assert first.view[1] < top
        assert top + height < first.view[1] + first.view[3]


def test_time_maps_put_the_doubtful_first(tmp_path: Path) -> None:
    maps = [0.9, 0.2, None, 0.5]
    made = []
    for number, overlap in enumerate(maps):
        shift = {"delta_seconds": 0.0, "delta_confidence": 0.5, "face_found": 1.0}
        if overlap is not None:
            shift["median_iou"] = overlap
        video: Video = made_video("id01", f"v{number}", tracks=0, shift=shift)[0]
        made.append((reject(video, Cause.TIMELINE_EDITED), []))
    make_dataset(str(tmp_path), made)
    choice = gallery.choose(str(tmp_path), gallery.shelve_ledger(str(tmp_path)))
    assert [row["key"][-2:] for row in choice.strips] == ["v1", "v3", "v0", "v2"]
    assert choice.num_strips == 4


# ---------------------------------------------------------------------------------------------- never published


def test_no_snapshot_is_in_a_shard_and_every_part_has_its_own(tmp_path: Path) -> None:
    output = str(tmp_path)
    make_dataset(output, some_videos())
    for path in Path(output, "shards").iterdir():
        assert snapshots.ENDING.encode() not in path.read_bytes()
    index = shards.read_index(output)
    assert not any(
        snapshots.is_snapshot(name) for names in index["members"].to_pylist() for name in names
    )
    (commit,) = shards.load_commits(output, ["id05-v0"])
    assert set(commit.snapshots) == {
        "id05-v0-000.snapshot.jpg",
        *(f"id05-v0.{index:06d}.snapshot.jpg" for index in (2, 3, 4)),
    }
    tar = Path(shards.part_uri(output, "id05-v0", "tar")).read_bytes()
    for offset, length in commit.snapshots.values():
        assert report.decode(tar[offset : offset + length]).size
    assert shards.Commit.from_bytes(commit.to_bytes()) == commit


def test_snapshots_of_a_video_are_bounded_in_number_and_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    assert len(snapshots.encode(noise, snapshots.FRAME_PX)) <= snapshots.MAX_BYTES
    window = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    small = snapshots.encode(window, snapshots.WINDOW_PX)
    assert len(small) <= snapshots.MAX_BYTES
    assert report.decode(small).shape == (160, 160, 3)
    video, members = made_video("id01", "v0", tracks=40, frames=1)
    commit = shards.commit(video, members, str(tmp_path), datasets.CROP)
    assert len(commit.snapshots) == snapshots.MOST
    assert sum(name.startswith("id01-v0.") for name in commit.snapshots) == 3


def test_a_large_list_of_pictures_that_do_not_compress_gives_a_page_that_can_be_sent(
    tmp_path: Path,
) -> None:
    """The worst case of every picture at once: 15 MB, whatever was in the list."""
    output = str(tmp_path)
    draw = np.random.default_rng(5)
    frame = snapshots.encode(draw.integers(0, 256, (144, 256, 3), dtype=np.uint8), 256)
    window = snapshots.encode(draw.integers(0, 256, (160, 160, 3), dtype=np.uint8), 160)
    causes = [cause for cause in Cause if cause.stage not in gallery.NO_PICTURE]
    rows, album = [], []
    for number in range((gallery.PER_CAUSE + 2) * len(causes)):
        video, members = made_video(f"id{number:04d}", "v0", tracks=1)
        track = reject_track(video.tracks[0], causes[number % len(causes)], "why " * 100)
        video = reject(replace(video, tracks=(track,)), causes[number % len(causes)], "why " * 100)
        done = shards.Commit(video=video, tar_sha256="", slices={}, frames={})
        rows += shards.ledger_rows(done, {})
        album += [
            {"identity": video.identity, "video": "v0", "name": name}
            | {"jpeg": window if "-000." in name else frame}
            for name, _ in only_snapshots(members)
        ]
    tally = Tally()
    shards.write_ledger([tally.see(row) for row in rows], output)
    manifest = {
        "schema_version": 1, "dataset_version": 1, "config": CONFIG, "list_sha256": "0" * 64,
        "counts": tally.counts(), "splits": tally.splits(), "members": datasets.CROP,
        "shards": [], "tools": {},
    }  # fmt: skip
    ledger = gallery.shelve_ledger(output)
    thumb = report.Thumb(
        image=draw.integers(0, 256, (160, 160, 3), dtype=np.uint8),
        time=1.0,
        overlay=draw.integers(0, 256, (160, 160, 3), dtype=np.uint8),
        seen=frozenset(),
    )
    tracks = [
        {
            "key": "k",
            "frames": 1,
            "scores": {},
            "thumbs": [replace(thumb, overlay=overlay).shown] * 6,
        }
        for overlay in (thumb.overlay, np.zeros((0, 0, 3), np.uint8))
    ]
    sheets: list[dict[str, Any]] = [
        {"identity": f"{number}", "split": "train", "total": 9, "tracks": tracks}
        for number in range(report.MAX_IDENTITIES)
    ]
    report._write_page(
        output,
        manifest,
        report.Found(
            ledger=ledger,
            choice=gallery.choose(output, ledger),
            album=pa.Table.from_pylist(album, schema=gallery.ALBUM_SCHEMA),
            sheets=sheets,
        ),
    )
    size = Path(output, report.PAGE).stat().st_size
    assert 8e6 < size < 15e6, "large pictures, and all of them were there"
