"""The child process of the download stage: yt-dlp fetches one video, then the file is checked to be whole.

Started by :mod:`pipelines.download` as ``python -m pipelines.fetch_process FOLDER``. One line of JSON on standard
input is the :class:`Request`, ``FOLDER/result.json`` the answer. Whatever a hostile page or file can do to a parser
(hang it, crash it, fill its memory) happens here, where the parent can end it; standard input stays open, and when
it closes the parent is gone, so this process removes its folder and ends with everything it started.

The only file that imports yt-dlp. That and the codecs are imported where they are used: the actor needs neither, and
a child that waits for the network holds 62 MB instead of 104.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.causes import Cause

if TYPE_CHECKING:
    from pipelines.video import VideoInfo

SCHEMES = ("http", "https")
"""Of every URL that is opened, the list's and all that follow from it."""

PROTOCOLS = ("http", "https", "m3u8_native", "http_dash_segments")
"""yt-dlp's names of the transports it handles itself; the others would start a foreign program."""

BLOCK_BYTES = 16 * 1024
"""Read at once from a media connection; what is lost when it breaks. Measured: 150 MB from loopback take 2.5 s of CPU
this way, 1.2 s in yt-dlp's growing blocks; decoding them takes minutes."""

DURATION_TOLERANCE_SECONDS = 1.0
"""How much earlier than announced a file may end: sites round, and sound outlasts pictures."""

CAUSES: tuple[tuple[str, Cause], ...] = (
    # Of the session, not of the video. First, since these texts also say "sign in".
    (r"not a bot|captcha|anti-bot challenge", Cause.DOWNLOAD_BOT_CHECK),
    (r"HTTP Error 429|rate.limited|try again later", Cause.DOWNLOAD_RATE_LIMITED),
    # The page was readable but its media is refused: a stale or suspected session, gone on another day.
    (r"unable to download video data: HTTP Error 403", Cause.DOWNLOAD_BOT_CHECK),
    (r"private video|video is private", Cause.DOWNLOAD_PRIVATE),
    (r"confirm your age|age.restricted|inappropriate for some", Cause.DOWNLOAD_AGE_GATE),
    (r"GeoRestrictedError|in your country|from your location", Cause.DOWNLOAD_GEO_BLOCKED),
    (r"has been removed|terminated|copyright|no longer available", Cause.DOWNLOAD_REMOVED),
    (r"HTTP Error 451", Cause.DOWNLOAD_REMOVED),
    (r"channel's members|members.only|requires payment", Cause.DOWNLOAD_LOGIN),
    (r"sign in|log ?in|registered users|HTTP Error 401", Cause.DOWNLOAD_LOGIN),
    (r"HTTP Error (404|410)|video unavailable", Cause.DOWNLOAD_NOT_FOUND),
    (r"this video (is not|isn't) available|does not exist", Cause.DOWNLOAD_NOT_FOUND),
    (r"recording is not available|looks truncated", Cause.DOWNLOAD_NOT_FOUND),
    (r"HTTP Error 403|DRM protected", Cause.DOWNLOAD_FORBIDDEN),
    (r"HTTP Error 5\d\d|redirect loop", Cause.DOWNLOAD_SERVER_ERROR),
    (r"no connection adapters|unsupported url scheme", Cause.DOWNLOAD_SCHEME),
    (r"UnsupportedError|is not a valid URL", Cause.DOWNLOAD_NOT_A_VIDEO),
    (r"did not get any data|file is empty", Cause.DOWNLOAD_EMPTY),
    (r"IncompleteRead|ContentTooShortError", Cause.DOWNLOAD_TRUNCATED),
    (r"more expected|content too short|fragment \d+ not found", Cause.DOWNLOAD_TRUNCATED),
    (r"TransportError|SSLError|ProxyError|CertificateVerify", Cause.DOWNLOAD_NETWORK),
    (r"timed out|connection (aborted|reset|refused)", Cause.DOWNLOAD_NETWORK),
)
"""What yt-dlp and the sites say, and what it means; the first line that is found decides. Matched without case
against the names of the exceptions and their text, typographic apostrophes made plain and URLs left out."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to fetch and check, or only to check."""

    deadline_seconds: float
    url: str = ""
    """What to fetch into the folder. Empty: check ``path``."""
    path: str = ""
    """A local file to check."""
    min_height: int = 0
    max_height: int = 1080
    max_bytes: int = 0
    socket_timeout_seconds: float = 20.0
    retries: int = 3
    min_rate_bytes: float = 0.0
    """Bytes a second that must arrive in every window of ``rate_window_seconds``; 0: no floor."""
    rate_window_seconds: float = 120.0
    cookies: str = ""
    """Path of a Netscape cookie file."""
    proxy: str = ""
    """URL of a proxy, with its password if it has one."""
    metadata_only: bool = False
    """Ask the site what it offers and fetch nothing of it."""


class RefusedError(Exception):
    """This video is not wanted, or not whole."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


def cause_of(error: BaseException) -> Cause:
    """The closed list's word for an exception of yt-dlp; ``DOWNLOAD_OTHER`` when no line of CAUSES fits."""
    text = " ".join([*_exception_names(error), str(error)]).replace("’", "'")
    text = re.sub(r"\S+://\S+", "", text)
    for pattern, cause in CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            return cause
    return Cause.DOWNLOAD_OTHER


def _exception_names(error: BaseException) -> list[str]:
    """Class names of an exception and of all that led to it: yt-dlp wraps, and keeps the original in attributes."""
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue:
        one = queue.pop(0)
        if not isinstance(one, BaseException) or one in seen:
            continue
        seen.append(one)
        exc_info = getattr(one, "exc_info", None) or (None, None, None)
        queue += [one.__cause__, one.__context__, getattr(one, "cause", None), exc_info[1]]
    return [type(one).__name__ for one in seen]


# ---------------------------------------------------------------------------------------------- fetching


def format_sort(max_height: int) -> list[str]:
    """Which format is best, in yt-dlp's words: the height nearest below ``max_height`` (of a tall picture its width),
    then H.264 before VP9 before AV1, a plain file before fragments, without sound before with it."""
    return [f"res:{max_height}", "vcodec:h264", "proto", "+hasaud"]


def choose_format(context: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """yt-dlp's format selector: the best single format that has pictures and no high dynamic range.

    Args:
        context: ``formats`` as yt-dlp sorted them, the best last.

    Raises:
        RefusedError: no format is left; the cause says why.
    """
    pictures = [f for f in context["formats"] if f.get("vcodec") != "none"]
    if not pictures:
        raise RefusedError(Cause.VIDEO_NO_STREAM, "the site offers no format with pictures")
    reachable = [f for f in pictures if f.get("protocol") in PROTOCOLS]
    if not reachable:
        offered = sorted({str(f.get("protocol")) for f in pictures})
        raise RefusedError(Cause.DOWNLOAD_SCHEME, f"only offered over {', '.join(offered)}")
    standard = [f for f in reachable if f.get("dynamic_range") in (None, "SDR")]
    if not standard:
        raise RefusedError(Cause.VIDEO_HDR, "only offered with high dynamic range")
    yield standard[-1]


def check_offer(offer: Mapping[str, Any], request: Request) -> None:
    """Refuse what can be known to be unwanted before a byte of it is fetched.

    Args:
        offer: yt-dlp's info dict with the chosen format's fields.

    Raises:
        RefusedError: a playlist, a running broadcast, too few lines, too many bytes.
    """
    if offer.get("_type", "video") != "video":
        raise RefusedError(Cause.DOWNLOAD_NOT_A_VIDEO, f"a {offer['_type']}, not one video")
    if offer.get("is_live"):
        raise RefusedError(Cause.DOWNLOAD_OTHER, "a live broadcast that has not ended")
    check_height(offer.get("height") or None, request.min_height)
    check_size(offer.get("filesize"), request.max_bytes)


def check_height(height: int | None, min_height: int) -> None:
    """Raise :class:`RefusedError` for fewer than ``min_height`` lines; an unknown height passes."""
    if height is not None and height < min_height:
        detail = f"height {height}, at least {min_height} wanted"
        raise RefusedError(Cause.DOWNLOAD_LOW_RESOLUTION, detail)


def check_size(size_bytes: int | None, max_bytes: int) -> None:
    """Raise :class:`RefusedError` for more than ``max_bytes``; an unknown size passes."""
    if size_bytes is not None and size_bytes > max_bytes:
        detail = f"{size_bytes} bytes, at most {max_bytes} wanted"
        raise RefusedError(Cause.DOWNLOAD_TOO_LARGE, detail)


def require_http(url: str) -> None:
    """Raise :class:`RefusedError` for any URL that is not http or https."""
    if urlsplit(url).scheme.lower() not in SCHEMES:
        scheme = urlsplit(url).scheme or "none"
        raise RefusedError(Cause.DOWNLOAD_SCHEME, f"URL scheme {scheme}: only http and https")


def download(request: Request, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Fetch ``request.url`` into ``folder``, as the site serves it: nothing is remuxed or encoded again.

    Returns:
        the file, and what was fetched: format, codec, size in pixels, fps, bitrate, extractor, announced duration.

    Raises:
        RefusedError: not wanted.
        Exception: whatever yt-dlp raises; :func:`cause_of` reads it.
    """
    with _downloader(request, folder) as ydl:
        offer = ydl.extract_info(request.url, download=False)
        check_offer(offer, request)
        with watch_rate(request, folder) as received:
            ydl.add_progress_hook(received)
            ydl.process_info(offer)
    files = list(folder.glob("video.*"))
    if not files:
        raise RefusedError(Cause.DOWNLOAD_EMPTY, "yt-dlp wrote no file")
    return files[0], _source(offer)


def look(request: Request, folder: Path) -> dict[str, Any]:
    """What :func:`download` would fetch, and ``filesize`` in bytes where the site tells; raises as it does."""
    with _downloader(request, folder) as ydl:
        offer = ydl.extract_info(request.url, download=False)
        check_offer(offer, request)
    size = offer.get("filesize") or offer.get("filesize_approx")
    return _source(offer) | ({"filesize": size} if size else {})


def _downloader(request: Request, folder: Path) -> Any:
    import yt_dlp

    class HttpOnly(yt_dlp.YoutubeDL):
        """Redirects are followed below ``urlopen``, by a session that knows http and https only."""

        def urlopen(self, req: Any) -> Any:
            require_http(req if isinstance(req, str) else req.url)
            return super().urlopen(req)

    return HttpOnly(_options(request, folder))


@contextlib.contextmanager
def watch_rate(request: Request, folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """While inside, end this process with the answer ``DOWNLOAD_SLOW`` if too few bytes arrive for a whole window.

    A server that sends a byte now and then never times out, and yt-dlp reads until a block is full, so only another
    thread can tell.

    Yields:
        yt-dlp's progress hook.
    """
    done = threading.Event()
    received = 0

    def hook(progress: Mapping[str, Any]) -> None:
        nonlocal received
        received = max(received, progress.get("downloaded_bytes") or 0)

    def watch() -> None:
        before = 0
        while not done.wait(request.rate_window_seconds):
            new, before = received - before, received
            if new < request.min_rate_bytes * request.rate_window_seconds:
                detail = (
                    f"{new} bytes in {request.rate_window_seconds:g} s, "
                    f"at least {request.min_rate_bytes:g} a second wanted"
                )
                finish(folder, {"cause": Cause.DOWNLOAD_SLOW, "detail": detail})
                os._exit(0)

    if request.min_rate_bytes:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield hook
    finally:
        done.set()


def _options(request: Request, folder: Path) -> dict[str, Any]:
    import imageio_ffmpeg

    def watch_size(progress: Mapping[str, Any]) -> None:
        check_size(progress.get("total_bytes"), request.max_bytes)
        check_size(progress.get("downloaded_bytes"), request.max_bytes)

    return {
        "format": choose_format,
        "format_sort": format_sort(request.max_height),
        "paths": {"home": str(folder)},
        "outtmpl": "video.%(ext)s",
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "default_search": "error",
        "nopart": True,
        "cachedir": False,
        "updatetime": False,
        "fixup": "never",
        "skip_unavailable_fragments": False,
        "external_downloader": {"default": "native"},
        "hls_prefer_native": True,
        "ffmpeg_location": imageio_ffmpeg.get_ffmpeg_exe(),
        "enable_file_urls": False,
        "geo_bypass": False,
        "socket_timeout": request.socket_timeout_seconds,
        "retries": request.retries,
        "fragment_retries": request.retries,
        "buffersize": BLOCK_BYTES,
        "noresizebuffer": True,  # a block that grew in better times would hide for minutes how slow it is now
        "extractor_retries": request.retries,
        "proxy": request.proxy or None,
        # A copy in memory: given a file, yt-dlp would write the session's cookies back to it.
        "cookiefile": io.StringIO(Path(request.cookies).read_text()) if request.cookies else None,
        "progress_hooks": [watch_size],
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "color": "never",
    }


def _source(offer: Mapping[str, Any]) -> dict[str, Any]:
    fields = (
        "extractor", "format_id", "protocol", "ext", "vcodec", "acodec", "width", "height", "fps",
        "tbr", "vbr", "dynamic_range", "duration",
    )  # fmt: skip
    known = {name: offer[name] for name in fields if isinstance(offer.get(name), str | int | float)}
    return {"yt_dlp": ytdlp_version()} | known


def ytdlp_version() -> str:
    """Of the installed yt-dlp, without importing it. It ages in weeks, so every row says which one it met."""
    return importlib.metadata.version("yt-dlp")


# ---------------------------------------------------------------------------------------------- checking


def require_whole(path: Path, announced_seconds: float = 0.0) -> VideoInfo:
    """Probe a file and make sure that all of it is there.

    Measured: a webm cut at 60 % opens in every library with its full length, and PyAV reads a cut mp4 without a word.
    So the file must end where its container, and the site, say it does, and its last second must decode.

    Args:
        announced_seconds: duration the site gave; 0: none.

    Raises:
        RefusedError: empty, a web page, cut short, or not readable.
    """
    from pipelines.video import VideoError, decodes_at_end, probe

    if path.stat().st_size == 0:
        raise RefusedError(Cause.DOWNLOAD_EMPTY, "0 bytes")
    with path.open("rb") as file:
        head = file.read(512)
    if b"\0" not in head:  # every video container has one near its start
        begin = head.strip()[:60].decode("ascii", "replace")
        raise RefusedError(Cause.DOWNLOAD_NOT_A_VIDEO, f"a text that begins {begin!r}")
    missing = missing_mp4_bytes(path)
    if missing:
        raise RefusedError(Cause.DOWNLOAD_TRUNCATED, f"{missing} bytes of the mp4 are missing")
    try:
        info = probe(path)
    except VideoError as error:
        raise RefusedError(error.cause, error.detail) from error
    if info.duration < announced_seconds - DURATION_TOLERANCE_SECONDS:
        raise RefusedError(
            Cause.DOWNLOAD_TRUNCATED,
            f"{info.duration:.1f} s long, {announced_seconds:.1f} s announced",
        )
    if not decodes_at_end(path, info):
        detail = f"ends before its header says, or its last second does not decode ({info.duration:.1f} s are there)"
        raise RefusedError(Cause.DOWNLOAD_TRUNCATED, detail)
    return info


def missing_mp4_bytes(path: Path) -> int:
    """How far the last media or index box of an mp4 reaches past the end of the file; 0 for every other file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 0
        while start + 16 <= size:
            file.seek(start)
            head = file.read(16)
            kind = head[4:8]
            if start == 0 and kind != b"ftyp":
                return 0
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8:  # 0 means to the end of the file
                return 0
            start += length
            if start > size and kind in (b"mdat", b"moov", b"moof"):
                return start - size
    return 0


# ---------------------------------------------------------------------------------------------- the process


def answer(request: Request, folder: Path) -> dict[str, Any]:
    """Do what is asked. Never raises: this is the boundary of the process.

    Returns:
        ``file`` (name in ``folder``, empty for a local path), ``probe`` and ``source``; or ``cause`` and ``detail``.
    """
    try:
        path = Path(request.path)
        source: dict[str, Any] = {}
        if request.metadata_only:
            return {"file": "", "probe": {}, "source": look(request, folder)}
        if request.url:
            path, source = download(request, folder)
        info = require_whole(path, source.get("duration") or 0.0)
        check_height(info.height, request.min_height)
    except RefusedError as refused:
        return {"cause": refused.cause, "detail": refused.detail}
    except Exception as error:
        return {"cause": cause_of(error), "detail": str(error) or type(error).__name__}
    file = path.name if request.url else ""
    return {"file": file, "probe": dataclasses.asdict(info), "source": source}


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Write the answer."""
    (folder / "result.json").write_text(json.dumps(result))


def _end_with_parent(folder: Path) -> None:
    """Wait until standard input closes, which happens when the parent is gone, then leave nothing behind."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Read the request, write the answer."""
    folder = Path(sys.argv[1])
    request = Request(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # Where a regular expression or a codec holds the interpreter no thread runs; this timer needs none.
    faulthandler.dump_traceback_later(request.deadline_seconds + 5, exit=True)
    finish(folder, answer(request, folder))


if __name__ == "__main__":
    main()
