"""Stage 1. A list of videos → one :class:`Video` each. Runs in the driver, one video at a time.

Five input forms, from a folder, a zip, or any fsspec URI (docs/formats.md has an example of each):

``voxceleb2``
    ``txt/<identity>/<video>/<utterance>.txt``, boxes as fractions of the frame; ``vox2_meta.csv`` if present.
``voxceleb1``
    The same tree, boxes in pixels of a frame scaled to 360 lines; ``vox1_meta.csv`` if present.
``vox-metadata``
    ``vox-metadata.csv`` of AliaksandrSiarohin/video-preprocessing: a constant box in pixels, times in frames.
``table``
    csv (comma, semicolon or tab), parquet or jsonl with ``identity`` and ``url`` or ``path``, and optionally ``video``
    (default: a hash of the URL), ``start`` and ``end`` in seconds (no ``end``: to the end), ``split`` (train, val, test),
    ``gender``, and ``left, top, right, bottom``: one box that holds from ``start`` to ``end``, in pixels of a frame of
    ``width`` x ``height`` where these columns are filled in, else in fractions of the frame. Rows that share identity
    and video become the spans of one video.
``folder``
    ``<identity>/<any>.mp4`` (or another container): one's own videos.

What is wrong with a whole list raises :class:`ListError`. What is wrong with one utterance or row rejects that span
only: it stays on the video's record as a rejected :class:`Track` named ``span-...``, and the video is rejected when no
span is left. Identities and video ids become file names, so only letters, digits, ``-`` and ``_`` pass; others are
rejected under a replacement name. Rows come sorted by identity and video, whatever the order of the list.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, Any, Literal, NamedTuple, NoReturn, Protocol, get_args
from urllib.parse import urlsplit

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from pipelines.schema import BoxUnits, Cause, Span, Track, Video, one_line, reject

logger = logging.getLogger(__name__)

ListFormat = Literal["auto", "voxceleb2", "voxceleb1", "vox-metadata", "table", "folder"]

YOUTUBE = "https://www.youtube.com/watch?v={video}"

ANNOTATION_FPS = 25.0
"""VoxCeleb's annotators worked on copies resampled to 25 frames a second: FRAME k is at k / 25 s."""

MAX_SECONDS = 24 * 3600.0
"""A time beyond this is a mistake of the list."""
MAX_CONSTANT_SECONDS = 3600.0
"""A table's constant box cannot hold longer than this."""
MAX_SIDES = 2.0
"""A box with a side of more than two frames is a mistake of the list."""
MAX_UTTERANCE_BYTES = 4 * 2**20
"""A minute of 25 fps annotation is 50 KB. Guards against hostile files and zip bombs."""
MAX_META_BYTES = 16 * 2**20
MAX_LINE_CHARACTERS = 2**20
SNIFFED_FILES = 50
"""Utterance files tried before a VoxCeleb tree is given up as unreadable."""

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)
TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".parquet", ".jsonl", ".ndjson"))
VOX_METADATA_COLUMNS = ("video_id", "start", "end", "bbox", "fps", "width", "height", "partition")
SPLITS = {"dev": "train", "train": "train", "val": "val", "valid": "val", "test": "test", "": ""}

SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")
META_NAME = re.compile(r"vox[12]_meta\.csv")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)
URL_CHARACTERS = re.compile(r"[!#-;=?-\[\]_a-z~]{1,2048}")
"""Printable ASCII without blanks, quotes, backslash and angle brackets: what a URL may hold."""


class ListError(ValueError):
    """The list as a whole cannot be used; the message names path, value and cure."""


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """How rows become URLs and paths. The job fills it from ``--download.url-template`` and ``--download.allow-local``."""

    url_template: str = YOUTUBE
    """Where a VoxCeleb video is fetched; ``{video}`` is replaced by its id."""
    allow_local: bool = False
    """Let a table name local files, in ``path`` or as ``file://``. Off: a list from elsewhere cannot read this disk."""

    def __post_init__(self) -> None:
        if "{video}" not in self.url_template:
            raise ValueError(f"url template {self.url_template!r} has no {{video}} in it")
        if not self.url_template.startswith(("http://", "https://")):
            raise ValueError(f"url template {self.url_template!r} is not http:// or https://")


class SpanError(Exception):
    """One utterance or row cannot be used: ends up as a rejected track."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


# ---- names


def short_hash(text: str) -> str:
    """11 characters of ``text``'s sha256 (66 bits), url-safe, like a YouTube id but never with a leading ``-``."""
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
    name = base64.urlsafe_b64encode(digest).decode()[:11]
    return "_" + name[1:] if name.startswith("-") else name


def safe_name(name: str) -> str:
    """``name`` if it can be a file name and a key, else a stable replacement."""
    return name if SAFE.fullmatch(name) else f"unsafe{short_hash(name)}"


def rejected_span(name: str, cause: Cause, detail: str) -> Track:
    """A span that cannot be used, as it stays on the video's record and in the ledger."""
    return Track(
        name=f"span-{name}", span=name, state="rejected", cause=cause.value, detail=one_line(detail)
    )


def finish(video: Video, spans: list[Span], rejected: list[Track], where: str) -> Video:
    """Give a video its spans; reject it when its names are unsafe or nothing of it can be used."""
    video = replace(
        video,
        spans=tuple(sorted(spans, key=lambda span: span.name)),
        tracks=tuple(sorted(rejected, key=lambda track: track.name)),
    )
    unsafe = [name for name in (video.identity, video.video) if not SAFE.fullmatch(name)]
    if unsafe:
        video = replace(
            video, identity=safe_name(video.identity), video=safe_name(video.video), url=""
        )
        return reject(
            video,
            Cause.LIST_UNSAFE,
            f"{where}: {ascii(unsafe[0])[:80]}: use 1 to 64 letters, digits, '-' and '_'",
        )
    if not spans and rejected:
        return reject(video, Cause(rejected[0].cause), rejected[0].detail)
    return video


def printable(text: str) -> str:
    """Names of a file system may hold bytes that are no UTF-8; records may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def unique_keys(videos: Iterator[Video]) -> Iterator[Video]:
    """Reject a video whose key another one has: ``a-b`` + ``c`` and ``a`` + ``b-c`` both give ``a-b-c``."""
    seen: set[str] = set()
    for video in videos:
        if video.key.count("-") < 2:
            yield video
        elif video.key in seen:
            detail = (
                f"identity {video.identity} with video {video.video} has the key {video.key} "
                "of another row: rename the identity"
            )
            name = f"unsafe{short_hash(f'{video.identity}/{video.video}')}"
            yield reject(replace(video, video=name), Cause.LIST_DUPLICATE, detail)
        else:
            seen.add(video.key)
            yield video


# ---- VoxCeleb's text files


def parse_utterance(
    content: bytes, where: str, identity: str, video: str, name: str, units: BoxUnits | None
) -> Span:
    """Read one utterance: header lines ``Key : value``, a line ``FRAME X Y W H``, a row per annotated frame.

    Args:
        content: the file.
        where: its name, for messages.
        identity, video: what its path says; the header must agree.
        name: the utterance's name, ``00001``.
        units: ``fraction`` or ``height360``, whatever the list says its boxes are; None takes the file's word.

    Raises:
        SpanError: with ``LIST_MALFORMED`` for what cannot be read and ``LIST_BOXES`` for boxes that cannot be.
    """
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next(
        (i + 1 for i, line in enumerate(lines) if line.split()[:1] == [b"FRAME"]), len(lines) + 1
    )
    header = _parse_header(lines[: first - 1], where)
    if first > len(lines):
        raise SpanError(Cause.LIST_MALFORMED, f"{where}: no line FRAME X Y W H")
    if lines[first - 1].split() != [b"FRAME", b"X", b"Y", b"W", b"H"]:
        raise SpanError(
            Cause.LIST_MALFORMED,
            f"{where} line {first}: columns {_text(lines[first - 1])}, expected FRAME X Y W H",
        )
    for key, expected in (("Identity", identity), ("Reference", video)):
        if header.get(key) != expected:
            raise SpanError(
                Cause.LIST_MALFORMED,
                f"{where}: {key} is {header.get(key, 'missing')}, the path says {expected}",
            )
    offset, fv_conf, asd_conf = (
        parse_number(header.get(key, "0"), f"{where}: {key}")
        for key in ("Offset", "FV Conf", "ASD Conf")
    )
    table = _parse_rows(lines, first, where)
    units = _check_boxes(table, units, lambda row: f"{where} {_row_name(lines, first, row)}")
    boxes = np.round(np.column_stack([table[:, 1:3], table[:, 1:3] + table[:, 3:5]]), 6)
    once: dict[Any, Any] = {}  # annotated boxes move in coarse steps: keep one copy of each
    return Span(
        name=name,
        times=tuple((table[:, 0] / ANNOTATION_FPS).tolist()),
        boxes=tuple(once.setdefault(box, box) for box in map(tuple, boxes.tolist())),
        units=units,
        audio_offset=round(offset),
        fv_conf=fv_conf,
        asd_conf=asd_conf,
    )


def _parse_header(lines: list[bytes], where: str) -> dict[str, str]:
    """``Key : value`` lines; of several values (``20.230 (1)``) the first counts."""
    header: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, colon, value = line.partition(b":")
        if not colon:
            raise SpanError(
                Cause.LIST_MALFORMED, f"{where} line {number}: {_text(line)} is no 'Key : value'"
            )
        header[_text(key)] = _text(b"".join(value.split()[:1]))
    return header


def _parse_rows(lines: list[bytes], first: int, where: str) -> NDArray[np.float64]:
    """(n, 5) FRAME X Y W H of ``lines[first:]``, n >= 1, with whole, increasing frame numbers."""
    body = lines[first:]
    rows = [row for row in (line.split() for line in body) if row]
    if not rows:
        raise SpanError(Cause.LIST_MALFORMED, f"{where}: no rows below FRAME X Y W H")
    try:
        # float() also takes 1_000 and nan: only plain digits may come this far
        clean = not b"".join(body).translate(None, b"0123456789+-.eE \t")
        table = np.array(rows, dtype=np.float64) if clean else np.empty((0, 0))
    except ValueError:
        table = np.empty((0, 0))
    if table.shape != (len(rows), 5):
        _raise_bad_line(lines, first, where)
    frames = table[:, 0]
    wrong = (frames != np.floor(frames)) | (frames < 0)
    wrong |= frames > MAX_SECONDS * ANNOTATION_FPS
    wrong[1:] |= frames[1:] <= frames[:-1]
    for row in np.flatnonzero(wrong)[:1]:
        raise SpanError(
            Cause.LIST_MALFORMED,
            f"{where} {_row_name(lines, first, row)}: FRAME must be a whole number, greater than "
            f"the one above, at most {MAX_SECONDS * ANNOTATION_FPS:.0f}",
        )
    return table


def _raise_bad_line(lines: list[bytes], first: int, where: str) -> NoReturn:
    """Find the line that is not five numbers, and name the value."""
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split()
        if cells and len(cells) != 5:
            raise SpanError(
                Cause.LIST_MALFORMED,
                f"{where} line {number}: {len(cells)} values, expected 5: {_text(line)[:60]}",
            )
        for cell, column in zip(cells, ("FRAME", "X", "Y", "W", "H"), strict=False):
            parse_number(_text(cell), f"{where} line {number}: {column}")
    raise AssertionError(f"{where}: every line reads, the file does not")


def _row_name(lines: list[bytes], first: int, row: int) -> str:
    """``line 12 (000349 0.319 ...)`` of the row-th row that is not blank."""
    numbers = [i for i, line in enumerate(lines[first:], first + 1) if line.strip()]
    line = _text(b" ".join(lines[numbers[row] - 1].split()))
    return f"line {numbers[row]} ({line[:60]})"


def _check_boxes(
    table: NDArray[np.float64], expected: BoxUnits | None, row_name: Callable[[int], str]
) -> BoxUnits:
    """Decide from the widths and heights whether boxes are fractions or pixels at height 360, and test each.

    Boxes may leave the frame (faces do), but must touch it and be no larger than two frames.
    """
    x, y, width, height = table[:, 1:].T
    bad = ~np.isfinite(table).all(axis=1) | (width <= 0) | (height <= 0)
    for row in np.flatnonzero(bad)[:1]:
        raise SpanError(Cause.LIST_BOXES, f"{row_name(row)}: W and H must be finite and positive")
    sides = np.maximum(width, height)
    units: BoxUnits = "fraction" if np.median(sides) <= MAX_SIDES else "height360"
    if expected is not None and units != expected:
        row = int(np.argmax(sides)) if units == "height360" else 0
        words = {"fraction": "fractions of the frame", "height360": "pixels at height 360"}
        raise SpanError(
            Cause.LIST_BOXES, f"{row_name(row)}: {words[units]}, the list has {words[expected]}"
        )
    lines = 1.0 if units == "fraction" else 360.0
    columns = 1.0 if units == "fraction" else 4 * 360.0  # at 360 lines the width is not known
    bad = (width > MAX_SIDES * columns) | (height > MAX_SIDES * lines)
    bad |= (x >= columns) | (y >= lines) | (x + width <= 0) | (y + height <= 0)
    for row in np.flatnonzero(bad)[:1]:
        raise SpanError(Cause.LIST_BOXES, f"{row_name(row)}: larger than two frames or outside")
    return units


def parse_number(text: str, where: str) -> float:
    """A finite decimal number. Raises :class:`SpanError`: NaN and infinity as boxes, the rest as malformed."""
    if NOT_FINITE.fullmatch(text) or (NUMBER.fullmatch(text) and math.isinf(float(text))):
        raise SpanError(Cause.LIST_BOXES, f"{where} is {text[:40]}, not a finite number")
    if not NUMBER.fullmatch(text):
        raise SpanError(Cause.LIST_MALFORMED, f"{where} is {ascii(text)[:40]}, not a number")
    return float(text)


def _text(data: bytes) -> str:
    return data.strip().decode("utf-8", "backslashreplace")


# ---- file systems


def open_location(uri: str) -> tuple[Any, str]:
    """The fsspec file system of ``uri`` and the path in it. Raises :class:`ListError` if nothing is there."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        path = path.rstrip("/") or "/"
        found = fs.exists(path)
    except Exception as error:  # each backend has its own kinds; to the user they all say this
        raise ListError(
            f"{uri}: cannot be opened: {type(error).__name__}: {one_line(str(error), 200)}"
        ) from error
    if not found:
        raise ListError(f"{uri}: no such file or folder")
    return fs, path


def is_local(fs: Any) -> bool:
    """True for the file system of this machine."""
    return isinstance(fs, LocalFileSystem)


def full_path(fs: Any, path: str) -> str:
    """A path that opens without ``fs``: as it is on this machine, else with its protocol."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def list_folders(fs: Any, root: str) -> list[tuple[str, str]]:
    """(name, path) of the folders in ``root``, sorted, without hidden ones."""
    paths = [
        entry["name"].rstrip("/")
        for entry in fs.ls(root, detail=True)
        if entry["type"] == "directory"
    ]
    folders = [(path.rsplit("/", 1)[-1], path) for path in paths]
    return sorted((name, path) for name, path in folders if not name.startswith("."))


def list_files(fs: Any, folder: str, depth: int) -> list[tuple[tuple[str, ...], str, int | None]]:
    """(parts below ``folder``, path, bytes) of the files in it, sorted, without hidden ones."""
    found = []
    for path, entry in fs.find(folder, maxdepth=depth, detail=True).items():
        parts = tuple(path[len(folder) :].strip("/").split("/"))
        if not any(part.startswith(".") for part in parts):
            found.append((parts, path, entry.get("size")))
    return sorted(found, key=lambda file: file[:2])


# ---- trees of text files


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
        """(identity, video, utterances), sorted; only names are held."""

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        """Content of each file, or a word why it cannot be read."""

    def meta(self) -> Iterator[tuple[str, bytes]]:
        """Paths and contents of ``vox1_meta.csv`` and ``vox2_meta.csv`` inside or beside the tree."""


class FolderTree:
    """A tree in a folder: ``txt``, or ``dev/txt`` with ``test/txt``, or the identities themselves."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.where = printable(root)
        self.root = root
        inner = [f"{root}/txt", f"{root}/dev/txt", f"{root}/test/txt"]
        self.roots = [path for path in inner if fs.isdir(path)] or [root]

    def groups(self) -> Iterator[tuple[str, str, list[Utterance]]]:
        people = defaultdict(list)
        for root in self.roots:
            for name, path in list_folders(self.fs, root):
                people[name].append(path)
        for identity, folders in sorted(people.items()):
            videos = defaultdict(list)
            for folder in folders:
                for parts, path, size in list_files(self.fs, folder, depth=2):
                    if len(parts) == 2 and parts[1].endswith(".txt"):
                        videos[parts[0]].append(Utterance(parts[1][:-4], path, size or 0))
            for video in sorted(videos):
                yield identity, video, sorted(videos[video], key=lambda file: file[:2])

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        small = [file.path for file in files if file.size <= MAX_UTTERANCE_BYTES]
        found = self.fs.cat(small, on_error="return") if small else {}
        contents: list[bytes | str] = []
        for file in files:
            content = found.get(file.path, f"{file.size} bytes, more than {MAX_UTTERANCE_BYTES}")
            if isinstance(content, PermissionError | FileNotFoundError):
                content = type(content).__name__
            elif isinstance(content, Exception):
                raise _broke_off(file.path, content)
            contents.append(content)
        return contents

    def meta(self) -> Iterator[tuple[str, bytes]]:
        yield from _meta_beside(self.fs, self.root)
        if "/" in self.root:
            yield from _meta_beside(self.fs, self.root.rsplit("/", 1)[0])


class ZipTree:
    """A tree in a zip. Members are read one by one, never extracted; a remote zip is first copied to a temporary file.

    Python's zipfile holds 0.6 GB for the names of VoxCeleb2's 1.09 million files; an unpacked folder needs none of it.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.where = printable(path)
        self.root = path
        try:
            self.archive = zipfile.ZipFile(path if is_local(fs) else self._copy())
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ListError(f"{self.where}: not a readable zip: {error}") from error
        self.members = [
            (member.filename.split("/"), member)
            for member in self.archive.infolist()
            if not member.is_dir() and not member.filename.startswith("__MACOSX/")
        ]
        self.members.sort(key=lambda pair: (pair[0][-3:], pair[0]))

    def _copy(self) -> IO[bytes]:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the archive)
        with self.fs.open(self.root, "rb") as remote:
            shutil.copyfileobj(remote, copy, 2**20)
        return copy

    def groups(self) -> Iterator[tuple[str, str, list[Utterance]]]:
        utterances = (
            (parts, member)
            for parts, member in self.members
            if len(parts) >= 3 and parts[-1].endswith(".txt") and not parts[-1].startswith(".")
        )
        for (identity, video), group in itertools.groupby(utterances, lambda u: tuple(u[0][-3:-1])):
            files = [
                Utterance(parts[-1][:-4], f"{self.where}/{member.filename}", member.file_size, member)
                for parts, member in group
            ]
            yield identity, video, files

    def read(self, files: list[Utterance]) -> list[bytes | str]:
        return [self._read(file.member, MAX_UTTERANCE_BYTES) for file in files if file.member]

    def _read(self, member: zipfile.ZipInfo, limit: int) -> bytes | str:
        try:
            with self.archive.open(member) as stream:
                content = stream.read(limit + 1)  # the size in the directory may lie
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"  # damaged, encrypted or of unknown compression
        return content if len(content) <= limit else f"more than {limit} bytes"

    def meta(self) -> Iterator[tuple[str, bytes]]:
        for parts, member in self.members:
            if META_NAME.fullmatch(parts[-1]):
                content = self._read(member, MAX_META_BYTES)
                if isinstance(content, str):
                    raise ListError(f"{self.where}/{member.filename}: {content}")
                yield f"{self.where}/{member.filename}", content
        if "/" in self.root:
            yield from _meta_beside(self.fs, self.root.rsplit("/", 1)[0])


def _meta_beside(fs: Any, folder: str) -> Iterator[tuple[str, bytes]]:
    for name in ("vox1_meta.csv", "vox2_meta.csv"):
        path = f"{folder}/{name}"
        if fs.exists(path):
            yield printable(path), fs.cat_file(path, start=0, end=MAX_META_BYTES)


def _broke_off(path: str, error: Exception) -> ListError:
    reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
    return ListError(f"{printable(path)}: reading broke off ({reason}): run the same command again")


def read_meta(path: str, content: bytes) -> dict[str, tuple[str, str]]:
    """``vox2_meta.csv`` (or VoxCeleb1's, with tabs): identity → (split, gender). Cells carry trailing blanks."""
    text = content.decode("utf-8-sig", "backslashreplace")
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter=delimiter)]
    columns = rows[0] if rows else []
    names = [next((c for c in columns if re.fullmatch(r"VoxCeleb\d ID", c)), ""), "Gender", "Set"]
    if not all(name in columns for name in names):
        raise ListError(
            f"{path}: columns {', '.join(columns)[:120]}: expected 'VoxCeleb2 ID', Gender and Set"
        )
    at = [columns.index(name) for name in names]
    people: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(columns) or row[at[2]].lower() not in SPLITS:
            raise ListError(f"{path} line {number}: {row}: expected dev or test in the column Set")
        entry = (SPLITS[row[at[2]].lower()], row[at[1]].lower())
        if people.setdefault(row[at[0]], entry) != entry:
            raise ListError(f"{path} line {number}: {row[at[0]]} is listed twice and differs")
    return people


def read_utterance(
    file: Utterance, content: bytes | str, identity: str, video: str, units: BoxUnits | None
) -> Span:
    """:func:`parse_utterance` of a file of a tree; ``content`` is a word if it could not be read."""
    where = printable(file.path)
    if not SAFE.fullmatch(file.name):
        raise SpanError(Cause.LIST_UNSAFE, f"{where}: use 1 to 64 letters, digits, '-' and '_'")
    if isinstance(content, str):
        raise SpanError(Cause.LIST_MALFORMED, f"{where}: {content}")
    return parse_utterance(content, where, identity, video, file.name, units)


def sniff_units(tree: Tree) -> BoxUnits:
    """Whether a tree holds fractions (VoxCeleb2) or pixels (VoxCeleb1): the word of the first file that reads."""
    trouble = ""
    tried = 0
    for identity, video, files in tree.groups():
        for file, content in zip(files, tree.read(files), strict=True):
            try:
                return read_utterance(file, content, identity, video, None).units
            except SpanError as error:
                trouble = trouble or error.detail
        tried += len(files)
        if tried >= SNIFFED_FILES:
            break
    if not tried:
        raise ListError(f"{tree.where}: no files <identity>/<video>/<utterance>.txt in it")
    raise ListError(
        f"{tree.where}: none of the first {tried} utterance files reads ({trouble}): "
        "name the format with --input-format to go on"
    )


def tree_videos(tree: Tree, units: BoxUnits | None, config: ListConfig) -> Iterator[Video]:
    """Videos of a tree whose boxes are said to be in ``units`` (None: decided by :func:`sniff_units`)."""
    units = units or sniff_units(tree)
    people: dict[str, tuple[str, str]] = {}
    for path, content in tree.meta():
        people |= read_meta(path, content)
    for identity, video, files in tree.groups():
        spans: dict[str, Span] = {}
        rejected: list[Track] = []
        for number, (file, content) in enumerate(zip(files, tree.read(files), strict=True)):
            try:
                if file.name in spans:
                    raise SpanError(
                        Cause.LIST_DUPLICATE, f"{printable(file.path)}: another file has this name"
                    )
                spans[file.name] = read_utterance(file, content, identity, video, units)
            except SpanError as error:
                rejected.append(rejected_span(f"{safe_name(file.name)}-{number}", error))
        split, gender = people.get(identity, ("", ""))
        row = Video(
            identity=identity,
            video=video,
            url=config.url_template.replace("{video}", video),
            split=split,
            gender=gender,
        )
        yield finish(row, list(spans.values()), rejected, tree.where)


# ---- tables


class Line(NamedTuple):
    """One line of a table: its cells by column, or what is wrong with the whole line."""

    number: int
    cells: dict[str, str]
    error: str = ""


def table_lines(fs: Any, path: str, suffix: str) -> Iterator[Line]:
    """Lines of a csv, jsonl or parquet file. The first is the header: number 0, cells with the columns as keys."""
    with fs.open(path, "rb") as stream:
        if suffix == ".parquet":
            yield from _parquet_lines(stream)
            return
        text = io.TextIOWrapper(
            stream, encoding="utf-8-sig", errors="backslashreplace", newline=""
        )
        yield from (_jsonl_lines if suffix in (".jsonl", ".ndjson") else _csv_lines)(text)


def _parquet_lines(stream: IO[bytes]) -> Iterator[Line]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(stream)
    yield Line(0, dict.fromkeys(table.schema_arrow.names, ""))
    columns = [name for name in table.schema_arrow.names if name in KNOWN_COLUMNS]
    number = itertools.count(1)
    for batch in table.iter_batches(batch_size=20_000, columns=columns):
        for row in batch.to_pylist():
            yield Line(next(number), {name: _cell(value) for name, value in row.items()})


def _csv_lines(text: io.TextIOWrapper) -> Iterator[Line]:
    header = text.readline(MAX_LINE_CHARACTERS)
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    yield Line(0, dict.fromkeys(columns, ""))
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
            yield Line(
                reader.line_num + 1,
                {name: cell.strip() for name, cell in zip(columns, row, strict=True)},
            )
        elif row:
            yield Line(
                reader.line_num + 1, {}, f"{len(row)} values, the header has {len(columns)}"
            )


def _jsonl_lines(text: io.TextIOWrapper) -> Iterator[Line]:
    header = False
    for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_CHARACTERS), ""), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Line(number, {}, f"no JSON: {error}")
            continue
        if not isinstance(row, dict) or any(isinstance(v, dict | list) for v in row.values()):
            yield Line(number, {}, "not an object of plain values")
            continue
        cells = {name.strip(): _cell(value) for name, value in row.items()}
        if not header:
            yield Line(0, dict.fromkeys(cells, ""))
            header = True
        yield Line(number, cells)


def _cell(value: Any) -> str:
    """A value of parquet or jsonl as csv would have it; missing and NaN are empty."""
    if value is None or value != value:
        return ""
    return printable(str(value).strip())
