"""What the report shows of what was thrown away, and of the time of each video: chosen from the ledger, with pictures.

Which tracks and videos are shown depends on the ledger alone, and is bounded. Their snapshots are read from the parts when
a dataset is published and kept as ``report/snapshots.parquet``, since the parts go; the page can be made again from there.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import shards, snapshots, storage
from pipelines.schema import STAGES
from pipelines.shelf import Row, Shelf, places, quoted
from pipelines.timemap import Relation

ALBUM = "report/snapshots.parquet"
ALBUM_SCHEMA = pa.schema(
    [
        ("identity", pa.string()),
        ("video", pa.string()),
        ("name", pa.string()),
        ("jpeg", pa.binary()),
    ]
)

PER_CAUSE = 6
"""Rejected tracks or videos shown of each cause."""
MAX_CAUSES = 20
DOUBTFUL = 10
OTHERS = 10
"""Videos whose time is shown: the most doubtful time maps, and others from all over the list."""
NO_PICTURE = ("list", "download", "takedown")
"""Stages that end a video before anybody has seen it, or so that nobody may."""

Pictures = Mapping[str, bytes]
"""JPEGs by the name of their member."""


# ---------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """One frame with its boxes; rectangles are (left, top, width, height) in source pixels."""

    time: float
    view: tuple[float, ...]
    """What is seen: the whole frame, or, without a picture of it, a square around all boxes."""
    annotated: tuple[float, ...] = ()
    """As the list gave it."""
    expected: tuple[float, ...] = ()
    """Where the detector should find the annotated face."""
    detected: tuple[float, ...] = ()
    """Empty where no face was found."""
    jpeg: str = ""
    """Base64; empty where there is no picture."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One line of a video's time."""

    name: str
    runs: list[tuple[float, float, str]]
    """(start, length, class) in shares of the line."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A video on its line of time."""

    key: str
    state: str
    cause: str
    """``stage: reason``; empty when published."""
    shift: Mapping[str, Any]
    """The time map; empty where nothing was annotated."""
    start: float = 0.0
    end: float = 0.0
    """Seconds of the line's ends; both 0 where nothing was searched."""
    lanes: list[Lane] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)
    """Shares of the line."""
    num_cuts: int = 0
    frames: list[Overlay] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """One track or video that is not in the dataset."""

    key: str
    detail: str
    measured: str
    """The value that decided, in words; empty where no single value did."""
    needed: str
    picture: Overlay | None = None
    """A whole frame."""
    window: str = ""
    """Base64 of the window that was cut; empty where none was."""


@dataclass(frozen=True, kw_only=True)
class Rejects:
    """Some of those that one cause ended."""

    cause: str
    total: int
    shown: list[Reject]


# ---------------------------------------------------------------------------------------------- who is shown


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices, evenly spaced from the first to the last of ``count`` things."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, limit)).round()]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Rows of the ledger that the page shows."""

    rejects: list[tuple[str, int, list[dict[str, Any]]]]
    """(cause, number of all, rows) in the order of the stages."""
    strips: list[dict[str, Any]]
    """Rows of videos with ``shift`` and ``timeline``, the most doubtful time map first, then others in order of key."""
    num_strips: int
    """Of all videos that could be shown."""
    lines: dict[str, tuple[dict[str, Any], dict[str, Any]]]
    """``shift`` and ``timeline`` of the videos that ``rejects`` belong to, by key."""


LEDGER_COLUMNS = (
    "kind", "key", "identity", "video", "split", "state", "stage", "cause", "detail", "frames", "start", "end",
)  # fmt: skip
"""The short ones, less ``dropped``."""


def shelve_ledger(output: str) -> Shelf:
    """The ledger's short columns as the table ``ledger``, in its order, and frames that tracks dropped as ``dropped``."""
    columns = quoted(LEDGER_COLUMNS)
    ledger = Shelf(
        f"CREATE TABLE ledger ({columns})",
        "CREATE TABLE dropped (key, cause, number)",
        f"CREATE TABLE rejects ({columns})",
    )
    for batch in shards.ledger_batches(output, [*LEDGER_COLUMNS, "dropped"]):
        values = (batch[name].to_pylist() for name in LEDGER_COLUMNS)
        insert = f"INSERT INTO ledger VALUES ({places(LEDGER_COLUMNS)})"
        ledger.add(insert, zip(*values, strict=True))
        lost = zip(batch["key"].to_pylist(), batch["dropped"].to_pylist(), strict=True)
        each = ((key, cause, number) for key, causes in lost for cause, number in causes)
        ledger.add("INSERT INTO dropped VALUES (?, ?, ?)", each)
    ledger.do("CREATE INDEX people ON ledger (identity)")
    # what was rejected once somebody had seen it: tracks, and videos that have none
    ledger.do(
        "WITH gone AS (SELECT *, identity || '-' || video AS owner FROM ledger "
        f"WHERE state <> 'published' AND stage NOT IN ({places(NO_PICTURE)})) "
        f"INSERT INTO rejects SELECT {columns} FROM gone WHERE kind = 'track' "
        "OR owner NOT IN (SELECT owner FROM gone WHERE kind = 'track')",
        NO_PICTURE,
    )
    return ledger


def some(ledger: Shelf, query: str, values: Sequence[Any], limit: int) -> list[Row]:
    """At most so many of the rows that a query finds, evenly spaced from the first to the last."""
    (count,) = ledger.one(f"SELECT COUNT(*) FROM ({query})", values) or (0,)
    chosen = set(spread(count, limit))
    return [row for place, row in enumerate(ledger.rows(query, values)) if place in chosen]


def choose(output: str, ledger: Shelf) -> Choice:
    """Decide what to show; the same ledger gives the same choice.

    Args:
        output: dataset URI.
        ledger: of it, :func:`shelve_ledger`.
    """
    rejects = choose_rejects(ledger)
    add_scores(output, [row for _, _, rows in rejects for row in rows])
    wanted = {video_of(row) for _, _, rows in rejects for row in rows}
    lines: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    doubtful: list[tuple[float, str, dict[str, Any]]] = []
    others: list[tuple[str, dict[str, Any]]] = []
    total = 0
    columns = ["kind", "key", "identity", "video", "state", "stage", "cause", "shift", "timeline"]
    for batch in shards.ledger_batches(output, columns):  # all these texts together are large
        told = pc.or_(pc.not_equal(batch["shift"], ""), pc.not_equal(batch["timeline"], ""))
        videos = pa.Table.from_batches([batch]).filter(told)
        total += videos.num_rows
        for row in videos.filter(
            pc.is_in(videos["key"], pa.array(wanted, pa.string()))
        ).to_pylist():
            lines[row["key"]] = (_read(row["shift"]), _read(row["timeline"]))
        found = pc.extract_regex(videos["shift"], r'"median_iou": (?P<overlap>[0-9][0-9.e+-]*)')
        overlap = pc.cast(pc.struct_field(found, "overlap"), pa.float64()).to_pylist()
        rows = videos.to_pylist()
        # Nothing to compare with comes last among the doubtful.
        doubtful += [
            (float("inf") if value is None else value, row["key"], row)
            for value, row in zip(overlap, rows, strict=True)
            if row["shift"]
        ]
        others += [(hashlib.sha256(row["key"].encode()).hexdigest(), row) for row in rows]
        doubtful = sorted(doubtful, key=lambda item: item[:2])[:DOUBTFUL]
        others = sorted(others, key=lambda item: item[0])[: DOUBTFUL + OTHERS]
    first = [row for _, _, row in doubtful]
    shown = {row["key"] for row in first}
    rest = [row for _, row in others if row["key"] not in shown][:OTHERS]
    strips = [*first, *sorted(rest, key=lambda row: row["key"])]
    for row in strips:
        row["shift"], row["timeline"] = _read(row["shift"]), _read(row["timeline"])
    return Choice(rejects=rejects, strips=strips, num_strips=total, lines=lines)


def choose_rejects(ledger: Shelf) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """(cause, number, some rows from all over the list) of what was rejected: tracks, and videos that have none."""
    query = "SELECT stage, cause, COUNT(*) FROM rejects GROUP BY stage, cause"
    order = {name: place for place, name in enumerate(STAGES)}
    causes = sorted(ledger.rows(query), key=lambda row: (order.get(row[0], len(order)), row[1]))
    chosen = []
    for stage, cause, count in causes[:MAX_CAUSES]:
        query = "SELECT * FROM rejects WHERE stage = ? AND cause = ? ORDER BY key"
        taken = some(ledger, query, (stage, cause), PER_CAUSE)
        rows = [dict(zip(LEDGER_COLUMNS, row, strict=True)) for row in taken]
        chosen.append((f"{stage}: {cause}", count, rows))
    return chosen


def add_scores(output: str, rows: list[dict[str, Any]]) -> None:
    """Set ``scores`` of some rows of the ledger; all of them together are large."""
    by_key = {(row["kind"], row["key"]): row for row in rows}
    keys = pa.array([row["key"] for row in rows], pa.string())
    for batch in shards.ledger_batches(output, ["kind", "key", "scores"]):
        for found in batch.filter(pc.is_in(batch["key"], keys)).to_pylist():
            if row := by_key.get((found["kind"], found["key"])):
                row["scores"] = found["scores"]


def video_of(row: Mapping[str, Any]) -> str:
    """Key of the video that a row of the ledger belongs to."""
    return f"{row['identity']}-{row['video']}"


def _read(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


# ---------------------------------------------------------------------------------------------- pictures


def wanted(choice: Choice) -> list[tuple[Mapping[str, Any], list[str]]]:
    """(row, names of which the first that exists is shown) of every picture that a choice needs."""
    names: list[tuple[Mapping[str, Any], list[str]]] = []
    for _, _, rows in choice.rejects:
        for row in rows:
            _, line = choice.lines.get(video_of(row), ({}, {}))
            names.append((row, alternatives(row, line)))
    for row in choice.strips:
        names += [
            (row, [snapshots.of_frame(row["key"], index)])
            for index, _ in row["timeline"].get("shown", [])
        ]
    return names


def alternatives(row: Mapping[str, Any], line: Mapping[str, Any]) -> list[str]:
    """What can stand for a rejected track or video: its window, the nearest whole frame, the only picture there is."""
    video = video_of(row)
    names = [snapshots.only(row["key"])] if row["kind"] == "track" else []
    shown = line.get("shown", [])
    if shown:
        middle = (row["start"] + row["end"]) / 2
        if row["kind"] == "video" or not row["end"]:
            middle = shown[len(shown) // 2][1]
        index, _ = min(shown, key=lambda moment: abs(moment[1] - middle))
        names.append(snapshots.of_frame(video, index))
    return [*names, snapshots.only(video)]


def gather(output: str, choice: Choice) -> pa.Table:
    """The snapshots of a choice from the parts of an unfinished dataset; what is not there is left out.

    Returns:
        a table of :data:`ALBUM_SCHEMA`, by name.
    """
    by_video: dict[str, list[tuple[Mapping[str, Any], list[str]]]] = {}
    for row, names in wanted(choice):
        by_video.setdefault(video_of(row), []).append((row, names))

    def read(key: str) -> list[dict[str, Any]]:
        try:
            (commit,) = shards.load_commits(output, [key])
        except FileNotFoundError:
            return []
        pictures = {}
        for row, names in by_video[key]:
            name = next((name for name in names if name in commit.snapshots), "")
            if not name:
                continue
            offset, length = commit.snapshots[name]
            uri = shards.part_uri(output, key, "tar")
            jpeg = storage.read_bytes(uri, offset, offset + length)
            pictures[name] = {"identity": row["identity"], "video": row["video"]} | {
                "name": name,
                "jpeg": jpeg,
            }
        return list(pictures.values())

    with ThreadPoolExecutor(8) as pool:
        rows = [row for some_rows in pool.map(read, sorted(by_video)) for row in some_rows]
    rows.sort(key=lambda row: row["name"])
    return pa.Table.from_pylist(rows, schema=ALBUM_SCHEMA)


def write_album(output: str, album: pa.Table) -> None:
    """``report/snapshots.parquet``, from which the page can be made again."""
    buffer = io.BytesIO()
    pq.write_table(album, buffer, compression="none")  # JPEGs are
    storage.write_atomic(storage.join(output, ALBUM), buffer.getvalue())


def read_album(output: str) -> pa.Table:
    """The snapshots of the last report; an empty table when there are none."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(output, ALBUM))))
    except FileNotFoundError:
        return ALBUM_SCHEMA.empty_table()


# ---------------------------------------------------------------------------------------------- why it was rejected


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The value that a cause judges."""

    score: str
    """Of the track; ``frames`` counts them, names of the time map are those of the video."""
    words: str
    """How a person says it, with a place for the value."""
    threshold: str
    """In the configuration."""
    is_least: bool = True
    """The value must be at least the threshold; else at most."""


MEASURES = {
    "crop: small window": Measure(
        score="window_side", words="window side {:.0f} px", threshold="crops.min_window"
    ),
    "crop: outside frame": Measure(
        score="inside", words="{:.2f} inside the frame", threshold="crops.min_inside"
    ),
    "crop: few frames": Measure(
        score="frames", words="{:.0f} frames", threshold="crops.min_frames"
    ),
    "track: short": Measure(score="frames", words="{:.0f} frames", threshold="tracks.min_frames"),
    "track: no face": Measure(
        score="face_found",
        words="a face in {:.2f} of the frames",
        threshold="tracks.min_face_found",
    ),
    "track: annotation mismatch": Measure(
        score="median_iou", words="overlap {:.2f}", threshold="tracks.min_overlap"
    ),
    "clip: static": Measure(
        score="clip_change", words="changes by {:.1f} levels", threshold="quality.min_clip_change"
    ),
    "quality: few frames": Measure(
        score="frames", words="{:.0f} frames", threshold="quality.min_frames"
    ),
    "quality: blurred": Measure(
        score="sharpness", words="sharpness {:.1f}", threshold="quality.min_sharpness"
    ),
    "quality: small face": Measure(
        score="face_px", words="face {:.0f} px", threshold="quality.min_face_px"
    ),
    "quality: unsure detection": Measure(
        score="box_score", words="detector's score {:.2f}", threshold="quality.min_box_score"
    ),
    "quality: extreme pose": Measure(
        score="yaw", words="turned {:.0f}°", threshold="quality.max_yaw", is_least=False
    ),
}
"""By cause."""


def judge(
    row: Mapping[str, Any], cause: str, shift: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, str]:
    """What was measured and what was needed, in words; empty where no single value decided.

    Args:
        row: of the ledger.
        cause: that ended it.
        shift: the time map of its video.
        config: flat, of the manifest.
    """
    measure = MEASURES.get(cause)
    if not measure or measure.threshold not in config:
        return "", ""
    known = {**shift, **dict(row["scores"]), "frames": row["frames"]}
    value, threshold = known.get(measure.score), float(config[measure.threshold])
    if not isinstance(value, int | float):
        return "", ""
    size = value if measure.is_least else abs(value)
    if (size >= threshold) if measure.is_least else (size <= threshold):
        return "", ""  # the median passes: it was something else
    word = "at least" if measure.is_least else "at most"
    return measure.words.format(value), f"{word} {threshold:g}"


# ---------------------------------------------------------------------------------------------- put together


def draw_rejects(choice: Choice, pictures: Pictures, config: Mapping[str, Any]) -> list[Rejects]:
    """The gallery: groups by cause in the order of the stages."""
    groups = []
    for cause, total, rows in choice.rejects:
        shown = []
        for row in rows:
            shift, line = choice.lines.get(video_of(row), ({}, {}))
            name = next((name for name in alternatives(row, line) if name in pictures), "")
            measured, needed = judge(row, cause, shift, config)
            overlay, window = None, ""
            if name == snapshots.only(row["key"]) and row["kind"] == "track":
                window = _base64(pictures[name])
            elif name:
                overlay = next(
                    (frame for frame in overlays(video_of(row), shift, line, pictures, name)),
                    Overlay(time=0.0, view=(), jpeg=_base64(pictures[name])),
                )
            shown.append(
                Reject(
                    key=row["key"], detail=row["detail"], measured=measured, needed=needed,
                    picture=overlay, window=window,
                )
            )  # fmt: skip
        groups.append(Rejects(cause=cause, total=total, shown=shown))
    return groups


def draw_strips(choice: Choice, pictures: Pictures) -> list[Strip]:
    """The line of time of every chosen video."""
    return [
        Strip(
            key=row["key"],
            state=row["state"],
            cause=f"{row['stage']}: {row['cause']}" if row["cause"] else "",
            shift=row["shift"],
            start=row["timeline"].get("start", 0.0),
            end=row["timeline"].get("end", 0.0),
            lanes=lanes(row["timeline"], bool(row["shift"])),
            cuts=[_share(cut, row["timeline"]) for cut in row["timeline"].get("cuts", [])],
            num_cuts=row["timeline"].get("num_cuts", 0),
            frames=overlays(row["key"], row["shift"], row["timeline"], pictures),
        )
        for row in choice.strips
    ]


def _share(time: float, line: Mapping[str, Any]) -> float:
    share = (time - line["start"]) / max(line["end"] - line["start"], 1e-9)
    return round(min(max(share, 0.0), 1.0), 5)


def lanes(line: Mapping[str, Any], is_annotated: bool) -> list[Lane]:
    """What the list says, where faces were found, and what was kept."""
    if not line:
        return []
    spans = []
    for start, end in line.get("spans", []):
        left, right = _share(start, line), _share(end, line)
        if right > left:
            spans.append((left, round(right - left, 5), "span"))
    known = {"o": "found", "x": "elsewhere", "-": "missing"}
    return [
        Lane(name="annotated" if is_annotated else "in the list", runs=spans),
        Lane(name="faces", runs=runs(line["faces"], known)),
        Lane(name="kept", runs=runs(line.get("kept", ""), {"o": "kept"})),
    ]


def runs(marks: str, classes: Mapping[str, str]) -> list[tuple[float, float, str]]:
    """(start, length, class) of each run of equal marks, in shares of the line; others are left out."""
    found, place = [], 0
    for mark, group in groupby(marks):
        length = len(list(group))
        if mark in classes:
            found.append(
                (round(place / len(marks), 5), round(length / len(marks), 5), classes[mark])
            )
        place += length
    return found


def overlays(
    video: str,
    shift: Mapping[str, Any],
    line: Mapping[str, Any],
    pictures: Pictures,
    only: str = "",
) -> list[Overlay]:
    """Frames of a video with what the list, the time map and the detector say about them.

    Args:
        video: key.
        shift: its time map; empty where nothing was annotated.
        line: its timeline; empty where nothing was searched.
        pictures: snapshots.
        only: name of the one picture that is wanted; all when empty.
    """
    relation = Relation(**shift.get("relation", {}))
    strip = {moment.get("index", -1 - i): moment for i, moment in enumerate(shift.get("strip", []))}
    times = dict(line.get("shown", [])) | {index: moment["time"] for index, moment in strip.items()}
    drawn = []
    for index in sorted(times, key=lambda index: times[index]):
        name = snapshots.of_frame(video, index)
        if only and name != only:
            continue
        boxes: list[Any] = [(), (), ()]
        if index in strip:
            annotated = np.asarray(strip[index]["annotated"], dtype=np.float64)
            boxes = [annotated, relation.expect(annotated), strip[index]["detected"]]
        jpeg = _base64(pictures[name]) if name in pictures else ""
        if not jpeg and index not in strip:
            continue
        view = (0.0, 0.0, *map(float, line["size"])) if jpeg and line else around(boxes)
        rectangles = [_rectangle(box) for box in boxes]
        drawn.append(
            Overlay(
                time=float(times[index]),
                view=view,
                annotated=rectangles[0],
                expected=rectangles[1],
                detected=rectangles[2],
                jpeg=jpeg,
            )
        )
    return drawn


def around(boxes: Sequence[Any]) -> tuple[float, ...]:
    """A square (left, top, width, height) around boxes, some of which may be empty."""
    known = np.array([box for box in boxes if len(box)], dtype=np.float64)
    low, high = known[:, :2].min(axis=0), known[:, 2:].max(axis=0)
    side = 1.3 * float((high - low).max())
    corner = (low + high - side) / 2
    return (*corner.round(1).tolist(), round(side, 1), round(side, 1))


def _rectangle(box: Any) -> tuple[float, ...]:
    if not len(box):
        return ()
    left, top, right, bottom = (float(edge) for edge in box)
    return (round(left, 1), round(top, 1), round(right - left, 1), round(bottom - top, 1))


def _base64(jpeg: bytes) -> str:
    return base64.b64encode(jpeg).decode()


def as_pictures(album: pa.Table) -> dict[str, bytes]:
    """The JPEGs of an album by name."""
    return dict(zip(album["name"].to_pylist(), album["jpeg"].to_pylist(), strict=True))
