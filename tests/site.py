"""A fake video site on 127.0.0.1: serves files with ranges and types as a real one does, or misbehaves as asked.

    with VideoSite(folder) as site:
        site.pages["/gone.mp4"] = status(404)
        ...                                         # yt-dlp fetches site.url("/clip.mp4")
        assert site.count("/clip.mp4") == 0         # "a rerun downloads nothing"

By hand: ``python -m tests.site FOLDER --port 8000``.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

logger = logging.getLogger(__name__)

TYPES = {
    ".mp4": "video/mp4",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".ts": "video/mp2t",
    ".m4a": "audio/mp4",
    ".html": "text/html; charset=utf-8",
}
"""Content types by suffix; anything else is application/octet-stream."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What one path answers."""

    body: bytes | Path = b""
    type: str = ""
    """Content type; empty: by the suffix of the path."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close the connection after this many bytes of the body, although all were announced."""
    stall_after: int | None = None
    """Send nothing more after this many bytes of the body, and keep the connection open."""
    drip_after: int | None = None
    """Send a byte every 50 ms after this many bytes of the body: no time-out of a socket ever strikes."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    time: float
    """``time.monotonic`` when it arrived."""


def status(code: int) -> Page:
    """An error page: 403, 404, 429, 500, ..."""
    return Page(status=code, body=f"<html><h1>{code}</h1></html>".encode(), type=TYPES[".html"])


def web_page(text: str = "Please wait while we check your browser.") -> Page:
    """200 with HTML where a video should be."""
    return Page(
        body=f"<!doctype html><html><body>{text}</body></html>".encode(), type=TYPES[".html"]
    )


def redirect(location: str) -> Page:
    """302 to a path of this site or to any URL, ``file://`` included."""
    return Page(status=302, headers={"Location": location})


def cut_transfer(body: bytes, share: float) -> Page:
    """All of the body announced, a share of it sent, then the connection closed."""
    return Page(body=body, cut_after=int(len(body) * share))


def stall(body: bytes, after: int = 0) -> Page:
    """A server that goes silent in the middle of the body."""
    return Page(body=body, stall_after=after)


def drip(body: bytes, after: int = 0) -> Page:
    """A server that goes on, but hardly."""
    return Page(body=body, drip_after=after)


def bot_page() -> Page:
    """What Cloudflare answers a visitor that it takes for a machine."""
    page = status(403)
    return replace(page, headers={"cf-mitigated": "challenge"})


@dataclass(kw_only=True)
class Storm:
    """For a while every path answers 429, as a site does that has had enough of an address."""

    after: int
    """Requests that are answered as ever before it begins."""
    seconds: float
    begun: float = math.inf
    """``time.monotonic`` of its beginning."""

    def rages(self, requests: int) -> bool:
        """Whether the next request, after so many, is refused."""
        now = time.monotonic()
        if requests >= self.after:
            self.begun = min(self.begun, now)
        return self.begun <= now < self.begun + self.seconds


class VideoSite:
    """The server; a context manager. ``pages`` may be changed while it runs and goes before the folder's files."""

    storm: Storm | None = None

    def __init__(
        self,
        folder: Path | None = None,
        pages: dict[str, Page] | None = None,
        port: int = 0,
    ) -> None:
        self.folder = folder
        self.pages: dict[str, Page] = dict(pages or {})
        self.visits: list[Visit] = []
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"site": self})
        self.server = _Server(("127.0.0.1", port), handler)

    def __enter__(self) -> VideoSite:
        # shutdown() waits for the next poll
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, path: str, user: str = "") -> str:
        """The URL of a path, with ``user`` (``name:password``) if given."""
        at = f"{user}@" if user else ""
        return f"http://{at}127.0.0.1:{self.server.server_port}{quote(path, safe='/?=&{}')}"

    def count(self, path: str = "") -> int:
        """Requests so far, of one path or of all."""
        return sum(path in ("", visit.path) for visit in self.visits)

    def find(self, path: str) -> Page:
        """What a path answers now."""
        if self.storm and self.storm.rages(len(self.visits)):
            return status(429)
        if path in self.pages:
            return self.pages[path]
        if self.folder is not None:
            file = (self.folder / path.lstrip("/")).resolve()
            if file.is_file() and file.is_relative_to(self.folder.resolve()):
                return Page(body=file)
        return status(404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Visitors that hang up are ordinary: yt-dlp reads a little of a file, then comes back for all of it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    site: VideoSite
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        page = self.site.find(path)
        body = page.body.read_bytes() if isinstance(page.body, Path) else page.body
        code, first, end = page.status, 0, len(body)
        headers = {
            "Content-Type": page.type or TYPES.get(Path(path).suffix, "application/octet-stream"),
            "Accept-Ranges": "bytes",
            **page.headers,
        }
        wanted = byte_range(self.headers.get("Range", ""), len(body))
        if wanted and code == 200:
            first, end = wanted
            code = 206 if first < end else 416
            span = f"{first}-{end - 1}" if first < end else "*"
            headers["Content-Range"] = f"bytes {span}/{len(body)}"
        visit = Visit(
            method=self.command,
            path=path,
            headers=dict(self.headers),
            status=code,
            time=time.monotonic(),
        )
        self.site.visits.append(visit)
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(max(0, end - first))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send(body[:end], page, first)

    def _send(self, body: bytes, page: Page, first: int) -> None:
        stops = (page.cut_after, page.stall_after, page.drip_after)
        limits = [limit for limit in stops if limit is not None]
        self.wfile.write(body[first : min(limits, default=len(body))])
        self.wfile.flush()
        if page.stall_after is not None:
            self.site.closing.wait()
        if page.drip_after is not None:
            for byte in body[max(first, page.drip_after) :]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.site.closing.wait(0.05):
                    break
        if limits:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s " + format, self.address_string(), *args)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and end (exclusive) that a Range header asks for; empty or beyond the end: not satisfiable."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not found or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def main() -> None:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(description="Serve a folder of videos on 127.0.0.1.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    site = VideoSite(arguments.folder, port=arguments.port)
    logger.info("serving %s at %s", arguments.folder, site.url("/"))
    try:
        site.server.serve_forever()
    except KeyboardInterrupt:
        site.server.server_close()


if __name__ == "__main__":
    main()
