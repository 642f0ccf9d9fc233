"""Stage 2. VideoRow → VideoRow, same count: fetch, check, hash and probe each video. Network.

A child process (:mod:`pipelines.fetch_process`) runs yt-dlp and looks at the file; this side holds the wall clock,
keeps secrets out of rows, and puts whole files into a cache where their name is their content::

    CACHE/<hh>/<sha256>.<ext>            the file as the site served it
    CACHE/records/<hh>/<request>.json    which file answers which (URL, format rule), and what was learned about it

so that a second run fetches nothing. Before the network is used the cluster's limiter is asked
(:mod:`pipelines.limiter`); what the site says about our address goes back to it. Cookies and proxies are read from a file and the environment where they are
used; they appear in no row, log line or artifact, and a row keeps its URL without user name, password and signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
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
from pipelines.limiter import (
    ClusterLimiter,
    Limits,
    Manners,
    Outcome,
    Turn,
    backoff_seconds,
)
from pipelines.schema import (
    TRANSIENT,
    Cause,
    Member,
    StageResources,
    Video,
    VideoRow,
    add_actors,
    from_row,
    one_line,
    reject,
    run_stage,
    to_row,
)

if TYPE_CHECKING:
    from ray.data import Dataset

PROXY_VARIABLE = "HEADRAY_PROXY"
COOKIES_VARIABLE = "HEADRAY_COOKIES"

OPERATIONAL = (
    "download.backoff_seconds",
    "download.cache",
    "download.canary",
    "download.cookies",
    "download.deadline_seconds",
    "download.egress",
    "download.first_pause_seconds",
    "download.from_downloads",
    "download.longest_pause_seconds",
    "download.max_blocks",
    "download.min_rate_bytes",
    "download.pace",
    "download.proxy",
    "download.rate_window_seconds",
    "download.retries",
    "download.socket_timeout_seconds",
    "download.tries",
)
"""Fields that change how a run goes but not what it makes."""

YOUTUBE_HOSTS = ("youtube.com", "youtu.be", "youtube-nocookie.com", "googlevideo.com")
YOUTUBE_GAP_SECONDS = (10.0, 20.0)
"""Of yt-dlp's ``sleep`` preset: 240 videos an hour, below the 300 or so that a guest session gets."""

BLOCKS = frozenset({Cause.DOWNLOAD_RATE_LIMITED, Cause.DOWNLOAD_BOT_CHECK})
"""Causes that are about our address and not about the video: the whole address waits."""

RECOVERS = frozenset(
    {
        Cause.DOWNLOAD_SERVER_ERROR,
        Cause.DOWNLOAD_NETWORK,
        Cause.DOWNLOAD_TRUNCATED,
        Cause.DOWNLOAD_EMPTY,
    }
)
"""Causes that may be gone in seconds: tried again in the same run. Other transient ones wait for the next run."""

OWN_BLOCKS = 3
"""Blocks that one video meets while others get through, after which they are taken to be its own fault."""

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER_PREFIX = "headray-fetch-"
"""Of the temporary folder of one attempt."""


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
    tries: int = 3
    """Times that one run tries a video whose failure may be gone in seconds (network, server, truncated)."""
    backoff_seconds: float = 2.0
    """Wait before the second try; doubles with each, times 0.5 to 1.5."""
    min_rate_bytes: float = 20_000.0
    """Bytes a second; a server that stays below for a whole window is given up. 0: no floor."""
    rate_window_seconds: float = 120.0
    """Longer than the socket's time-out times (retries + 1), so that silence is told as a network failure."""
    pace: Literal["auto"] | tuple[float, float] = "auto"
    """Least and most seconds between the starts of two videos, for each egress address and site ("10 20"; "0 0": none).
    auto: 10 to 20 for YouTube, none for any other host: that is a mirror of yours, or a server on loopback."""
    egress: str = ""
    """Name of the address that the downloads leave by, for nodes behind one NAT: they share its pace. Empty: the proxy
    if one is set, one account if cookies are, else each node is its own address."""
    first_pause_seconds: float = 60.0
    """How long an address waits after a 429 or a bot check; doubles with each block in a row."""
    longest_pause_seconds: float = 3600.0
    """Bound of that pause."""
    max_blocks: int = 7
    """Blocks in a row after which an address is given up (by then it has waited two hours). With all of them given up
    the rest of the list fails without counting an attempt."""
    canary: str = ""
    """Id or URL of a video that must be there: fetched first; if it fails, the run ends before it began (code 3)."""
    from_downloads: str = ""
    """Folder of videos fetched before, by yt-dlp or as a mirror of VoxCeleb, whose names hold their ids. They are taken
    instead of the network. All nodes must see it under this path."""
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
        self._check_signs()
        if self.pace != "auto" and not 0 <= self.pace[0] <= self.pace[1]:
            raise ValueError(f"pace: 0 <= least <= most, got {self.pace}")
        if self.canary and self.from_downloads:
            raise ValueError(
                "canary with from_downloads: nothing is fetched, so it would say nothing"
            )
        if self.cookies and not Path(self.cookies).is_file():
            raise ValueError(f"cookies {self.cookies}: no such file")
        if "@" in self.proxy:
            raise ValueError(
                f"proxy with a user name: put it into the environment as {PROXY_VARIABLE}; "
                "flags are recorded beside the results"
            )

    def _check_signs(self) -> None:
        for name in (
            "max_height", "deadline_seconds", "max_bytes", "socket_timeout_seconds", "tries",
            "rate_window_seconds", "first_pause_seconds", "longest_pause_seconds", "max_blocks",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("retries", "backoff_seconds", "min_rate_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


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
    elif "@" not in parts.netloc and not parts.fragment:
        return url  # put together again, sqlite:////file would lose two of its slashes
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def public(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it may be recorded: every URL in it is :func:`public_url` of what it was."""

    def show(value: Any) -> Any:
        if isinstance(value, Mapping):
            return public(value)
        if isinstance(value, list | tuple):
            return type(value)(show(each) for each in value)
        is_url = isinstance(value, str) and "://" in value
        return public_url(value) if is_url else value

    return {name: show(value) for name, value in nested.items()}


def scrub(text: str, *hidden: str) -> str:
    """A tool's own words as they may be stored: no colour codes, no user names or query strings in URLs.

    Args:
        hidden: literal strings to leave out as well: the proxy, the cookies, the temporary folder.
    """
    for secret in hidden:
        if secret:
            text = text.replace(secret, "")
    return QUERY.sub("", USER.sub("//", ANSI.sub("", text))).removeprefix("ERROR: ")


def cookie_secrets(path: str) -> list[str]:
    """What must not be told of a cookie file: its path, and the value at the end of each line. yt-dlp prints lines that it cannot use.

    Args:
        path: of the file; empty: none. One that cannot be read has no values.
    """
    lines: list[str] = []
    if path:
        with contextlib.suppress(OSError):
            lines = Path(path).read_text(errors="replace").splitlines()
    values = {line.split()[-1] for line in lines if line.strip() and not line.startswith("# ")}
    # a 0 or a 1 is none, and would take every such digit out of what is told
    return [path, *(value for value in sorted(values, key=len, reverse=True) if len(value) >= 6)]


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
    hidden = (request.proxy, *cookie_secrets(request.cookies), str(folder))
    if child.returncode:
        # without secrets first, then cut: half of one would not be known as one
        last_words = scrub(messages.read_text(errors="replace")[-20_000:], *hidden)[-300:]
        answer = {
            "cause": Cause.DOWNLOAD_OTHER,
            "detail": f"the download process ended with {child.returncode}: {last_words}",
        }
    else:
        answer = json.loads((folder / "result.json").read_text())
    if "cause" in answer:
        if os.strerror(errno.ENOSPC) in answer["detail"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        detail = scrub(answer["detail"], *hidden)
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
        min_rate_bytes=config.min_rate_bytes,
        rate_window_seconds=config.rate_window_seconds,
        cookies=find_cookies(config),
        proxy=find_proxy(config),
        **target,
    )


def find_cookies(config: DownloadConfig) -> str:
    """Path of the cookie file that this machine uses, or empty."""
    return config.cookies or os.environ.get(COOKIES_VARIABLE, "")


def find_proxy(config: DownloadConfig) -> str:
    """URL of the proxy that this machine uses, with its secrets, or empty."""
    return config.proxy or os.environ.get(PROXY_VARIABLE, "")


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


def fetch(
    video: Video,
    config: DownloadConfig,
    cache: str,
    await_turn: Callable[[str], None] = lambda _: None,
) -> Video:
    """Fetch one video, or take the file its list gave; check that it is whole, hash and probe it.

    Args:
        video: has ``url``, or a ``path`` that the list stage was allowed to give.
        cache: folder or URI of the content-addressed cache.
        await_turn: called with the URL before the network is used; what the cache holds needs no turn.

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
        return _fetch_url(video, url, config, cache, await_turn)
    except RefusedError as refused:
        return reject(video, refused.cause, refused.detail)


def _take(video: Video, config: DownloadConfig) -> Video:
    """A file that the list named: checked where it is."""
    try:
        with (
            storage.local_file(video.path) as path,
            tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder,
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


def _fetch_url(
    video: Video, url: str, config: DownloadConfig, cache: str, await_turn: Callable[[str], None]
) -> Video:
    require_http(url)
    record = find_cached(url, config, cache)
    if record is None:
        await_turn(url)
        record = _download(url, config, cache)
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
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name:
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


def remove_leftovers(older_seconds: float) -> int:
    """Delete temporary folders that attempts of killed runs left on this machine; returns how many.

    A folder's age tells: no attempt lives longer than its deadline. (Process numbers mean nothing across containers.)
    """
    oldest = time.time() - older_seconds
    left = []
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another actor of this machine was quicker
            if folder.lstat().st_mtime < oldest:
                left.append(folder)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return len(left)


# ---------------------------------------------------------------------------------------------- politeness


def site_of(url: str) -> str:
    """What counts as one site: ``youtube``, else the host."""
    host = (urlsplit(url).hostname or "").lower()
    is_youtube = any(host == name or host.endswith(f".{name}") for name in YOUTUBE_HOSTS)
    return "youtube" if is_youtube else host


def egress_address(config: DownloadConfig) -> str:
    """What a site sees us as, without any secret; empty: each node is itself."""
    if config.egress:
        return config.egress
    if proxy := find_proxy(config):
        parts = urlsplit(proxy)
        return f"proxy {parts.hostname}:{parts.port}"
    return "account" if find_cookies(config) else ""


def manners_towards(site: str, config: DownloadConfig) -> Manners:
    """The pace and the pauses that ``config`` wants for a site."""
    if config.pace != "auto":
        gap = config.pace
    else:
        gap = YOUTUBE_GAP_SECONDS if site == "youtube" else (0.0, 0.0)
    return Manners(
        gap_seconds=gap,
        first_pause_seconds=config.first_pause_seconds,
        longest_pause_seconds=config.longest_pause_seconds,
        max_blocks=config.max_blocks,
        probe_seconds=config.deadline_seconds + 60,
    )


def judge(cause: str) -> Outcome:
    """What the end of a fetch says about our address."""
    if cause in BLOCKS:
        return "blocked"
    return "unclear" if cause in TRANSIENT else "passed"


class Visit:
    """The turn of one fetch: waits for it, and reports what came of it."""

    def __init__(
        self, config: DownloadConfig, limits: Limits, sleep: Callable[[float], None]
    ) -> None:
        self.config = config
        self.limits = limits
        self.sleep = sleep
        self.turn: Turn | None = None
        """None: the network was not needed."""

    def await_turn(self, url: str) -> None:
        """Return when ``url`` may be fetched. Raises :class:`RefusedError` when no address gets through any more."""
        self.site = site_of(url)
        self.manners = manners_towards(self.site, self.config)
        while True:
            self.turn = self.limits.ask(self.site, self.manners)
            if self.turn.hopeless:
                minutes = self.turn.wait_seconds / 60
                detail = f"given up after {self.config.max_blocks} blocks in a row; try again in {minutes:.0f} minutes"
                raise RefusedError(Cause(self.turn.hopeless), detail)
            if not self.turn.wait_seconds:
                return
            self.sleep(self.turn.wait_seconds)

    def report(self, cause: str) -> None:
        """Tell the limiter what came of it."""
        if self.turn and not self.turn.hopeless:
            self.limits.report(self.site, self.turn, judge(cause), cause, self.manners)


def fetch_politely(
    video: Video,
    config: DownloadConfig,
    cache: str,
    limits: Limits,
    sleep: Callable[[float], None] = time.sleep,
) -> Video:
    """:func:`fetch` in its turn, and again where that may help.

    A block is the address's: the video is fetched again after the pause, as often as it takes, and if the address is
    given up meanwhile, the video fails without having used an attempt. What may be gone in seconds is tried ``tries``
    times. Everything else is final for this run.
    """
    tries, own_blocks, passed_before, told = 1, 0, -1, ""
    while True:
        visit = Visit(config, limits, sleep)
        try:
            fetched = fetch(video, config, cache, visit.await_turn)
        except Exception:
            visit.report(Cause.CRASH)  # or the others would wait for this probe
            raise
        visit.report(fetched.cause)
        if visit.turn is None:
            return fetched
        if visit.turn.hopeless:
            attempts = max(0, fetched.attempts - 1)
            return replace(fetched, attempts=attempts, detail=one_line(fetched.detail + told))
        if fetched.cause in BLOCKS:
            told = f"; {fetched.detail}"
            own_blocks += visit.turn.passed > passed_before
            passed_before = visit.turn.passed
            if own_blocks >= OWN_BLOCKS:
                return fetched
        elif fetched.cause in RECOVERS and tries < config.tries:
            sleep(backoff_seconds(video.key, video.attempts, tries, config.backoff_seconds))
            tries += 1
        else:
            return fetched


def fetch_canary(config: DownloadConfig) -> Video:
    """Fetch ``config.canary`` into nowhere, without the patience that is worth having in the middle of a run."""
    url = config.canary
    if "://" not in url:
        url = config.url_template.replace("{video}", url)
    video = Video(identity="canary", video="canary", url=url)
    limits = ClusterLimiter(egress_address(config))
    with tempfile.TemporaryDirectory(prefix="headray-") as cache:
        return fetch_politely(video, replace(config, max_blocks=1), cache, limits)


class Downloader:
    """Actor: one video at a time."""

    def __init__(self, config: DownloadConfig, cache: str) -> None:
        self.config = config
        self.cache = cache
        self.limits = ClusterLimiter(egress_address(config))
        remove_leftovers(2 * config.deadline_seconds + 3600)

    def __call__(self, row: VideoRow) -> VideoRow:
        video, members = from_row(row)
        address = video.url

        def download(video: Video, members: list[Member]) -> tuple[Video, list[Member]]:
            video = replace(video, url=address)
            return fetch_politely(video, self.config, self.cache, self.limits), members

        # The row that run_stage would report a crash on must not hold the secrets of the URL either.
        return run_stage(
            "download", download, to_row(replace(video, url=public_url(address)), members)
        )


def add_downloads(videos: Dataset, config: DownloadConfig, cache: str) -> Dataset:
    """Append the stage to a plan over :class:`VideoRow`; ``cache`` is a folder all nodes see, or a URI."""
    return add_actors(videos, Downloader, config.resources, config=config, cache=cache)
