"""Stage 1. VideoRow → VideoRow, same count: fetch, check, hash and probe each video. Network.

A child process (:mod:`pipelines.fetch_process`) runs yt-dlp and looks at the file; this side holds the wall clock,
keeps secrets out of rows, and puts whole files into a cache where their name is their content::

    CACHE/<hh>/<sha256>.<ext>            the file as the site served it
    CACHE/records/<hh>/<request>.json    which file answers which (URL, format rule), and what was learned about it

so that a second run fetches nothing. Cookies and proxies are read from a file and the environment where they are
used; they appear in no row, log line or artifact, and a row keeps its URL without user name, password and signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pipelines import storage
from pipelines.fetch_process import (
    RefusedError,
    Request,
    check_height,
    format_sort,
    require_http,
    ytdlp_version,
)
from pipelines.schema import (
    Cause,
    Member,
    StageResources,
    Video,
    VideoRow,
    from_row,
    reject,
    run_stage,
    to_row,
)

if TYPE_CHECKING:
    from ray.data import Dataset

PROXY_VARIABLE = "HEADRAY_PROXY"
COOKIES_VARIABLE = "HEADRAY_COOKIES"

OPERATIONAL = (
    "download.cache",
    "download.cookies",
    "download.deadline_seconds",
    "download.proxy",
    "download.retries",
    "download.socket_timeout_seconds",
)
"""Fields that change how a run goes but not what it makes."""

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetching the videos of a list."""

    url_template: str = "https://www.youtube.com/watch?v={video}"
    """URL of a video that the list names by its id only; ``{video}`` is the id. For a mirror or a test server."""
    allow_local: bool = False
    """Let a table name local files. Off: a list from elsewhere cannot read this disk."""
    min_height: int = 0
    """Reject videos whose best format has fewer lines; 0: no floor."""
    max_height: int = 1080
    """Of the formats offered take the one nearest below this many lines (of a tall picture: columns)."""
    deadline_seconds: float = 900.0
    """Wall clock for one video, from the first request to the checked file; then it is ended and fails."""
    max_bytes: int = 4 * 2**30
    """Reject larger files, before or while they are fetched."""
    socket_timeout_seconds: float = 20.0
    """Silence of a server after which a connection is given up."""
    retries: int = 3
    """Times that a broken connection is taken up again within one attempt at a video."""
    cookies: str = ""
    """Netscape cookie file of an account that may see the videos, on every node; also HEADRAY_COOKIES. Only read."""
    proxy: str = ""
    """URL of a proxy for the downloads. One with a password belongs in HEADRAY_PROXY: flags are recorded."""
    cache: str = ""
    """Folder or URI that keeps what was fetched. Empty: inside the output, while it is unfinished."""
    resources: StageResources = field(
        default_factory=lambda: StageResources(num_cpus=0.25, memory_gb=0.5, max_actors=8)
    )
    """One actor fetches one video at a time."""

    def __post_init__(self) -> None:
        if "{video}" not in self.url_template:
            raise ValueError(f"url_template {self.url_template!r} has no {{video}} in it")
        if not 0 <= self.min_height <= self.max_height:
            raise ValueError(
                "heights: 0 <= min_height <= max_height, "
                f"got {self.min_height} and {self.max_height}"
            )
        for name in ("max_height", "deadline_seconds", "max_bytes", "socket_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"retries must not be negative, got {self.retries}")
        if self.cookies and not Path(self.cookies).is_file():
            raise ValueError(f"cookies {self.cookies}: no such file")
        if "@" in self.proxy:
            raise ValueError(
                f"proxy with a user name: put it into the environment as {PROXY_VARIABLE}; "
                "flags are recorded beside the results"
            )


# ---------------------------------------------------------------------------------------------- secrets

SECRET_PARAMETER = re.compile(
    r"(?i)^(x-(amz|goog|oss)-.*|.*signature|.*token|.*secret|.*password|.*credentials?|api_?key|awsaccesskeyid"
    r"|sig|lsig|auth|authorization|session|sessionid|sid|jwt|hdnts|hdnea|key-pair-id|policy|pwd|passwd)$"
)
"""Names of query parameters that grant access rather than say which video is meant."""

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
USER = re.compile(r"//[^/\s@'\"]*@")
QUERY = re.compile(r"\?[^\s'\")>\]]*=[^\s'\")>\]]*")


def public_url(url: str) -> str:
    """A URL as it may be stored: no user name, password, signature or fragment; the rest as it was."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return QUERY.sub("", USER.sub("//", url))
    query = parts.query
    named = parse_qsl(query, keep_blank_values=True)
    if any(SECRET_PARAMETER.match(name) for name, _ in named):
        query = urlencode([pair for pair in named if not SECRET_PARAMETER.match(pair[0])])
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def scrub(text: str, *hidden: str) -> str:
    """A tool's own words as they may be stored: no colour codes, no user names or query strings in URLs.

    Args:
        hidden: literal strings to leave out as well: the proxy, the temporary folder.
    """
    for secret in hidden:
        if secret:
            text = text.replace(secret, "")
    return QUERY.sub("", USER.sub("//", ANSI.sub("", text))).removeprefix("ERROR: ")


# ---------------------------------------------------------------------------------------------- the child


def run_child(request: Request, folder: Path) -> dict[str, Any]:
    """Run :mod:`pipelines.fetch_process` on a request, at most ``request.deadline_seconds`` long.

    Args:
        folder: empty, its own; the caller removes it.

    Returns:
        ``file``, ``probe`` and ``source`` as :func:`pipelines.fetch_process.answer` describes them.

    Raises:
        RefusedError: the child's word, or that it took too long or crashed.
    """
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    messages = folder / "messages.txt"
    with messages.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.fetch_process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": python_path, "YTDLP_NO_PLUGINS": "1"},
            start_new_session=True,
        )
    assert child.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says so
            child.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
        child.wait(request.deadline_seconds)
    except subprocess.TimeoutExpired:
        detail = f"not done after {request.deadline_seconds:g} s"
        raise RefusedError(Cause.DOWNLOAD_DEADLINE, detail) from None
    finally:
        if child.returncode is None:  # not waited for, so the number still names its group
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdin.close()
    if child.returncode:
        last_words = messages.read_text(errors="replace")[-300:]
        answer = {
            "cause": Cause.DOWNLOAD_OTHER,
            "detail": f"the download process ended with {child.returncode}: {last_words}",
        }
    else:
        answer = json.loads((folder / "result.json").read_text())
    if "cause" in answer:
        detail = scrub(answer["detail"], request.proxy, str(folder))
        raise RefusedError(Cause(answer["cause"]), detail)
    return answer


def make_request(config: DownloadConfig, **target: Any) -> Request:
    """The request for ``url=`` (and ``metadata_only=``) or ``path=``, with the cookies and the proxy of this machine."""
    return Request(
        deadline_seconds=config.deadline_seconds,
        min_height=config.min_height,
        max_height=config.max_height,
        max_bytes=config.max_bytes,
        socket_timeout_seconds=config.socket_timeout_seconds,
        retries=config.retries,
        cookies=config.cookies or os.environ.get(COOKIES_VARIABLE, ""),
        proxy=config.proxy or os.environ.get(PROXY_VARIABLE, ""),
        **target,
    )


# ---------------------------------------------------------------------------------------------- the cache


def record_uri(url: str, config: DownloadConfig, cache: str) -> str:
    """Where the cache answers for a URL under the format rule of ``config``; the URL itself is only hashed."""
    request = json.dumps([url, format_sort(config.max_height)])
    name = hashlib.sha256(request.encode()).hexdigest()
    return storage.join(cache, "records", name[:2], f"{name}.json")


def find_cached(url: str, config: DownloadConfig, cache: str) -> dict[str, Any] | None:
    """The record of a fetched video whose file is still what it was, else None.

    A local file is hashed again; of a remote one, which was put whole, the size is compared.
    """
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(record_uri(url, config, cache)))
        uri = storage.join(cache, record["blob"])
        if storage.size(uri) != record["size"]:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or not a record
        return None
    if storage.is_local(uri):
        with storage.local_file(uri) as path:
            if file_sha256(path) != record["sha256"]:
                return None
    return record


def keep_file(path: Path, sha256: str, cache: str) -> str:
    """Put a file into the cache under its content's name; returns that name relative to the cache."""
    blob = f"{sha256[:2]}/{sha256}{path.suffix}"
    storage.put_file(path, storage.join(cache, blob))
    return blob


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- the stage


def fetch(video: Video, config: DownloadConfig, cache: str) -> Video:
    """Fetch one video, or take the file its list gave; check that it is whole, hash and probe it.

    Args:
        video: has ``url``, or a ``path`` that the list stage was allowed to give.
        cache: folder or URI of the content-addressed cache.

    Returns:
        the video with ``blob``, ``sha256``, ``size``, ``source`` and ``probe``, or rejected with a cause of the
        download. Its ``url`` is :func:`public_url` of what it was. A ``path`` is not copied: it is the blob.

    Raises:
        OSError: this machine or the cache failed, not the video.
    """
    url = video.url
    video = replace(video, url=public_url(url))
    try:
        if video.path:
            return _take(video, config)
        video = replace(video, source={"yt_dlp": ytdlp_version()})
        return _fetch_url(video, url, config, cache)
    except RefusedError as refused:
        return reject(video, refused.cause, refused.detail)


def _take(video: Video, config: DownloadConfig) -> Video:
    """A file that the list named: checked where it is."""
    try:
        with (
            storage.local_file(video.path) as path,
            tempfile.TemporaryDirectory(prefix="headray-") as folder,
        ):
            if not path.is_file():
                raise FileNotFoundError
            answer = run_child(make_request(config, path=str(path)), Path(folder))
            return replace(
                video,
                blob=video.path,
                sha256=file_sha256(path),
                size=path.stat().st_size,
                probe=answer["probe"],
            )
    except FileNotFoundError:
        raise RefusedError(Cause.DOWNLOAD_NOT_FOUND, f"{video.path}: no such file") from None


def _fetch_url(video: Video, url: str, config: DownloadConfig, cache: str) -> Video:
    require_http(url)
    record = find_cached(url, config, cache) or _download(url, config, cache)
    check_height(record["probe"]["height"], config.min_height)
    return replace(
        video,
        blob=storage.join(cache, record["blob"]),
        sha256=record["sha256"],
        size=record["size"],
        source=record["source"],
        probe=record["probe"],
    )


def _download(url: str, config: DownloadConfig, cache: str) -> dict[str, Any]:
    """Fetch a URL into the cache; returns its record."""
    with tempfile.TemporaryDirectory(prefix="headray-") as name:
        folder = Path(name)
        answer = run_child(make_request(config, url=url), folder)
        path = folder / answer["file"]
        sha256 = file_sha256(path)
        record = {
            "blob": keep_file(path, sha256, cache),
            "sha256": sha256,
            "size": path.stat().st_size,
            "source": answer["source"],
            "probe": answer["probe"],
        }
    storage.write_atomic(record_uri(url, config, cache), json.dumps(record).encode())
    return record


class Downloader:
    """Actor: one video at a time."""

    def __init__(self, config: DownloadConfig, cache: str) -> None:
        self.config = config
        self.cache = cache

    def __call__(self, row: VideoRow) -> VideoRow:
        video, members = from_row(row)
        address = video.url

        def download(video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
            return fetch(replace(video, url=address), self.config, self.cache), members

        # The row that run_stage would report a crash on must not hold the secrets of the URL either.
        return run_stage(
            "download", download, to_row(replace(video, url=public_url(address)), members)
        )


def add_downloads(videos: Dataset, config: DownloadConfig, cache: str) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`; ``cache`` is a folder all nodes see, or a URI."""
    import ray.data

    resources = config.resources
    return videos.map(
        Downloader,  # type: ignore[arg-type]
        fn_constructor_kwargs={"config": config, "cache": cache},
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.min_actors, max_size=resources.max_actors
        ),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        memory=int(resources.memory_gb * 2**30),
    )
