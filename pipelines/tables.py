"""Tables of videos (csv, jsonl, parquet) and ``vox-metadata.csv`` → :class:`Video`. Called by ``voxceleb.read_list``.

A table has a column ``identity`` and ``url`` or ``path``, and optionally:

* ``video``: letters, digits, ``-`` and ``_``; without it a hash of the URL or path. Rows that share identity and video
  become the spans of one video.
* ``start``, ``end``: seconds of the part to use; no ``end``: to the end of the video.
* ``split``: train (or dev), val or test; ``gender``: a word.
* ``left, top, right, bottom``: a face box that holds from ``start`` to ``end``, in pixels of a frame of ``width`` x
  ``height`` where these are filled in, else in fractions of the frame.

``vox-metadata.csv`` is that of AliaksandrSiarohin/video-preprocessing: ``video_id, start, end, bbox, fps, width, height,
partition, person_id``, one constant box (``left-top-right-bottom``, pixels of width x height) from frame ``start`` up to
but without frame ``end``, at ``fps``. The published file lists two videos for training and for testing, with the same clips, and
311 rows twice. A row twice counts once. Of a video on two sides the one that is tested on stays, unless a legacy split is asked
for: then the other side is a video of its own, ``<video>_train``.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np
import pyarrow
from pyarrow import parquet

from pipelines import shelf
from pipelines.download import public_url
from pipelines.listing import (
    ANNOTATION_FPS,
    MAX_SECONDS,
    MAX_SIDES,
    SPLITS,
    STRICTNESS,
    ListError,
    SpanError,
    ending,
    finish,
    full_path,
    open_whole,
    parse_number,
    printable,
    rejected_span,
    short_hash,
    shown,
)
from pipelines.schema import Cause, Span, Track, Video

TABLE_ENDINGS = frozenset((".csv", ".tsv", ".parquet", ".jsonl", ".ndjson"))
SIDES = ("left", "top", "right", "bottom")
PLAIN_COLUMNS = ("identity", "video", "url", "path", "start", "end", "split", "gender")
TABLE_COLUMNS = (*PLAIN_COLUMNS, *SIDES, "width", "height")
VOX_METADATA_COLUMNS = ("video_id", "start", "end", "bbox", "fps", "width", "height", "partition")
ROW_COLUMNS = (*TABLE_COLUMNS, "fps", "error")
"""Of a row of either kind while it waits to be sorted; all text. Times are in frames at ``fps``."""

MAX_LINE_CHARACTERS = 2**20
MAX_CONSTANT_SECONDS = 3600.0
"""A face does not stay in one box longer than this."""
URL_CHARACTERS = re.compile(r"[!#-;=?-\[\]_a-z~]{1,2048}")
"""Printable ASCII without blanks, quotes, backslash, angle brackets and the like."""
GENDER = re.compile(r"[a-z]{1,16}")


class Line(NamedTuple):
    """One line of a table: its cells by column, or what is wrong with all of it."""

    number: int
    cells: dict[str, str]
    error: str = ""


def table_videos(
    fs: Any,
    path: str,
    list_format: str,
    url_template: str,
    *,
    allow_local: bool,
    both_sides: bool,
) -> Iterator[Video]:
    """Videos of the table at ``path``, sorted by identity and video.

    Args:
        fs, path: of the file.
        list_format: ``table``, ``vox-metadata``, or ``auto``: decided by the columns.
        url_template: makes URLs of the video ids of ``vox-metadata.csv``.
        allow_local: whether rows may name files.
        both_sides: whether ``vox-metadata.csv`` may have one video on two sides of its split.

    Raises:
        ListError: columns are missing, or the file cannot be read.
    """
    where = shown(path)
    try:
        lines = table_lines(fs, path)
        head = list(itertools.islice(lines, 1000))
        columns = {name for line in head for name in line.cells}
        if list_format == "auto" and columns.issuperset(VOX_METADATA_COLUMNS):
            list_format = "vox-metadata"
        if head and not columns:
            raise ListError(f"{where} line {head[0].number}: {head[0].error}")
        if head:
            _require_columns(columns, list_format, where)
        everything = itertools.chain(head, lines)
        if list_format == "vox-metadata":
            rows = sorted_rows(vox_metadata_row(line, url_template) for line in everything)
        else:
            rows = sorted_rows(table_row(line) for line in everything)
    except (pyarrow.ArrowException, csv.Error) as error:
        raise ListError(f"{where}: not a readable table: {error}") from error
    folder = (full_path(fs, path).rpartition("/")[0] or "/") if allow_local else ""
    for (identity, video), group in itertools.groupby(
        rows, lambda row: (row["identity"], row["video"])
    ):
        if list_format != "vox-metadata":
            yield _assemble(Video(identity=identity, video=video), group, where, folder)
            continue
        # stricter sides first, so that they decide; a sort keeps the order of lines
        sorted_sides = sorted(group, key=lambda row: -STRICTNESS.get(row["split"].lower(), -1))
        sides = itertools.groupby(sorted_sides, lambda row: row["split"] if both_sides else "")
        for number, (side, rows) in enumerate(sides):
            name = f"{video}_{side}" if number else video
            yield _assemble(Video(identity=identity, video=name), rows, where, folder)


def _require_columns(columns: set[str], list_format: str, where: str) -> None:
    if list_format == "vox-metadata":
        missing = sorted(set(VOX_METADATA_COLUMNS) - columns)
    else:
        missing = sorted({"identity"} - columns)
        missing += [] if columns & {"url", "path"} else ["url or path"]
    if missing:
        found = ascii(sorted(columns))[1:-1][:160]
        raise ListError(
            f"{where}: missing column {', '.join(missing)}; the columns are {found}: "
            "rename them, or name another format with --input-format"
        )


def table_lines(fs: Any, path: str) -> Iterator[Line]:
    """Lines of a csv, jsonl or parquet file, told apart by the name's ending; blank lines are left out."""
    kind = ending(path)
    with open_whole(fs, path) as stream:
        if kind == ".parquet":
            yield from _parquet_lines(stream)
        else:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="backslashreplace", newline="")
            yield from (_jsonl_lines if kind in (".jsonl", ".ndjson") else _csv_lines)(text)


def _parquet_lines(stream: IO[bytes]) -> Iterator[Line]:
    table = parquet.ParquetFile(stream)
    known = {*TABLE_COLUMNS, *VOX_METADATA_COLUMNS, "person_id"}
    names = [name for name in table.schema_arrow.names if name in known]
    numbers = itertools.count(1)
    for batch in table.iter_batches(batch_size=20_000, columns=names):
        for row in batch.to_pylist():
            yield Line(next(numbers), {name: _cell(value) for name, value in row.items()})


def _csv_lines(text: io.TextIOWrapper) -> Iterator[Line]:
    header = text.readline(MAX_LINE_CHARACTERS)
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(reader.line_num + 1, {}, str(error))
            continue
        if len(row) == len(columns):
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=True))
            yield Line(reader.line_num + 1, cells)
        elif row:
            error_text = f"{len(row)} values, the header has {len(columns)}"
            yield Line(reader.line_num + 1, {}, error_text)


def _jsonl_lines(text: io.TextIOWrapper) -> Iterator[Line]:
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARACTERS), ""), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Line(number, {}, f"not JSON: {error}")
            continue
        if isinstance(row, dict) and not any(isinstance(v, dict | list) for v in row.values()):
            yield Line(number, {name.strip(): _cell(value) for name, value in row.items()})
        else:
            yield Line(number, {}, "not an object of plain values")


def _cell(value: Any) -> str:
    """A value of parquet or jsonl as csv would write it; missing and NaN are empty."""
    return "" if value is None or value != value else printable(str(value).strip())


def table_row(line: Line) -> dict[str, Any]:
    """A line of a table as a row of ``ROW_COLUMNS`` and ``line``."""
    row = {name: line.cells.get(name, "") for name in TABLE_COLUMNS}
    row["video"] = row["video"] or short_hash(row["url"] or row["path"] or f"line {line.number}")
    return row | {"fps": "1", "error": line.error, "line": line.number}


def vox_metadata_row(line: Line, url_template: str) -> dict[str, Any]:
    """A line of ``vox-metadata.csv`` likewise; ``crop_vox.py`` itself writes ``video#person`` and no ``person_id``."""
    cells = dict.fromkeys(VOX_METADATA_COLUMNS, "") | line.cells
    video, _, person = cells["video_id"].partition("#")
    box = cells["bbox"].split("-")
    error = line.error
    if len(box) != 4 and not error:
        error = f"bbox is {ascii(cells['bbox'])[:40]}, not left-top-right-bottom"
    row = dict.fromkeys(ROW_COLUMNS, "") | dict(zip(SIDES, box, strict=False))
    row |= {name: cells[name] for name in ("start", "end", "fps", "width", "height")}
    row |= {"identity": cells.get("person_id", person), "split": cells["partition"]}
    row["video"] = video or short_hash(f"line {line.number}")
    row["url"] = url_template.replace("{video}", video)
    return row | {"error": error, "line": line.number}


def sorted_rows(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows by identity, video and line. They wait on disk."""
    columns = (*ROW_COLUMNS, "line")
    waiting = shelf.Shelf(f"CREATE TABLE rows ({shelf.quoted(columns)})")
    values = (tuple(row[name] for name in columns) for row in rows)
    waiting.add(f"INSERT INTO rows VALUES ({shelf.places(columns)})", values)
    found = waiting.rows("SELECT * FROM rows ORDER BY identity, video, line")
    return (dict(zip(columns, row, strict=True)) for row in found)


def _assemble(video: Video, rows: Iterator[dict[str, Any]], where: str, folder: str) -> Video:
    """Rows of one video, in line order, as its spans. The first row that reads says where the video is.

    Args:
        video: identity and video as the rows have them.
        rows: at least one.
        where: the table, for messages.
        folder: what relative paths start from; empty: rows may not name files.
    """
    source: Video | None = None
    source_line = 0
    spans: dict[Span, int] = {}
    rejected: list[Track] = []
    for row in rows:
        at = f"{where} line {row['line']}"
        try:
            found = _read_source(video, row, at, folder)
            span = _read_span(row, at)
            if source is None:
                source, source_line = found, row["line"]
            elif found != source and replace(found, split=source.split) == source:
                detail = f"{at}: for {found.split or 'neither'}, but line {source_line} has the video for {source.split}"
                raise SpanError(Cause.LIST_DUPLICATE, detail)
            elif found != source:
                detail = f"{at}: url, path, split or gender differ from line {source_line}"
                raise SpanError(Cause.LIST_MALFORMED, detail)
            elif span in spans:
                raise SpanError(Cause.LIST_DUPLICATE, f"{at}: same as line {spans[span]}")
            spans[span] = row["line"]
        except SpanError as error:
            rejected.append(rejected_span(len(rejected), f"line{row['line']}", error))
    ordered = sorted(spans, key=lambda span: (span.start, span.end, span.boxes[:1]))
    named = [replace(span, name=f"{number:05d}") for number, span in enumerate(ordered, 1)]
    return finish(source or video, named, rejected, where)


def _read_source(video: Video, row: dict[str, Any], at: str, folder: str) -> Video:
    """``video`` with what the row says about where it is and where it belongs."""
    if row["error"]:
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: {row['error']}")
    if not row["identity"]:
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: identity is empty")
    split = SPLITS.get(row["split"].lower())
    if split is None:
        detail = f"{at}: split is {ascii(row['split'])[:40]}, not train, val or test"
        raise SpanError(Cause.LIST_MALFORMED, detail)
    gender = row["gender"].lower()
    if gender and not GENDER.fullmatch(gender):
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: gender is {ascii(gender)[:40]}, not a word")
    url, path = _read_place(row, at, folder)
    return replace(video, url=url, path=path, split=split, gender=gender)


def _read_place(row: dict[str, Any], at: str, folder: str) -> tuple[str, str]:
    """URL and path of a row; one of them is empty."""
    if bool(row["url"]) == bool(row["path"]):
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: needs url or path, and not both")
    url, path = row["url"], row["path"]
    if url:
        parts = _check_url(url, at)
        if parts.scheme != "file":
            return url, ""
        path = unquote(parts.path)
    if not folder:
        cause = Cause.DOWNLOAD_SCHEME if url else Cause.LIST_UNSAFE
        detail = f"{at}: {ascii(path)[:120]} is a file: allow it with --download.allow-local"
        raise SpanError(cause, detail)
    if not path.isprintable():
        raise SpanError(Cause.LIST_UNSAFE, f"{at}: path {ascii(path)[:120]} is not printable")
    if "://" not in path and not path.startswith("/"):
        path = f"{folder}/{path}"
    return "", path


def _check_url(url: str, at: str) -> SplitResult:
    """A URL of this machine, or http(s) with a host, plain characters and no password; else raises."""
    told = ascii(public_url(url))[:120]
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: {told}: {error}") from error
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return parts
    if parts.scheme not in ("http", "https"):
        raise SpanError(Cause.DOWNLOAD_SCHEME, f"{at}: {told} is not http:// or https://")
    if "@" in parts.netloc:
        raise SpanError(Cause.LIST_UNSAFE, f"{at}: a URL of {parts.hostname} holds a password")
    if not parts.hostname or not URL_CHARACTERS.fullmatch(url):
        detail = f"{at}: {told} has no host, or characters to be written as %XX"
        raise SpanError(Cause.LIST_UNSAFE, detail)
    return parts


def _read_span(row: dict[str, Any], at: str) -> Span:
    """The part of the video a row names; a constant box becomes one box for each 25th of a second."""
    fps = parse_number(row["fps"], f"{at}: fps")
    if fps <= 0:
        raise SpanError(Cause.LIST_MALFORMED, f"{at}: fps is {fps:g}, not positive")
    start = parse_number(row["start"] or "0", f"{at}: start") / fps
    end = parse_number(row["end"] or "0", f"{at}: end") / fps
    if start < 0 or (row["end"] and end <= start) or max(start, end) > MAX_SECONDS:
        detail = f"{at}: from {start:g} to {end:g} s is no part of a video"
        raise SpanError(Cause.LIST_MALFORMED, detail)
    span = Span(name="", start=start, end=end)
    if not any(row[side] for side in SIDES):
        return span
    left, top, right, bottom = (parse_number(row[side], f"{at}: {side}") for side in SIDES)
    in_pixels = bool(row["width"] or row["height"])
    width, height = (
        parse_number(row[name], f"{at}: {name}") if in_pixels else 1.0
        for name in ("width", "height")
    )
    if not (
        0 < right - left <= MAX_SIDES * width
        and 0 < bottom - top <= MAX_SIDES * height
        and left < width
        and top < height
        and right > 0
        and bottom > 0
    ):
        detail = (
            f"{at}: box {left:g} {top:g} {right:g} {bottom:g} is empty, outside a frame of "
            f"{width:g} x {height:g}, or larger than two of it"
        )
        raise SpanError(Cause.LIST_BOXES, detail)
    if not start < end <= start + MAX_CONSTANT_SECONDS:
        detail = f"{at}: a box needs an end at most {MAX_CONSTANT_SECONDS:g} s after its start"
        raise SpanError(Cause.LIST_BOXES, detail)
    num_boxes = max(1, round((end - start) * ANNOTATION_FPS))
    times = np.round(start + np.arange(num_boxes) / ANNOTATION_FPS, 6)
    return replace(
        span,
        times=tuple(times.tolist()),
        boxes=((left, top, right, bottom),) * num_boxes,
        units="pixels" if in_pixels else "fraction",
        reference=(width, height) if in_pixels else (0.0, 0.0),
    )
