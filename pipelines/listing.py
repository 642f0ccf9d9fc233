"""What every form of list shares: its errors, safe names, rejected spans, numbers, and file systems.

What is wrong with a whole list raises :class:`ListError`. What is wrong with one utterance or row raises
:class:`SpanError` inside the reader and rejects that span only: it stays on the video's record as a rejected
:class:`Track` named ``span-...``; the video itself is rejected when no span is left.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.download import public_url
from pipelines.schema import ID_PATTERN, Cause, Span, Track, Video, end_if_empty, one_line, reject

ANNOTATION_FPS = 25.0
"""VoxCeleb's annotators worked on copies resampled to 25 frames a second: FRAME k is at k / 25 s."""
MAX_SECONDS = 24 * 3600.0
"""A time beyond this is a mistake of the list."""
MAX_SIDES = 2.0
"""A box with a side of more than two frames is a mistake of the list."""
SPLITS = {"dev": "train", "train": "train", "val": "val", "valid": "val", "test": "test", "": ""}
"""Words of the lists → names of our splits."""
STRICTNESS = {"dev": 0, "train": 0, "val": 1, "valid": 1, "test": 2}
"""Words of the lists → which side of a split counts when a video is on two."""

SAFE = re.compile(ID_PATTERN)
"""Identities and video ids become file names and keys: nothing else may pass."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)


class ListError(ValueError):
    """The list as a whole cannot be used; one line names path, value and cure."""


class SpanError(Exception):
    """One utterance or row cannot be used."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = printable(detail)


def short_hash(text: str) -> str:
    """11 characters of ``text``'s sha256 (66 bits), url-safe like a YouTube id, but never with a leading ``-``."""
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
    name = base64.urlsafe_b64encode(digest).decode()[:11]
    return "_" + name[1:] if name.startswith("-") else name


def safe_name(name: str) -> str:
    """``name`` if it can be a file name and a key, else a stable replacement."""
    return name if SAFE.fullmatch(name) else f"unsafe{short_hash(name)}"


def printable(text: str) -> str:
    """File names may hold bytes that are not UTF-8; records may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(path: str) -> str:
    """How messages and records name a list: printable, and a URL without its password and signature."""
    return printable(public_url(path) if "://" in path else path)


@contextmanager
def open_whole(fs: Any, path: str) -> Iterator[IO[bytes]]:
    """A file of ``fs`` for reading, a remote one as a temporary copy: not every server answers for parts of a file."""
    if is_local(fs):
        with fs.open(path, "rb") as stream:
            yield stream
        return
    with tempfile.NamedTemporaryFile(prefix="headray-list-") as copy:
        fs.get_file(path, copy.name)
        yield copy


def parse_number(text: str, where: str) -> float:
    """A finite decimal number. NaN and infinity raise :class:`SpanError` as boxes, other text as malformed."""
    if NUMBER.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value
    elif not NOT_FINITE.fullmatch(text):
        raise SpanError(Cause.LIST_MALFORMED, f"{where} is {ascii(text)[:40]}, not a number")
    raise SpanError(Cause.LIST_BOXES, f"{where} is {text[:40]}, not finite")


def rejected_span(number: int, name: str, error: SpanError) -> Track:
    """A span that cannot be used, as it stays on its video's record and in the ledger.

    Args:
        number: how many spans of the video were rejected before.
        name: the span's.
        error: why.
    """
    return Track(
        name=f"span-{number:03d}",
        span=name,
        state="rejected",
        cause=error.cause.value,
        detail=one_line(error.detail),
    )


def finish(video: Video, spans: list[Span], rejected: list[Track], where: str) -> Video:
    """Give a video its spans, sorted; reject it when its names are unsafe or no span can be used."""
    named = replace(
        video,
        identity=safe_name(video.identity),
        video=safe_name(video.video),
        spans=tuple(sorted(spans, key=lambda span: span.name)),
        tracks=tuple(rejected),
    )
    for name in (video.identity, video.video):
        if not SAFE.fullmatch(name) and (name or spans):
            detail = f"{where}: {ascii(name)[:80]}: use 1 to 40 letters, digits, '-' and '_'"
            return reject(replace(named, url=""), Cause.LIST_UNSAFE, detail)
    return named if spans else end_if_empty(named)


def unique_keys(videos: Iterator[Video]) -> Iterator[Video]:
    """Reject a video whose key another one has: ``a-b`` with ``c`` and ``a`` with ``b-c`` both give ``a-b-c``."""
    seen: set[str] = set()
    for video in videos:
        if video.key.count("-") < 2:
            yield video
        elif video.key in seen:
            name = f"unsafe{short_hash(f'{video.identity}/{video.video}')}"
            detail = f"{video.identity} with {video.video} has the key of another video: rename one"
            yield reject(replace(video, video=name), Cause.LIST_DUPLICATE, detail)
        else:
            seen.add(video.key)
            yield video


def open_location(uri: str) -> tuple[Any, str]:
    """The fsspec file system of ``uri`` and the path in it. Raises :class:`ListError` if nothing is there."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        path = path.rstrip("/") or "/"
        found = fs.exists(path)
    except Exception as error:  # every backend has its own kinds; to the user they all say this
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise ListError(f"{shown(uri)}: cannot be opened: {reason}") from error
    if not found:
        raise ListError(f"{shown(uri)}: no such file or folder")
    return fs, path


def is_local(fs: Any) -> bool:
    """True for the file system of this machine."""
    return isinstance(fs, LocalFileSystem)


def full_path(fs: Any, path: str) -> str:
    """A path that opens without ``fs``: as it is on this machine, else with its protocol."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def ending(path: str) -> str:
    """``.csv`` of ``folder/list.CSV`` and of ``https://host/list.csv?version=2``."""
    name = path.partition("?")[0] if "://" in path else path
    return PurePosixPath(name).suffix.lower()


def list_folders(fs: Any, root: str) -> list[tuple[str, str]]:
    """(name, path) of the folders in ``root``, sorted, without hidden ones."""
    paths = [
        entry["name"].rstrip("/")
        for entry in fs.ls(root, detail=True)
        if entry["type"] == "directory"
    ]
    folders = [(path.rpartition("/")[2], path) for path in paths]
    return sorted((name, path) for name, path in folders if not name.startswith("."))


def list_files(fs: Any, folder: str, depth: int) -> list[tuple[tuple[str, ...], str, int]]:
    """(parts below ``folder``, path, bytes) of the files in it, sorted, without hidden ones."""
    found = []
    for path, entry in fs.find(folder, maxdepth=depth, detail=True).items():
        parts = tuple(path.removeprefix(folder).strip("/").split("/"))
        if not any(part.startswith(".") for part in parts):
            found.append((parts, path, int(entry.get("size") or 0)))
    return sorted(found)
