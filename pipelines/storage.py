"""Files by URI, local or in an object store (fsspec): appear whole or not at all.

Local files are written beside their final name, synced and renamed. Object stores have no rename, but a put is
atomic: the object is put under its final name. Nothing here lists a directory to find out what is valid; readers
follow names written in commits and manifests.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"
"""Prefix of unfinished local files; ``remove_temporary`` deletes what a killed run left."""


class PlaceError(OSError):
    """Files cannot go where they should: no space, no permission. Ends the run with one line; it is nobody's video's fault."""


UNUSABLE = {
    errno.ENOSPC: "no space left on the device; make room and run the same command again",
    errno.EDQUOT: "the quota is used up; make room and run the same command again",
    errno.EROFS: "the file system is read-only; give another place",
    errno.EACCES: "no permission to write there; change it or give another place",
    errno.EPERM: "no permission to write there; change it or give another place",
    errno.ENOTDIR: "a file lies where a folder should be; give another place",
}
"""What is wrong with a place, and the cure, by the number of the operating system's error."""
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(place: str, numbers: Collection[int] = tuple(UNUSABLE)) -> Iterator[None]:
    """Errors with one of ``numbers`` become a :class:`PlaceError` that names ``place``; others pass."""
    try:
        yield
    except PlaceError:
        raise
    except OSError as error:
        if error.errno is None or error.errno not in numbers:
            raise
        raise PlaceError(f"{place}: {UNUSABLE[error.errno]}") from error


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path inside it. Raises ``ValueError`` for an unknown scheme."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def is_local(uri: str) -> bool:
    """Whether the URI is a path of this machine (``file://`` included)."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """``uri/part/part``; one slash between."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Local paths made absolute (workers run in another directory); other URIs unchanged."""
    if is_local(uri):
        return str(Path(filesystem(uri)[1]).expanduser().resolve())
    return uri


def exists(uri: str) -> bool:
    """Whether a file or folder is there now, past any listing cache."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def size(uri: str) -> int:
    """Bytes of a file. Raises ``FileNotFoundError``."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return int(fs.size(path))


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """A whole file, or the range ``[start, end)`` of it by a range read. Raises ``FileNotFoundError``."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path, start=start, end=end))


def write_atomic(uri: str, data: bytes, *, durable: bool = True) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    Without ``durable`` it is not forced to the disk: a killed process loses nothing, a machine without power may.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        with writing(uri):
            fs.pipe_file(path, data)
        return
    with local_aside(Path(path), durable=durable) as aside:
        aside.write_bytes(data)


def put_file(source: Path, uri: str) -> None:
    """Copy a finished local file to a URI; it appears there whole."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        with writing(uri):
            fs.put_file(str(source), path)
        return
    with local_aside(Path(path)) as aside:
        shutil.copyfile(source, aside)


def require_place(uri: str) -> None:
    """Raise :class:`PlaceError` unless a file can be made there; before work that would be lost. Makes its folder.

    Only of this machine's disks: other places are known when they are written to.
    """
    if not is_local(uri):
        return
    target = Path(filesystem(uri)[1])
    if target.is_dir():
        raise PlaceError(f"{uri}: a folder; give the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise PlaceError(
            f"{uri}: cannot be written ({error.strerror}); give another place"
        ) from error


@contextmanager
def local_aside(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name in the target's folder; on success synced and renamed to it, on failure removed."""
    aside = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    with writing(str(target.parent)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            if durable:
                with aside.open("rb+") as file:
                    os.fsync(file.fileno())
            aside.replace(target)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                aside.unlink(missing_ok=True)
            raise


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A local path with the content of a URI: the file itself when local, else a copy that is removed after."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="headray-") as folder:
        copy = Path(folder) / Path(path).name
        fs.get_file(path, str(copy))
        yield copy


def names_below(uri: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; empty when the folder is not there."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    root = path.rstrip("/") + "/"
    return sorted(found[len(root) :] for found in fs.find(path) if found.startswith(root))


def names_by_folder(uri: str) -> Iterator[str]:
    """As :func:`names_below` for files in folders right below one folder, a folder at a time: a million names are never
    held at once."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if not fs.isdir(path):
        return
    for folder in sorted(entry["name"] for entry in fs.ls(path, detail=True)):
        name = folder.rstrip("/").rpartition("/")[2]
        for found in sorted(fs.ls(folder, detail=False)):
            yield f"{name}/{found.rpartition('/')[2]}"


def remove(uri: str) -> None:
    """Delete a file or a folder with all that is in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)


def remove_temporary(uri: str) -> int:
    """Delete unfinished files of a killed run below a local folder; returns how many.

    Only safe while no other job writes there: the caller holds the output's lock.
    """
    if not is_local(uri):
        return 0
    left = list(Path(filesystem(uri)[1]).rglob(f"{TEMPORARY}*"))
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def version(uri: str) -> str:
    """What tells one content of a file from the next; empty when it is not there. For :func:`replace`."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    try:
        tag = fs.info(path).get("ETag", "")
        return str(tag or hashlib.sha256(fs.cat_file(path)).hexdigest())
    except FileNotFoundError:
        return ""


def replace(uri: str, data: bytes, before: str) -> bool:
    """:func:`write_atomic` of a small file, only if it still has the :func:`version` ``before``; False when it has not.

    In S3 the store itself compares and writes in one step (``If-Match``). Elsewhere one comes after the other, which keeps
    out whoever wrote some time ago but not who writes in the same moment: there the output's lock must do.
    """
    fs, path = filesystem(uri)
    if "s3" not in fs.protocol:
        if version(uri) != before:
            return False
        write_atomic(uri, data)
        return True
    condition = {"IfMatch": before} if before else {"IfNoneMatch": "*"}
    try:
        with writing(uri):
            fs.pipe_file(path, data, **condition)
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # 412: another content; 409: another write at the same moment; 404: gone meanwhile
        if isinstance(error, FileExistsError) or status in (404, 409, 412):
            return False
        raise
    return True


def create(uri: str, data: bytes) -> bool:
    """Write a file only if it is not there yet; False when somebody else's is."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with Path(path).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        return True
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True
