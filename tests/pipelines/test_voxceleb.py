"""Lists of every form become the same rows; whatever is wrong with a list is told, counted, and loses nothing else."""

import csv
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from jobs import demo
from pipelines import tables, voxceleb
from pipelines.listing import SAFE, ListError, SpanError, safe_name, short_hash, shown
from pipelines.schema import Cause, from_json, to_json
from pipelines.voxceleb import parse_utterance, read_list, read_meta
from tests.material import SHARED, needs_shared

COLUMN_LINE = "FRAME \tX \tY \tW \tH \n"
SPEC_ROWS = "000349 \t0.319 \t0.067 \t0.424 \t0.753 \n000350 \t0.319 \t0.067 \t0.424 \t0.753 \n"
PIXEL_ROWS = "000170 \t413 \t65 \t91 \t91 \n000171 \t403 \t-5 \t91 \t91 \n"


def utterance_text(rows, identity="id00012", video="_raOc3-IRsw", header=""):
    """A file as VoxCeleb ships it: padded keys, tabs, trailing blanks, ``(1)``."""
    return (
        f"Identity  : \t{identity}\nReference : \t{video}\nOffset    : \t2\n"
        f"FV Conf   : \t20.230\t(1)\nASD Conf  : \t2.765\n{header}\n{COLUMN_LINE}{rows}"
    )


class Served(NamedTuple):
    """A folder and where it is served."""

    folder: Path
    url: str


@pytest.fixture
def served(tmp_path):
    """A web server that ignores ``Range``, as Python's does."""
    with demo.serve(tmp_path) as url:
        yield Served(tmp_path, url)


def parse(text, units=None, identity="id00012", video="_raOc3-IRsw"):
    content = text if isinstance(text, bytes) else text.encode()
    return parse_utterance(content, "a/b/00001.txt", identity, video, "00001", units)


def write_tree(root, files):
    """``files``: {(identity, video, utterance): text}, written through fsspec."""
    for (identity, video, name), text in files.items():
        path = f"{root}/txt/{identity}/{video}/{name}.txt"
        fs, inner = fsspec.core.url_to_fs(path)
        fs.makedirs(inner.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(inner, text.encode())


def simple_tree(num_identities=2, num_videos=2, num_utterances=2):
    keys = [
        (f"id{i:05d}", f"video-{i}_{v}abc", f"{u:05d}")
        for i in range(num_identities)
        for v in range(num_videos)
        for u in range(1, num_utterances + 1)
    ]
    return {key: utterance_text(SPEC_ROWS, key[0], key[1]) for key in keys}


def by_video(videos):
    return {(video.identity, video.video): video for video in videos}


# One utterance


def test_the_example_of_the_specification():
    span = parse(utterance_text(SPEC_ROWS))
    assert span.times == (13.96, 14.0)
    assert span.units == "fraction"
    left, top, right, bottom = np.array(span.boxes[0]) * (1280, 720, 1280, 720)
    assert (left, top, right, bottom) == pytest.approx((408.3, 48.2, 951.0, 590.4), abs=0.05)
    assert (span.audio_offset, span.fv_conf, span.asd_conf) == (2, 20.230, 2.765)


def test_voxceleb1_is_pixels_at_height_360():
    span = parse(utterance_text(PIXEL_ROWS), "height360")
    assert span.units == "height360"
    assert span.boxes == ((413, 65, 504, 156), (403, -5, 494, 86))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\t", "  "),
        lambda text: text.replace(" \n", "\n"),
        lambda text: text + "\n\n",
        lambda text: "\n\n" + text.replace("\t(1)", ""),
        lambda text: text.rstrip(),
        lambda text: text.replace(COLUMN_LINE, "Seen : twice\n" + COLUMN_LINE + "\n"),
    ],
)
def test_layout_of_the_text_does_not_matter(change):
    text = utterance_text(SPEC_ROWS)
    assert parse(change(text)) == parse(text)


def test_a_box_of_fractions_may_be_taller_than_the_frame():
    assert parse(utterance_text("1 0.0 -0.2 0.9 1.5\n2 0.0 -0.2 0.9 1.5\n")).units == "fraction"


@pytest.mark.parametrize(
    "row", ["1 1.0 .1 .2 .2", "1 .1 1.0 .2 .2", "1 -.2 .1 .2 .2", "1 .1 -.2 .2 .2"]
)
def test_a_box_that_only_reaches_an_edge_shows_nothing_of_the_frame(row):
    with pytest.raises(SpanError, match="outside the frame"):
        parse(utterance_text(row))


def test_offset_never_moves_a_frame():
    text = utterance_text(SPEC_ROWS)
    moved = parse(text.replace("Offset    : \t2", "Offset    : \t-5"))
    assert moved.times == parse(text).times
    assert moved.audio_offset == -5


thousandths = st.integers(-300, 900)
sides = st.integers(1, 1500)
box_rows = st.lists(st.tuples(thousandths, thousandths, sides, sides), min_size=1, max_size=30)


@given(rows=box_rows, start=st.integers(0, 2_000_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_voxceleb2_writes_is_read_back(rows, start, data):
    rows = [(x, y, max(w, 1 - x), max(h, 1 - y)) for x, y, w, h in rows]  # touches the frame
    steps = data.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
    frames = start + np.cumsum(steps)
    text = "".join(
        f"{frame:06d} \t" + "".join(f"{value / 1000:.3f} \t" for value in row)[:-1] + "\n"
        for frame, row in zip(frames, rows, strict=True)
    )
    span = parse(utterance_text(text), "fraction")
    assert span.times == tuple(frame / 25 for frame in frames.tolist())
    expected = [(x / 1000, y / 1000, (x + w) / 1000, (y + h) / 1000) for x, y, w, h in rows]
    np.testing.assert_allclose(span.boxes, expected, rtol=0, atol=5e-7)


@given(rows=st.lists(st.tuples(st.integers(-90, 600), st.integers(-90, 340), sides), min_size=1))
@settings(max_examples=40, deadline=None)
def test_what_voxceleb1_writes_is_read_back(rows):
    rows = [(x, y, 91 + side // 4) for x, y, side in rows]
    text = "".join(f"{i:06d} \t{x} \t{y} \t{s} \t{s} \n" for i, (x, y, s) in enumerate(rows))
    span = parse(utterance_text(text))
    assert span.units == "height360"
    assert list(span.boxes) == [(x, y, x + s, y + s) for x, y, s in rows]


@pytest.mark.parametrize(
    ("rows", "cause", "words"),
    [
        ("000001 0.1 nan 0.4 0.7", Cause.LIST_BOXES, "line 8: Y is nan"),
        ("000001 0.1 0.1 inf 0.7", Cause.LIST_BOXES, "line 8: W is inf"),
        ("000001 0.1 0.1 1e999 0.7", Cause.LIST_BOXES, "finite"),
        ("000001 0.1 0.1 -0.4 0.7", Cause.LIST_BOXES, "line 8 (000001 0.1 0.1 -0.4 0.7)"),
        ("000001 0.1 0.1 0.4 0", Cause.LIST_BOXES, "positive"),
        ("000001 1.2 0.1 0.4 0.7", Cause.LIST_BOXES, "outside the frame"),
        ("000001 -0.5 0.1 0.4 0.7", Cause.LIST_BOXES, "outside the frame"),
        ("000001 0.1 0.1 40 0.7", Cause.LIST_BOXES, "larger than two"),
        ("000001 0.1 0.1 0.4", Cause.LIST_MALFORMED, "line 8: 4 values"),
        ("000001 0.1 0.1 0.4 0.7 9", Cause.LIST_MALFORMED, "line 8: 6 values"),
        ("000001 0.1 O.1 0.4 0.7", Cause.LIST_MALFORMED, "Y is 'O.1'"),
        ("000001 0.1 1_0 0.4 0.7", Cause.LIST_MALFORMED, "Y is '1_0'"),
        ("000001 0.1 0.1.1 0.4 0.7", Cause.LIST_MALFORMED, "Y is '0.1.1'"),
        ("000001 0.1 ٠.١ 0.4 0.7", Cause.LIST_MALFORMED, "line 8: Y"),
        ("1.5 0.1 0.1 0.4 0.7", Cause.LIST_MALFORMED, "FRAME must be whole"),
        ("-1 0.1 0.1 0.4 0.7", Cause.LIST_MALFORMED, "FRAME"),
        ("99999999 0.1 0.1 0.4 0.7", Cause.LIST_MALFORMED, "at most 2160000"),
        ("2 0.1 0.1 0.4 0.7\n\n2 0.1 0.1 0.4 0.7", Cause.LIST_MALFORMED, "line 10 (2 "),
        ("3 0.1 0.1 0.4 0.7\n2 0.1 0.1 0.4 0.7", Cause.LIST_MALFORMED, "line 9 (2 "),
        ("", Cause.LIST_MALFORMED, "no rows"),
    ],
)
def test_a_bad_row_is_named(rows, cause, words):
    with pytest.raises(SpanError) as error:
        parse(utterance_text(rows))
    assert error.value.cause == cause
    assert words in error.value.detail
    assert "a/b/00001.txt" in error.value.detail


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace("id00012", "id00013"), "Identity is id00013, the path says id00012"),
        (lambda t: t.replace("_raOc3-IRsw", "x"), "Reference is x, the path says _raOc3-IRsw"),
        (lambda t: t.replace("Identity  : \tid00012\n", ""), "Identity is missing"),
        (lambda t: t.replace("\t20.230", "\thigh"), "FV Conf is 'high'"),
        (lambda t: t.replace("FV Conf   :", "FV Conf"), "line 4: FV Conf"),
        (lambda t: t.replace(COLUMN_LINE, ""), "there is none"),
        (lambda t: t.replace("FRAME \tX \tY", "FRAME \tY \tX"), "expected a line FRAME X Y W H"),
        (lambda _: "", "there is none"),
        (lambda _: "\x00\x01PK", "there is none"),
        (lambda _: "<html>404</html>", "there is none"),
    ],
)
def test_a_bad_header_is_named(change, words):
    with pytest.raises(SpanError) as error:
        parse(change(utterance_text(SPEC_ROWS)))
    assert error.value.cause == Cause.LIST_MALFORMED
    assert words in error.value.detail


def test_values_that_contradict_the_list_are_refused():
    with pytest.raises(SpanError, match=r"pixels .VoxCeleb1., but the list holds fractions"):
        parse(utterance_text(PIXEL_ROWS), "fraction")
    with pytest.raises(SpanError, match=r"fractions .VoxCeleb2., but the list holds pixels"):
        parse(utterance_text(SPEC_ROWS), "height360")


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(junk):
    for content in (junk, utterance_text("").encode() + junk):
        try:
            span = parse(content)
        except SpanError:
            continue
        assert np.isfinite(span.boxes).all()
        assert np.isfinite(span.times).all()


# Trees


def test_a_tree_gives_one_row_per_video_sorted(tmp_path):
    files = simple_tree(3, 2, 3)
    write_tree(tmp_path, dict(reversed(files.items())))
    videos = list(read_list(str(tmp_path), url_template="http://mirror/{video}.mp4"))
    assert [(v.identity, v.video) for v in videos] == sorted({key[:2] for key in files})
    for video in videos:
        assert video.url == f"http://mirror/{video.video}.mp4"
        assert [span.name for span in video.spans] == ["00001", "00002", "00003"]
        assert video.live
        assert from_json(to_json(video)) == video


def make_zip(folder, target, **options):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder), **options)


def test_zip_folder_and_memory_are_one(tmp_path):
    folder = tmp_path / "list"
    write_tree(folder, simple_tree())
    (folder / "vox2_meta.csv").write_text(
        "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00000 ,n1 ,m ,dev \nid00001 ,n2 ,f ,test \n"
    )
    make_zip(folder, tmp_path / "list.zip")
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/one/list.zip", (tmp_path / "list.zip").read_bytes())
    fs.put(str(folder), "/one/list", recursive=True)
    expected = list(read_list(str(folder)))
    assert [(v.split, v.gender) for v in expected] == [("train", "m")] * 2 + [("test", "f")] * 2
    for uri in (
        folder / "txt",
        tmp_path / "list.zip",
        "memory://one/list.zip",
        "memory://one/list",
    ):
        assert list(read_list(str(uri))) == expected
    fs.rm("/one", recursive=True)


def test_people_of_dev_and_test_trees_come_in_one_order(tmp_path):
    """Publication goes through a list sorted by identity, and VoxCeleb1's test people lie between those of dev."""
    files = simple_tree(5, 1, 1)
    for number, key in enumerate(sorted(files)):
        write_tree(tmp_path / "vox" / ("dev", "test")[number % 2], {key: files[key]})
    make_zip(tmp_path / "vox", tmp_path / "vox.zip")
    for uri in (tmp_path / "vox", tmp_path / "vox.zip"):
        found = [video.identity for video in read_list(str(uri), "voxceleb2")]
        assert found == [f"id{number:05d}" for number in range(5)]


def test_a_person_on_two_lines_of_the_meta_must_be_the_same():
    lines = "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid1 ,n1 ,m ,dev \nid1 ,n1 ,m ,{} \n"
    assert read_meta(lines.format("dev").encode(), "meta") == {"id1": ("train", "m")}
    with pytest.raises(ListError, match="line 3: id1 is listed twice"):
        read_meta(lines.format("test").encode(), "meta")


def test_names_made_of_anything_are_safe_and_no_list_is_told_with_its_password():
    made = {short_hash(f"text {number}") for number in range(500)}
    assert len(made) == 500
    assert all(SAFE.fullmatch(name) and not name.startswith("-") for name in made)
    for uri in ("s3://key:hunter2@bucket/list.zip", "https://me:hunter2@host/a.csv?sig=hunter2"):
        assert "hunter2" not in shown(uri)
        assert "://" in shown(uri)


def test_dev_and_test_trees_are_joined_and_meta_beside_a_zip_counts(tmp_path):
    files = simple_tree(2, 1, 1)
    for part, key in zip(("dev", "test"), sorted(files), strict=True):
        write_tree(tmp_path / "vox" / part, {key: files[key]})
    meta = "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
    meta += "id00000\tA.J._Buckley\tm\tIreland\tdev\nid00001\tAbbie\tf\tUK\ttest\n"
    (tmp_path / "vox1_meta.csv").write_text(meta)
    make_zip(tmp_path / "vox", tmp_path / "vox.zip")
    with pytest.raises(ListError, match="of the other VoxCeleb"):
        read_list(str(tmp_path / "vox"))
    for uri in (tmp_path / "vox", tmp_path / "vox.zip"):
        videos = list(read_list(str(uri), "voxceleb2"))
        assert [(v.identity, v.split, v.gender) for v in videos] == [
            ("id00000", "train", "m"),
            ("id00001", "test", "f"),
        ]


def test_one_bad_utterance_loses_only_itself(tmp_path):
    files = simple_tree(1, 2, 3)
    identity, video, _ = next(iter(files))
    files[identity, video, "00002"] = utterance_text("1 0.1 nan 0.4 0.7", identity, video)
    files[identity, video, "00004"] = utterance_text(PIXEL_ROWS, identity, video)
    files[identity, video, "00005"] = utterance_text(SPEC_ROWS, "id99999", video)
    write_tree(tmp_path, files)
    bad, good = read_list(str(tmp_path))
    assert bad.live
    assert [span.name for span in bad.spans] == ["00001", "00003"]
    assert [(t.name, t.span, t.state, t.cause) for t in bad.tracks] == [
        ("span-000", "00002", "rejected", "list: boxes"),
        ("span-001", "00004", "rejected", "list: boxes"),
        ("span-002", "00005", "rejected", "list: malformed"),
    ]
    assert "Y is nan" in bad.tracks[0].detail
    assert "00002.txt" in bad.tracks[0].detail
    assert not good.tracks
    assert len(good.spans) == 3


def test_a_video_without_a_usable_span_is_rejected_and_keeps_every_reason(tmp_path):
    files = simple_tree(1, 2, 2)
    identity, video, _ = next(iter(files))
    files[identity, video, "00001"] = ""
    files[identity, video, "00002"] = utterance_text("1 0.1 0.1 0.4 -1", identity, video)
    write_tree(tmp_path, files)
    bad, good = read_list(str(tmp_path))
    assert (bad.state, bad.cause) == ("rejected", "list: malformed")
    assert [track.cause for track in bad.tracks] == ["list: malformed", "list: boxes"]
    assert good.live


@pytest.mark.parametrize(
    "name", ["..", "a b", "ünsafe", "a.b", "x" * 65, "a\nb", "--output=x;rm", "$(id)"]
)
def test_unsafe_ids_are_rejected_under_a_safe_name(tmp_path, name):
    path = tmp_path / "list.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for key, text in simple_tree(1, 1, 1).items():
            archive.writestr("txt/" + "/".join(key) + ".txt", text)
        archive.writestr(f"../../{name}/{name}/00001.txt", utterance_text(SPEC_ROWS, name, name))
    videos = list(read_list(str(path)))
    assert len(videos) == 2
    (unsafe,) = (video for video in videos if not video.live)
    assert unsafe.cause == Cause.LIST_UNSAFE
    assert unsafe.identity == unsafe.video == safe_name(name)
    assert SAFE.fullmatch(unsafe.identity)
    assert unsafe.url == ""
    assert from_json(to_json(unsafe)) == unsafe
    assert list(read_list(str(path))) == videos


def test_names_that_look_like_patterns_are_only_names(tmp_path):
    files = simple_tree(1, 1, 1)
    for name in ("a[1]", "b*", "c?"):
        files[name, name, "00001"] = utterance_text(SPEC_ROWS, name, name)
    write_tree(tmp_path, files)
    videos = list(read_list(str(tmp_path), "voxceleb2"))
    assert sorted(video.cause for video in videos) == ["", *[Cause.LIST_UNSAFE] * 3]


def test_file_names_that_are_not_utf8_are_rejected_rows(tmp_path):
    folder = tmp_path / "txt" / os.fsdecode(b"id\xff\xfe") / "video"
    folder.mkdir(parents=True)
    (folder / "00001.txt").write_text(utterance_text(SPEC_ROWS))
    (video,) = read_list(str(tmp_path), "voxceleb2")
    assert video.cause == Cause.LIST_UNSAFE
    assert from_json(to_json(video)) == video


def test_the_same_utterance_twice_is_counted_once(tmp_path):
    ((key, text),) = simple_tree(1, 1, 1).items()
    write_tree(tmp_path / "dev", {key: text})
    write_tree(tmp_path / "test", {key: text})
    (video,) = read_list(str(tmp_path))
    assert len(video.spans) == 1
    assert [track.cause for track in video.tracks] == [Cause.LIST_DUPLICATE]


def test_two_videos_never_share_a_key(tmp_path):
    keys = [("a", "b-c"), ("a-b", "c"), ("a-b", "d")]
    write_tree(tmp_path, {(*k, "00001"): utterance_text(SPEC_ROWS, *k) for k in keys})
    videos = list(read_list(str(tmp_path)))
    assert [video.live for video in videos] == [True, False, True]
    assert videos[1].cause == Cause.LIST_DUPLICATE
    assert len({video.key for video in videos}) == 3


def test_hostile_zip_members_are_refused_one_by_one(tmp_path):
    path = tmp_path / "list.zip"
    files = simple_tree(1, 1, 1)
    bomb = b" " * (voxceleb.MAX_UTTERANCE_BYTES + 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, text in files.items():
            archive.writestr("txt/" + "/".join(key) + ".txt", text)
        archive.writestr("txt/id00000/video-0_0abc/00002.txt", bomb)
        archive.writestr("txt/id00000/video-0_0abc/00003.txt", "damaged" * 50)
        archive.writestr("txt/id00000/video-0_0abc/00004.txt", "locked" * 50)
        archive.writestr("__MACOSX/txt/id00000/video-0_0abc/._00001.txt", "junk")
        archive.writestr("README.txt", "junk")
        at = archive.getinfo("txt/id00000/video-0_0abc/00003.txt").header_offset
    data = bytearray(path.read_bytes())
    data[at + 30 + 40] ^= 0xFF
    locked = data.rindex(b"txt/id00000/video-0_0abc/00004.txt") - 46
    data[locked + 8] |= 1  # the central directory now says: encrypted
    path.write_bytes(bytes(data))
    (video,) = read_list(str(path))
    assert [span.name for span in video.spans] == ["00001"]
    details = {track.span: track.detail for track in video.tracks}
    assert set(details) == {"00002", "00003", "00004"}
    assert "too large" in details["00002"]
    assert "password" in details["00004"]
    assert not list(tmp_path.glob("txt*"))


def test_files_too_large_or_forbidden_are_refused(tmp_path):
    files = simple_tree(1, 1, 1)
    write_tree(tmp_path, files)
    folder = tmp_path / "txt" / "id00000" / "video-0_0abc"
    (folder / "00002.txt").write_bytes(b" " * (voxceleb.MAX_UTTERANCE_BYTES + 1))
    (folder / "00003.txt").symlink_to(folder / "nowhere.txt")
    (folder / "loop").symlink_to(tmp_path)
    (video,) = read_list(str(tmp_path))
    assert [span.name for span in video.spans] == ["00001"]
    assert "too large" in video.tracks[0].detail


def test_iterating_holds_one_video_at_a_time(tmp_path, monkeypatch):
    write_tree(tmp_path, simple_tree(4, 2, 2))
    num_read = Counter()
    read = voxceleb.FolderTree.read
    monkeypatch.setattr(
        voxceleb.FolderTree,
        "read",
        lambda tree, files: num_read.update(n=1) or read(tree, files),
    )
    videos = read_list(str(tmp_path), "voxceleb2")
    assert num_read["n"] == 1
    for expected in range(1, 8):
        next(videos)
        assert num_read["n"] == expected


# Tables


def write_table(path, rows):
    """The same rows as csv, jsonl or parquet, by the name's ending."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(
            pyarrow.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), path
        )
    return str(path)


PEOPLE = [
    {"identity": "anna", "url": "https://example.org/a.mp4", "video": "a", "split": "dev"},
    {"identity": "anna", "url": "https://example.org/b.mp4", "start": 1.5, "end": 4.0},
    {"identity": "bert", "url": "https://example.org/c?v=1&t=2", "video": "c", "start": 7.0,
     "end": 7.2, "left": -0.05, "top": 0.1, "right": 0.4, "bottom": 0.8},
    {"identity": "bert", "url": "https://example.org/c?v=1&t=2", "video": "c", "start": 1.0,
     "end": 1.08, "left": 10.0, "top": 20.0, "right": 110.0, "bottom": 120.0,
     "width": 640.0, "height": 360.0},
]  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_of_every_kind(tmp_path, ending):
    videos = by_video(read_list(write_table(tmp_path / f"list.{ending}", PEOPLE)))
    name = short_hash("https://example.org/b.mp4")
    assert list(videos) == sorted([("anna", "a"), ("anna", name), ("bert", "c")])
    assert videos["anna", "a"].split == "train"
    whole = videos["anna", "a"].spans[0]
    assert (whole.start, whole.end, whole.boxes) == (0, 0, ())
    part = videos["anna", name].spans[0]
    assert (part.start, part.end) == (1.5, 4.0)
    pixels, fractions = videos["bert", "c"].spans
    assert (pixels.name, fractions.name) == ("00001", "00002")
    assert (pixels.units, pixels.reference) == ("pixels", (640, 360))
    assert pixels.times == (1.0, 1.04)
    assert pixels.boxes == ((10, 20, 110, 120),) * 2
    assert fractions.units == "fraction"
    assert fractions.times == pytest.approx([7.0, 7.04, 7.08, 7.12, 7.16])
    assert fractions.boxes[0] == (-0.05, 0.1, 0.4, 0.8)


def test_order_of_rows_and_separator_do_not_matter(tmp_path):
    expected = list(read_list(write_table(tmp_path / "a.csv", PEOPLE)))
    assert list(read_list(write_table(tmp_path / "b.csv", PEOPLE[::-1]))) == expected
    text = "\ufeff" + (tmp_path / "a.csv").read_text().replace(",", " ; ").replace("\n", "\r\n")
    (tmp_path / "c.csv").write_text(text)
    assert list(read_list(str(tmp_path / "c.csv"))) == expected


def vox_metadata(rows):
    lines = ["video_id,start,end,bbox,fps,width,height,partition,person_id", *rows]
    return "\n".join(lines) + "\n"


def test_a_video_on_both_sides_is_tested_on_or_with_a_legacy_split_on_both(tmp_path):
    """As id10282 and id10306 of the published file: the same clips for training and for testing."""
    path = tmp_path / "vox-metadata.csv"
    rows = [
        f"ST2JZXcyYkE,{first},{first + 80},10-20-300-400,25,1280,720,{side},id10306"
        for side in ("train", "test")
        for first in (0, 100)
    ]
    rows.insert(2, "ST2JZXcyYkE,300,400,10-20-300-400,25,1280,720,train,id10306")
    rows.append("otherotherx,0,80,10-20-300-400,25,1280,720,train,id10306")
    path.write_text(vox_metadata(rows))
    clean, other = read_list(str(path))
    assert (clean.video, clean.split, len(clean.spans)) == ("ST2JZXcyYkE", "test", 2)
    assert {track.cause for track in clean.tracks} == {"list: duplicate"}
    assert len(clean.tracks) == 3
    assert "for train, but line 5 has the video for test" in clean.tracks[0].detail
    assert (other.video, other.split) == ("otherotherx", "train")
    tested, trained, _ = read_list(str(path), both_sides=True)
    assert (tested.video, tested.split, len(tested.spans)) == ("ST2JZXcyYkE", "test", 2)
    assert (trained.video, trained.split, len(trained.spans)) == ("ST2JZXcyYkE_train", "train", 3)
    assert tested.url == trained.url
    assert not tested.tracks
    assert not trained.tracks


def test_files_that_each_show_another_person(tmp_path):
    for name in ("000.mp4", "001.avi", "not plain.mp4", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "002.mp4").write_bytes(b"")
    videos = list(read_list(str(tmp_path), "files"))
    assert len(videos) == 3
    assert [video.identity for video in videos[:2]] == ["000", "001"]
    assert [video.video for video in videos[:2]] == ["000", "001"]
    assert videos[0].path == str(tmp_path / "000.mp4")
    assert len({video.identity for video in videos}) == 3
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ListError, match="empty"):
        read_list(str(tmp_path / "nothing"), "files")


def test_vox_metadata(tmp_path):
    path = tmp_path / "vox-metadata.csv"
    row = "WMh3ye5tBsE,3657,3660,624-48-1018-753,25,1280,720,train,id10005"
    path.write_text(
        vox_metadata(
            [
                row,
                "abcdefghijk,50,60,1-2-300-400,50,640,480,test,id10004",
                row,
                "WMh3ye5tBsE,3467,3576,610-41-989-550,25,1280,720,train,id10005",
                "WMh3ye5tBsE,100,200,610-41-989,25,1280,720,train,id10005",
            ]
        )
    )
    other, video = read_list(str(path))
    assert (other.identity, other.split, other.spans[0].times[0]) == ("id10004", "test", 1.0)
    assert len(other.spans[0].times) == 5  # 10 frames at 50 fps: 0.2 s
    assert video.url == "https://www.youtube.com/watch?v=WMh3ye5tBsE"
    assert video.split == "train"
    assert video.spans[1].times == pytest.approx([3657 / 25, 3658 / 25, 3659 / 25])
    assert video.spans[1].boxes[0] == (624, 48, 1018, 753)
    assert video.spans[1].reference == (1280, 720)
    assert {track.span: track.cause for track in video.tracks} == {
        "line4": "list: duplicate",
        "line6": "list: malformed",
    }
    assert list(read_list(str(path), "vox-metadata")) == [other, video]
    path.write_text(path.read_text().replace(",person_id", "").replace(",id1000", ""))
    text = (
        "video_id,start,end,bbox,fps,width,height,partition\nvid#id1,0,9,1-2-30-40,25,64,48,test\n"
    )
    path.write_text(text)
    (video,) = read_list(str(path))
    assert (video.identity, video.video) == ("id1", "vid")


BAD_ROWS = [
    ({"url": "ftp://example.org/x.mp4"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "javascript:alert(1)"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "//example.org/x"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "s3://bucket/x.mp4"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "file:///etc/passwd"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "", "path": "/etc/passwd"}, Cause.LIST_UNSAFE),
    ({"url": "", "path": "../x.mp4"}, Cause.LIST_UNSAFE),
    ({"url": "https://user:secret@example.org/x"}, Cause.LIST_UNSAFE),
    ({"url": "https://example.org/a b"}, Cause.LIST_UNSAFE),
    ({"url": "https:///x"}, Cause.LIST_UNSAFE),
    ({"url": "file://[/x"}, Cause.LIST_MALFORMED),
    ({"url": "file://server/x"}, Cause.DOWNLOAD_SCHEME),
    ({"url": "HTTPS://example.org/\\x"}, Cause.LIST_UNSAFE),
    ({"url": "https://[::1/x"}, Cause.LIST_MALFORMED),
    ({"url": ""}, Cause.LIST_MALFORMED),
    ({"path": "x.mp4"}, Cause.LIST_MALFORMED),
    ({"identity": ""}, Cause.LIST_MALFORMED),
    ({"identity": "../../x"}, Cause.LIST_UNSAFE),
    ({"video": "a/b"}, Cause.LIST_UNSAFE),
    ({"start": "soon"}, Cause.LIST_MALFORMED),
    ({"start": "-1"}, Cause.LIST_MALFORMED),
    ({"start": "5", "end": "5"}, Cause.LIST_MALFORMED),
    ({"end": "1e9"}, Cause.LIST_MALFORMED),
    ({"split": "training"}, Cause.LIST_MALFORMED),
    ({"left": "1"}, Cause.LIST_MALFORMED),
    ({"left": "nan", "top": "0", "right": "1", "bottom": "1", "end": "1"}, Cause.LIST_BOXES),
    ({"left": "1", "top": "0", "right": "0", "bottom": "1", "end": "1"}, Cause.LIST_BOXES),
    ({"left": "10", "top": "10", "right": "90", "bottom": "90", "end": "1"}, Cause.LIST_BOXES),
    ({"left": "0", "top": "0", "right": "1", "bottom": "1"}, Cause.LIST_BOXES),
    ({"left": "0", "top": "0", "right": "1", "bottom": "1", "end": "9000"}, Cause.LIST_BOXES),
    ({"gender": "<script>"}, Cause.LIST_MALFORMED),
]


@pytest.mark.parametrize(("change", "cause"), BAD_ROWS)
def test_a_bad_row_of_a_table_is_rejected_alone(tmp_path, change, cause):
    good = {"identity": "anna", "url": "https://example.org/a.mp4", "video": "good"}
    bad = {"identity": "anna", "url": "https://example.org/x.mp4", "video": "bad"} | change
    path = write_table(tmp_path / "list.csv", [good, bad, {**good, "start": "3", "path": ""}])
    videos = list(read_list(path))
    assert len(videos) == 2
    (rejected,) = (video for video in videos if not video.live)
    (kept,) = (video for video in videos if video.live)
    assert rejected.cause == cause
    assert str(tmp_path / "list.csv") in rejected.detail
    assert SAFE.fullmatch(rejected.identity)
    assert SAFE.fullmatch(rejected.video)
    assert "secret" not in to_json(rejected)
    assert len(kept.spans) == 2


def test_local_files_need_permission_and_start_from_the_table(tmp_path):
    rows = [
        {"identity": "a", "path": "clips/x y.mp4", "video": "x"},
        {"identity": "a", "path": "/data/y.mp4", "video": "y"},
        {"identity": "a", "path": "s3://bucket/z.mp4", "video": "z"},
    ]
    path = write_table(tmp_path / "list.jsonl", rows)
    assert {video.cause for video in read_list(path)} == {Cause.LIST_UNSAFE}
    videos = by_video(read_list(path, allow_local=True))
    assert videos["a", "x"].path == f"{tmp_path}/clips/x y.mp4"
    assert videos["a", "y"].path == "/data/y.mp4"
    assert videos["a", "z"].path == "s3://bucket/z.mp4"
    rows = [{"identity": "a", "url": "file:///data/a%20b.mp4", "video": "x"}]
    (video,) = read_list(write_table(tmp_path / "b.csv", rows), allow_local=True)
    assert (video.url, video.path) == ("", "/data/a b.mp4")


def test_rows_that_disagree_about_one_video(tmp_path):
    rows = [
        {"identity": "a", "video": "x", "url": "https://e.org/1", "split": "train", "start": 0},
        {"identity": "a", "video": "x", "url": "https://e.org/2", "split": "train", "start": 1},
        {"identity": "a", "video": "x", "url": "https://e.org/1", "split": "test", "start": 2},
        {"identity": "a", "video": "x", "url": "https://e.org/1", "split": "dev", "start": 3},
    ]
    (video,) = read_list(write_table(tmp_path / "list.csv", rows))
    assert (video.url, video.split, len(video.spans)) == ("https://e.org/1", "train", 2)
    assert [track.span for track in video.tracks] == ["line3", "line4"]
    assert "differ from line 2" in video.tracks[0].detail


def test_broken_lines_are_rows_too(tmp_path):
    good = "anna,https://e.org/1\n"
    path = tmp_path / "list.csv"
    path.write_bytes(
        f"identity,url\n{good}anna\nanna,https://e.org/2,3\n\n".encode()
        + b'"anna"x,https://e.org/3\nan\xffna,https://e.org/4\nbert,https://e.org/5\n'
    )
    videos = list(read_list(str(path)))
    assert sorted(video.cause for video in videos) == [
        "", "", *[Cause.LIST_MALFORMED] * 3, Cause.LIST_UNSAFE,
    ]  # fmt: skip
    assert len({video.key for video in videos}) == 6
    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"identity": "a", "url": "https://e.org/1"}\n{"identity": \n[1]\n{"identity": {}}\n'
        + '{"identity": "\\ud800", "url": "https://e.org/2"}\n'
        + "[" * 5000
        + "\n"
    )
    videos = list(read_list(str(path)))
    assert Counter(video.live for video in videos) == {True: 1, False: 5}
    assert all(from_json(to_json(video)) == video for video in videos)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(tables.TABLE_COLUMNS),
            st.text(max_size=12) | st.floats() | st.integers() | st.none() | st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_rows_are_read_or_refused(tmp_path_factory, rows):
    rows[0] |= {"identity": "x", "url": "https://e.org/1"}
    path = tmp_path_factory.mktemp("table") / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    videos = list(read_list(str(path)))
    assert len({video.key for video in videos}) == len(videos)
    total = sum(len(video.spans) + len(video.tracks) for video in videos)
    assert total == len(rows)
    for video in videos:
        assert SAFE.fullmatch(video.identity)
        assert SAFE.fullmatch(video.video)
        assert not video.path
        assert from_json(to_json(video)) == video


# Folders of videos


def test_a_folder_of_videos(tmp_path):
    names = ["anna/one.mp4", "anna/one.mov", "anna/two words.mkv", "anna/day 1/three.MP4"]
    names += ["bert/x-y_z.webm", "bert/notes.pdf", "bert/._x.mp4", ".trash/q/x.mp4", "loose.mp4"]
    names += ["bert/why?.mp4", os.fsdecode(b"carl/\xff.mp4")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    videos = list(read_list(str(tmp_path)))
    loose, unreadable = (video for video in videos if not video.live)
    assert loose.cause == Cause.LIST_MALFORMED
    assert "loose.mp4" in loose.detail
    assert (unreadable.identity, unreadable.cause) == ("carl", Cause.LIST_UNSAFE)
    assert all(from_json(to_json(video)) == video for video in videos)
    found = {video.path: (video.identity, video.video) for video in videos if video.live}
    assert found == {
        f"{tmp_path}/anna/one.mov": ("anna", "one"),
        f"{tmp_path}/anna/one.mp4": ("anna", short_hash("one.mp4")),
        f"{tmp_path}/anna/two words.mkv": ("anna", short_hash("two words.mkv")),
        f"{tmp_path}/anna/day 1/three.MP4": ("anna", short_hash("day 1/three.MP4")),
        f"{tmp_path}/bert/x-y_z.webm": ("bert", "x-y_z"),
        f"{tmp_path}/bert/why?.mp4": ("bert", short_hash("why?.mp4")),
    }
    assert all(len(video.spans) == 1 and not video.spans[0].boxes for video in videos if video.live)


def test_a_folder_elsewhere_gives_uris():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/videos/anna/one.mp4", b"x")
    (video,) = read_list("memory://videos")
    assert fsspec.open(video.path, "rb").open().read() == b"x"
    fs.rm("/videos", recursive=True)


# Whole lists


def test_unusable_lists_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("identity,url\n")
    (tmp_path / "columns.csv").write_text("person,link\na,b\n")
    (tmp_path / "bad.parquet").write_text("PAR1 not really")
    (tmp_path / "bad.zip").write_text("PK not really")
    (tmp_path / "list.docx").write_text("?")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("README", "nothing")
    write_tree(tmp_path / "junk", {("a", "b", "00001"): "junk"})
    (tmp_path / "meta").mkdir()
    write_tree(tmp_path / "meta", simple_tree(1, 1, 1))
    (tmp_path / "meta" / "vox2_meta.csv").write_text("VoxCeleb2 ID ,Gender ,Set \nid1 ,m ,?\n")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "one.mp4").write_bytes(b"")
    (tmp_path / "cut.jsonl").write_text('{"identity": "anna", "url": \n')
    cases = {
        "nowhere": "no such file or folder",
        "loose": "--input-format files",
        "loose/one.mp4": "a folder for each person",
        "cut.jsonl": "line 1: not JSON",
        "empty": "no list in it",
        "empty.csv": "empty",
        "header.csv": "empty",
        "columns.csv": "missing column identity, url or path",
        "bad.parquet": "not a readable table",
        "bad.zip": "not a readable zip",
        "list.docx": "no list in it",
        "none.zip": "no <identity>/<video>/<utterance>.txt",
        "junk": "none of 1 utterance files reads",
        "meta": "Set must be dev or test",
    }
    for name, words in cases.items():
        with pytest.raises(ListError, match=re.escape(words)) as error:
            read_list(str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
    for uri in ("gopher://x/y", "http://127.0.0.1:9/list.csv"):
        with pytest.raises(ListError, match=uri):
            read_list(uri)
    with pytest.raises(ListError, match="unknown format 'voxceleb3'"):
        read_list(str(tmp_path), "voxceleb3")
    with pytest.raises(ListError, match="unpack it"):
        read_list(str(tmp_path / "none.zip"), "folder")


# The real list


@needs_shared
@pytest.mark.real
def test_the_shared_list(tmp_path):
    root = SHARED / "lists" / "voxceleb2"
    videos = list(read_list(str(root)))
    with (root / "videos.csv").open() as file:
        listed = {(row["identity"], row["video"]): row for row in csv.DictReader(file)}
    assert [(v.identity, v.video) for v in videos] == sorted(listed)
    tests = {v.identity for v in videos if v.split == "test"}
    assert tests == {"id90002", "id90005"}
    assert {v.split for v in videos} == {"train", "test"}
    for video in videos:
        row = listed[video.identity, video.video]
        assert video.live
        assert not video.tracks
        assert sum(len(span.times) for span in video.spans) == int(row["annotated_frames"])
        boxes = np.concatenate([span.boxes for span in video.spans])
        size = (boxes[:, 2:] - boxes[:, :2]) * (int(row["width"]), int(row["height"]))
        np.testing.assert_allclose(size[:, 0] / size[:, 1], 1, atol=0.02)  # square in pixels
    make_zip(root, tmp_path / "list.zip")
    assert list(read_list(str(tmp_path / "list.zip"))) == videos


@pytest.mark.parametrize(
    "url", ["ftp://me:hush@h.example/x.mp4", 'https://h.example/"x?X-Amz-Signature=hush']
)
def test_details_hold_no_password_and_no_signature(tmp_path, url):
    (tmp_path / "list.jsonl").write_text(json.dumps({"identity": "anna", "url": url}))
    (video,) = read_list(str(tmp_path / "list.jsonl"))
    assert video.state == "rejected"
    assert "h.example" in video.detail
    assert "hush" not in to_json(replace(video, url=""))


def test_address_of_the_list_is_told_without_its_signature(served):
    (served.folder / "list.csv").write_text("identity,url\nanna,nowhere\n")
    (video,) = read_list(f"{served.url}/list.csv?X-Amz-Signature=hush")
    assert f"{served.url}/list.csv line 2" in video.detail
    with pytest.raises(ListError, match="no such file") as raised:
        read_list(f"{served.url}/gone.csv?X-Amz-Signature=hush")
    assert "hush" not in str(raised.value)


@pytest.mark.slow
def test_server_that_knows_no_ranges_is_enough(served):
    """Larger than what fsspec asks for at once."""
    rows = "".join(f"p{i},https://h.example/{'x' * 180}{i}\n" for i in range(30_000))
    (served.folder / "list.csv").write_text("identity,url\n" + rows)
    assert sum(1 for _ in read_list(f"{served.url}/list.csv")) == 30_000
    with zipfile.ZipFile(served.folder / "list.zip", "w") as archive:
        archive.writestr("padding", os.urandom(6_000_000))
        for (identity, video, name), text in simple_tree(1, 1, 1).items():
            archive.writestr(f"txt/{identity}/{video}/{name}.txt", text)
    assert [video.state for video in read_list(f"{served.url}/list.zip")] == ["open"]


def test_a_table_read_as_a_tree_is_an_empty_list(tmp_path):
    (tmp_path / "list.csv").write_text("identity,url\nanna,https://h.example/x\n")
    with pytest.raises(ListError, match="empty"):
        read_list(str(tmp_path / "list.csv"), "voxceleb2")
