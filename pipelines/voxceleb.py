"""Stage 1. A list of videos → one :class:`Video` each, in the driver, one video at a time.

A list is a folder, a zip, or a file at any fsspec URI, in one of six forms:

``voxceleb2``
    ``txt/<identity>/<video>/<utterance>.txt`` with boxes in fractions of the frame; ``vox2_meta.csv`` if present.
``voxceleb1``
    The same tree with boxes in pixels of the frame scaled to 360 lines; ``vox1_meta.csv`` if present.
``vox-metadata``
    ``vox-metadata.csv`` of AliaksandrSiarohin/video-preprocessing (``tables.py``).
``table``
    csv, jsonl or parquet with ``identity`` and ``url`` or ``path`` (``tables.py`` names the other columns).
``folder``
    ``<identity>/<any>.mp4``, or another container: one's own videos.
``files``
    ``<any>.mp4``, each with another person (FaceForensics++). Never chosen by ``auto``: who is whom must be said.

Rows come sorted by identity and video whatever the order of the list, and nothing that is listed is missing:
``listing.py`` says what becomes of what is wrong.
"""

from __future__ import annotations

import csv
import itertools
import re
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import IO, Any, Literal, NamedTuple, NoReturn, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from pipelines.listing import (
    ANNOTATION_FPS,
    MAX_SECONDS,
    MAX_SIDES,
    SAFE,
    SPLITS,
    ListError,
    SpanError,
    ending,
    finish,
    full_path,
    is_local,
    list_files,
    list_folders,
    open_location,
    parse_number,
    printable,
    rejected_span,
    safe_name,
    short_hash,
    shown,
    unique_keys,
)
from pipelines.schema import BoxUnits, Cause, Span, Track, Video, one_line
from pipelines.tables import TABLE_ENDINGS, table_videos

ListFormat = Literal["auto", "voxceleb2", "voxceleb1", "vox-metadata", "table", "folder", "files"]

YOUTUBE = "https://www.youtube.com/watch?v={video}"
TREE_UNITS: dict[str, BoxUnits] = {"voxceleb2": "fraction", "voxceleb1": "height360"}
# fmt: off
VIDEO_ENDINGS = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
# fmt: on
META_UNITS: dict[str, BoxUnits] = {"vox1_meta.csv": "height360", "vox2_meta.csv": "fraction"}
UNITS_WORDS = {"fraction": "fractions (VoxCeleb2)", "height360": "pixels (VoxCeleb1)"}

MAX_UTTERANCE_BYTES = 4 * 2**20
"""A minute of annotation is 50 KB. Guards against hostile files and zip bombs."""
MAX_META_BYTES = 16 * 2**20
SNIFFED_FILES = 50
"""Utterance files tried before a tree of unknown version is given up as unreadable."""


def read_list(
    uri: str,
    list_format: ListFormat = "auto",
    *,
    url_template: str = YOUTUBE,
    allow_local: bool = False,
    both_sides: bool = False,
) -> Iterator[Video]:
    """Open a list and return its videos, sorted by identity and video; parsing happens while iterating.

    Args:
        uri: local path or fsspec URI of a folder, a zip or a table.
        list_format: ``auto`` looks at names, columns and values.
        url_template: makes the URL of a VoxCeleb video; ``{video}`` stands for its id.
        allow_local: let a table name files, in ``path`` or as ``file://``. Off, a list from elsewhere cannot read
            this disk. A ``folder`` needs no permission: the user named it.
        both_sides: keep both sides of a video that ``vox-metadata.csv`` lists for training and for testing.

    Raises:
        ListError: at once if nothing usable is there; while iterating if reading breaks off.
    """
    if list_format not in get_args(ListFormat):
        known = ", ".join(get_args(ListFormat))
        raise ListError(f"{shown(uri)}: unknown format {list_format!r}: use one of {known}")
    videos = _videos(uri, list_format, url_template, allow_local=allow_local, both_sides=both_sides)
    first = next(videos, None)
    if first is None:
        raise ListError(f"{shown(uri)}: the list is empty (read as {list_format})")
    return unique_keys(itertools.chain([first], videos))


def _videos(
    uri: str, list_format: ListFormat, url_template: str, *, allow_local: bool, both_sides: bool
) -> Iterator[Video]:
    fs, path = open_location(uri)
    try:
        kind = _detect(fs, path) if list_format == "auto" else list_format
        if kind in ("table", "vox-metadata"):
            yield from table_videos(
                fs, path, list_format, url_template, allow_local=allow_local, both_sides=both_sides
            )
        elif kind == "folder":
            yield from folder_videos(fs, path)
        elif kind == "files":
            yield from file_videos(fs, path)
        else:
            tree: Tree = ZipTree(fs, path) if ending(path) == ".zip" else FolderTree(fs, path)
            yield from tree_videos(tree, TREE_UNITS.get(list_format), url_template)
    except OSError as error:
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise ListError(f"{shown(uri)}: cannot be read: {reason}") from error


def _detect(fs: Any, path: str) -> Literal["tree", "table", "folder"]:
    """What a list is, by its name's ending or by the first files of a folder."""
    if ending(path) == ".zip":
        return "tree"
    if ending(path) in TABLE_ENDINGS:
        return "table"
    if FolderTree(fs, path).roots != [path]:
        return "tree"
    for _, folder in list_folders(fs, path):
        for parts, _, _ in list_files(fs, folder, depth=4):
            if len(parts) == 2 and parts[1].endswith(".txt"):
                return "tree"
            if _is_video(parts[-1]):
                return "folder"
    loose = _is_video(path) or any(
        _is_video(parts[-1]) for parts, _, _ in list_files(fs, path, depth=1)
    )
    if loose:
        raise ListError(
            f"{shown(path)}: whose face is it? Put videos into a folder for each person, <identity>/<any>.mp4, and give the "
            "folder of these; or give a folder and --input-format files, where each file shows another person"
        )
    raise ListError(
        f"{shown(path)}: no list in it: expected txt/<identity>/<video>/<utterance>.txt, "
        f"<identity>/<any>.mp4, a zip, or a table ({', '.join(sorted(TABLE_ENDINGS))})"
    )


# One utterance: pure functions


def parse_utterance(
    content: bytes, where: str, identity: str, video: str, name: str, units: BoxUnits | None
) -> Span:
    """Read header lines ``Key : value``, a line ``FRAME X Y W H``, and a row for each annotated frame.

    ``Offset`` is about sound and moves no frame. FRAME k is at k / 25 s of the annotators' copy.

    Args:
        content: the file.
        where: its path, for messages.
        identity, video: what the path says; the header must agree.
        name: the utterance's name, ``00001``.
        units: what the list is said to hold, ``fraction`` or ``height360``; None takes the file's word.

    Raises:
        SpanError: ``LIST_MALFORMED`` for what cannot be read, ``LIST_BOXES`` for boxes that cannot be.
    """
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next((i for i, line in enumerate(lines, 1) if line.split()[:1] == [b"FRAME"]), 0)
    if not first or lines[first - 1].split() != [b"FRAME", b"X", b"Y", b"W", b"H"]:
        found = f"line {first} has {_text(lines[first - 1])[:60]}" if first else "there is none"
        raise SpanError(Cause.LIST_MALFORMED, f"{where}: expected a line FRAME X Y W H, {found}")
    header = _parse_header(lines[: first - 1], where)
    for key, expected in (("Identity", identity), ("Reference", video)):
        if header.get(key) != expected:
            found = header.get(key, "missing")[:80]
            raise SpanError(
                Cause.LIST_MALFORMED, f"{where}: {key} is {found}, the path says {expected}"
            )
    offset, fv_conf, asd_conf = (
        parse_number(header.get(key, "0"), f"{where}: {key}")
        for key in ("Offset", "FV Conf", "ASD Conf")
    )
    table = _parse_rows(lines, first, where)
    units = _check_boxes(table, units, lambda row: f"{where} {_row_name(lines, first, row)}")
    left_top, size = table[:, 1:3], table[:, 3:5]
    boxes = np.round(np.hstack([left_top, left_top + size]), 6).tolist()
    once: dict[tuple[float, ...], Any] = {}  # boxes move in coarse steps: keep one copy of each
    return Span(
        name=name,
        times=tuple((table[:, 0] / ANNOTATION_FPS).tolist()),
        boxes=tuple(once.setdefault(tuple(box), tuple(box)) for box in boxes),
        units=units,
        audio_offset=round(offset),
        fv_conf=fv_conf,
        asd_conf=asd_conf,
    )


def _parse_header(lines: list[bytes], where: str) -> dict[str, str]:
    """``Key : value`` lines; of several values (``20.230 (1)``) the first counts."""
    header: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        key, colon, value = line.partition(b":")
        if colon:
            header[_text(key)] = _text(b"".join(value.split()[:1]))
        elif line.strip():
            detail = f"{where} line {number}: {_text(line)[:60]} is no 'Key : value'"
            raise SpanError(Cause.LIST_MALFORMED, detail)
    return header


def _parse_rows(lines: list[bytes], first: int, where: str) -> NDArray[np.float64]:
    """(n, 5) FRAME X Y W H of ``lines[first:]``, n >= 1; frames are whole and increase."""
    body = lines[first:]
    rows = [row for row in (line.split() for line in body) if row]
    if not rows:
        raise SpanError(Cause.LIST_MALFORMED, f"{where}: no rows below FRAME X Y W H")
    # float() would also take 1_000 and nan: only what plain numbers are made of may come this far
    plain = not b"".join(body).translate(None, b"0123456789+-.eE \t")
    if not plain or any(len(row) != 5 for row in rows):
        _raise_bad_line(lines, first, where)
    try:
        table = np.array(rows, dtype=np.float64)
    except ValueError:  # e.g. 0.3.1 or 1-2: plain characters, no number
        _raise_bad_line(lines, first, where)
    frames = table[:, 0]
    wrong = (frames != np.floor(frames)) | (frames < 0)
    wrong |= frames > MAX_SECONDS * ANNOTATION_FPS
    wrong[1:] |= frames[1:] <= frames[:-1]
    for row in np.flatnonzero(wrong)[:1]:
        detail = (
            f"{where} {_row_name(lines, first, row)}: FRAME must be whole, above the one before, "
            f"and at most {MAX_SECONDS * ANNOTATION_FPS:.0f}"
        )
        raise SpanError(Cause.LIST_MALFORMED, detail)
    return table


def _raise_bad_line(lines: list[bytes], first: int, where: str) -> NoReturn:
    """Find the line that is not five numbers and name the value."""
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split()
        if cells and len(cells) != 5:
            detail = f"{where} line {number}: {len(cells)} values, not 5: {_text(line)[:60]}"
            raise SpanError(Cause.LIST_MALFORMED, detail)
        for cell, column in zip(cells, ("FRAME", "X", "Y", "W", "H"), strict=False):
            parse_number(_text(cell), f"{where} line {number}: {column}")
    raise AssertionError(f"{where}: every line reads, the table does not")


def _check_boxes(
    table: NDArray[np.float64], said: BoxUnits | None, row_name: Callable[[int], str]
) -> BoxUnits:
    """Decide by the sizes whether boxes are fractions or pixels at height 360, and test every one.

    Faces leave the frame, so boxes may too, but they must touch it and be no larger than two of it.
    """
    x, y, width, height = table[:, 1:].T
    bad = ~np.isfinite(table).all(axis=1) | (width <= 0) | (height <= 0)
    for row in np.flatnonzero(bad)[:1]:
        raise SpanError(Cause.LIST_BOXES, f"{row_name(row)}: W and H must be finite and positive")
    units: BoxUnits = "fraction" if np.median(height) <= MAX_SIDES else "height360"
    if said is not None and units != said:
        detail = f"{row_name(0)}: {UNITS_WORDS[units]}, but the list holds {UNITS_WORDS[said]}"
        raise SpanError(Cause.LIST_BOXES, detail)
    # the width of a frame of 360 lines is not known: up to 4:1
    frame_width, frame_height = (1.0, 1.0) if units == "fraction" else (4 * 360.0, 360.0)
    bad = (width > MAX_SIDES * frame_width) | (height > MAX_SIDES * frame_height)
    bad |= (x >= frame_width) | (y >= frame_height) | (x + width <= 0) | (y + height <= 0)
    for row in np.flatnonzero(bad)[:1]:
        detail = f"{row_name(row)}: the box is outside the frame or larger than two of it"
        raise SpanError(Cause.LIST_BOXES, detail)
    return units


def _row_name(lines: list[bytes], first: int, row: int) -> str:
    """``line 12 (000349 0.319 ...)`` of the row-th row that is not blank."""
    numbers = [number for number, line in enumerate(lines[first:], first + 1) if line.strip()]
    words = _text(b" ".join(lines[numbers[row] - 1].split()))
    return f"line {numbers[row]} ({words[:60]})"


def _text(data: bytes) -> str:
    return data.strip().decode("utf-8", "backslashreplace")


# Trees of utterances


class Utterance(NamedTuple):
    """One text file of a tree."""

    name: str
    path: str
    size: int
    member: zipfile.ZipInfo | None = None


class Tree(Protocol):
    """A VoxCeleb metadata tree, wherever it is."""

    @property
    def where(self) -> str:
        """Its path, for messages."""

    def groups(self) -> Iterator[tuple[str, str, list[Utterance]]]:
        """(identity, video, utterances), sorted. Only names are held, never contents."""

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        """Content of each file, or a word why it cannot be read."""

    def meta(self) -> Iterator[tuple[str, bytes]]:
        """Path and content of each ``vox?_meta.csv`` inside or beside the tree."""


class FolderTree:
    """A tree in a folder: ``txt``, or ``dev/txt`` and ``test/txt``, or the identities themselves."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root
        self.where = shown(root)
        inner = [f"{root}/txt", f"{root}/dev/txt", f"{root}/test/txt"]
        self.roots = [path for path in inner if fs.isdir(path)] or [root]

    def groups(self) -> Iterator[tuple[str, str, list[Utterance]]]:
        people = defaultdict(list)
        for root in self.roots:
            for identity, folder in list_folders(self.fs, root):
                people[identity].append(folder)
        for identity, folders in sorted(people.items()):
            videos = defaultdict(list)
            for folder in folders:
                for parts, path, size in list_files(self.fs, folder, depth=2):
                    if len(parts) == 2 and parts[1].endswith(".txt"):
                        videos[parts[0]].append(Utterance(parts[1][:-4], path, size))
            for video, files in sorted(videos.items()):
                yield identity, video, sorted(files)

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        small = [file.path for file in files if file.size <= MAX_UTTERANCE_BYTES]
        found = dict(
            zip(small, self.fs.cat_ranges(small, None, None, on_error="return"), strict=True)
        )
        return [
            _content(file, found.get(file.path, f"{file.size} bytes, too large")) for file in files
        ]

    def meta(self) -> Iterator[tuple[str, bytes]]:
        yield from _meta_in(self.fs, self.root)
        yield from _meta_in(self.fs, self.root.rpartition("/")[0])


def _content(file: Utterance, found: bytes | str | Exception) -> bytes | str:
    """What ``fs.cat_ranges`` returned. A file that may not be read is that file's trouble, a broken connection ours."""
    if isinstance(found, PermissionError | FileNotFoundError):
        return type(found).__name__
    if isinstance(found, Exception):
        reason = f"{type(found).__name__}: {one_line(str(found), 200)}"
        raise ListError(f"{printable(file.path)}: {reason}: run the same command again") from found
    return found


class ZipTree:
    """A tree in a zip: members are read one by one, never extracted. A remote zip is first copied to a temporary file.

    Python's zipfile needs 0.6 GB for the names of VoxCeleb2's 1.09 million files; an unpacked folder needs none of it.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.root = path
        self.where = shown(path)
        try:
            self.archive = zipfile.ZipFile(path if is_local(fs) else self._copy())
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ListError(f"{self.where}: not a readable zip: {error}") from error
        self.members = [
            member
            for member in self.archive.infolist()
            if not member.is_dir() and not member.filename.startswith("__MACOSX/")
        ]
        # as the folder is sorted: name by name; one string per member costs less than a list
        self.members.sort(key=lambda member: "\0".join(member.filename.split("/")[-3:]))

    def _copy(self) -> IO[bytes]:
        copy = tempfile.NamedTemporaryFile(prefix="headray-list-")  # noqa: SIM115 (lives as long as the archive)
        self.fs.get_file(self.root, copy.name)
        return copy

    def groups(self) -> Iterator[tuple[str, str, list[Utterance]]]:
        split = ((member.filename.split("/")[-3:], member) for member in self.members)
        utterances = (
            Utterance(parts[2][:-4], f"{self.where}/{member.filename}", member.file_size, member)
            for parts, member in split
            if len(parts) == 3 and parts[2].endswith(".txt") and not parts[2].startswith(".")
        )
        for folder, group in itertools.groupby(
            utterances, lambda file: file.path.rsplit("/", 3)[1:3]
        ):
            yield folder[0], folder[1], list(group)

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        return [self._read(file.member, MAX_UTTERANCE_BYTES) for file in files if file.member]

    def _read(self, member: zipfile.ZipInfo, limit: int) -> bytes | str:
        try:
            with self.archive.open(member) as stream:
                content = stream.read(limit + 1)  # the size in the directory may lie
        except (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"  # damaged, encrypted, unknown compression
        return content if len(content) <= limit else f"more than {limit} bytes, too large"

    def meta(self) -> Iterator[tuple[str, bytes]]:
        for member in self.members:
            if member.filename.rpartition("/")[2] in META_UNITS:
                where = f"{self.where}/{printable(member.filename)}"
                content = self._read(member, MAX_META_BYTES)
                if isinstance(content, str):
                    raise ListError(f"{where}: {content}")
                yield where, content
        yield from _meta_in(self.fs, self.root.rpartition("/")[0])


def _meta_in(fs: Any, folder: str) -> Iterator[tuple[str, bytes]]:
    for path in (f"{folder}/{name}" for name in META_UNITS if folder):
        try:
            yield shown(path), fs.cat_file(path)
        except (
            FileNotFoundError,
            NotADirectoryError,
            PermissionError,
        ):  # S3 says forbidden where one may not list
            continue


def read_meta(content: bytes, where: str) -> dict[str, tuple[str, str]]:
    """``vox2_meta.csv`` (or VoxCeleb1's, with tabs) → {identity: (split, gender)}. Cells end in blanks."""
    lines = content.decode("utf-8-sig", "backslashreplace").splitlines()
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:
        raise ListError(f"{where}: {error}: download it again") from error
    columns = rows[0] if rows else []
    owner = next((name for name in columns if re.fullmatch(r"VoxCeleb\d ID", name)), "VoxCeleb2 ID")
    if missing := [name for name in (owner, "Gender", "Set") if name not in columns]:
        raise ListError(f"{where}: missing column {', '.join(missing)}: download it again")
    people: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        cells = dict(zip(columns, row, strict=False))
        split = SPLITS.get(cells.get("Set", "").lower())
        if len(row) != len(columns) or not split:
            raise ListError(f"{where} line {number}: {row}: Set must be dev or test")
        entry = (split, cells["Gender"].lower())
        if people.setdefault(cells[owner], entry) != entry:
            raise ListError(f"{where} line {number}: {cells[owner]} is listed twice and differs")
    return people


def read_utterance(
    file: Utterance, content: bytes | str, identity: str, video: str, units: BoxUnits | None
) -> Span:
    """:func:`parse_utterance` of a file of a tree; ``content`` is a word if it could not be read."""
    if not SAFE.fullmatch(file.name):
        detail = f"{file.path}: name it with 1 to 40 letters, digits, '-' and '_'"
        raise SpanError(Cause.LIST_UNSAFE, detail)
    if isinstance(content, str):
        raise SpanError(Cause.LIST_MALFORMED, f"{file.path}: {content}")
    return parse_utterance(content, file.path, identity, video, file.name, units)


def sniff_units(tree: Tree) -> BoxUnits:
    """What a tree holds, fractions (VoxCeleb2) or pixels (VoxCeleb1): the word of the first file that reads."""
    trouble = ""
    num_tried = 0
    for identity, video, files in tree.groups():
        for file, content in zip(files, tree.read(files), strict=True):
            try:
                return read_utterance(file, content, identity, video, None).units
            except SpanError as error:
                trouble = trouble or error.detail
        num_tried += len(files)
        if num_tried >= SNIFFED_FILES:
            break
    if not num_tried:
        raise ListError(f"{tree.where}: no <identity>/<video>/<utterance>.txt in it")
    raise ListError(
        f"{tree.where}: none of {num_tried} utterance files reads ({trouble}): "
        "name the format with --input-format to go on all the same"
    )


def tree_videos(tree: Tree, units: BoxUnits | None, url_template: str) -> Iterator[Video]:
    """Videos of a tree whose boxes are said to be in ``units`` (None: as :func:`sniff_units` finds)."""
    people: dict[str, tuple[str, str]] = {}
    said = set()
    for path, table in tree.meta():
        people |= read_meta(table, path)
        said.add(META_UNITS[PurePosixPath(path).name])
    if units is None:
        units = sniff_units(tree)
        if said and units not in said:
            raise ListError(
                f"{tree.where}: its boxes are {UNITS_WORDS[units]}, the meta csv beside it is of the "
                "other VoxCeleb: name the format with --input-format"
            )
    for identity, video, files in tree.groups():
        spans: dict[str, Span] = {}
        rejected: list[Track] = []
        for file, content in zip(files, tree.read(files), strict=True):
            try:
                if file.name in spans:
                    detail = f"{file.path}: another file has this name"
                    raise SpanError(Cause.LIST_DUPLICATE, detail)
                spans[file.name] = read_utterance(file, content, identity, video, units)
            except SpanError as error:
                rejected.append(rejected_span(len(rejected), safe_name(file.name), error))
        split, gender = people.get(identity, ("", ""))
        row = Video(
            identity=identity,
            video=video,
            url=url_template.replace("{video}", video),
            split=split,
            gender=gender,
        )
        yield finish(row, list(spans.values()), rejected, tree.where)


# A folder of videos


def folder_videos(fs: Any, root: str) -> Iterator[Video]:
    """``<identity>/<any>.mp4``: the id is the file's name where that is safe and free, else a hash of its path.

    The user named the folder on the command line, so its files need no ``allow_local``.
    """
    if ending(root) == ".zip":
        raise ListError(f"{shown(root)}: videos inside a zip cannot be read: unpack it")
    for _, path, _ in list_files(fs, root, depth=1):
        if _is_video(path):
            cure = "move it into a folder <identity>/, or give --input-format files"
            error = SpanError(Cause.LIST_MALFORMED, f"{path}: {cure}")
            row = Video(identity="", video=short_hash(path))
            yield finish(row, [], [rejected_span(0, "00001", error)], "")
    for identity, folder in list_folders(fs, root):
        videos: dict[str, str] = {}
        for parts, path, _ in list_files(fs, folder, depth=4):
            if _is_video(path):
                stem = PurePosixPath(path).stem
                is_plain = len(parts) == 1 and SAFE.fullmatch(stem) and stem not in videos
                videos[stem if is_plain else short_hash("/".join(parts))] = full_path(fs, path)
        for video, path in sorted(videos.items()):
            row = Video(identity=identity, video=video)
            if path == printable(path):
                yield finish(replace(row, path=path), [Span(name="00001")], [], path)
            else:
                error = SpanError(Cause.LIST_UNSAFE, f"{path}: rename it to plain characters")
                yield finish(row, [], [rejected_span(0, "00001", error)], printable(path))


def file_videos(fs: Any, root: str) -> Iterator[Video]:
    """``<any>.mp4``, each a person of its own, called as the file is; other names become a hash."""
    people: dict[str, str] = {}
    for parts, path, _ in list_files(fs, root, depth=1):
        if len(parts) == 1 and _is_video(path):
            stem = PurePosixPath(path).stem
            is_plain = SAFE.fullmatch(stem) and stem not in people
            people[stem if is_plain else short_hash(parts[0])] = full_path(fs, path)
    for name, path in sorted(people.items()):
        row = Video(identity=name, video=name)
        if path == printable(path):
            yield finish(replace(row, path=path), [Span(name="00001")], [], path)
        else:
            error = SpanError(Cause.LIST_UNSAFE, f"{path}: rename it to plain characters")
            yield finish(row, [], [rejected_span(0, "00001", error)], printable(path))


def _is_video(path: str) -> bool:
    return ending(path) in VIDEO_ENDINGS
