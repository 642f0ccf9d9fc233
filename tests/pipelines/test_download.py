"""The real yt-dlp against a real socket: what is fetched, what is refused and why, what is left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import av
import psutil
import pytest
import yt_dlp
from packaging.version import Version

from pipelines import download, fetch_process, storage
from pipelines.download import (
    BLOCKS,
    OPERATIONAL,
    RECOVERS,
    DownloadConfig,
    Downloader,
    egress_address,
    fetch,
    fetch_politely,
    file_sha256,
    find_cached,
    manners_towards,
    public_url,
    record_uri,
    remove_leftovers,
    scrub,
    site_of,
)
from pipelines.fetch_process import (
    CAUSES,
    RefusedError,
    Request,
    cause_of,
    check_offer,
    choose_format,
    format_sort,
    missing_mp4_bytes,
    require_whole,
)
from pipelines.limiter import Limiter, Limits, Manners, Outcome, Turn, backoff_seconds
from pipelines.schema import TRANSIENT, Cause, Video, from_row, reject, to_json, to_row
from tests import clips
from tests.material import REPOSITORY, SHARED, needs_shared
from tests.site import (
    Page,
    VideoSite,
    bot_page,
    byte_range,
    cut_transfer,
    drip,
    redirect,
    stall,
    status,
    web_page,
)

CONFIG = DownloadConfig(deadline_seconds=60, socket_timeout_seconds=5)
SECRETS = ("alice", "hunter2", "SIGNED", "proxyuser", "proxypass", "cookievalue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of 160x120 in two containers, and every way they arrive broken."""
    root = tmp_path_factory.mktemp("site")
    mp4 = clips.encode(root / "clip.mp4", clips.indexed(100), audio_seconds=4.0)
    webm = clips.encode(root / "clip.webm", clips.indexed(100), codec="libvpx-vp9")
    clips.encode(
        root / "fast.mp4",
        clips.indexed(100),
        container_options={"movflags": "faststart"},
        options={"g": "25"},
    )
    clips.truncate(mp4, root / "cut.mp4", 0.6)
    clips.truncate(root / "fast.mp4", root / "cut-fast.mp4", 0.6)
    clips.truncate(webm, root / "cut.webm", 0.6)
    clips.encode_audio(root / "sound.m4a")
    clips.encode_audio(root / "sound.mp4")
    return root


@pytest.fixture
def site(folder: Path) -> Any:
    with VideoSite(folder) as running:
        yield running


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which attempts make their temporary folders."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def video(url: str = "", path: str = "") -> Video:
    return Video(identity="id00012", video="21Uxsk56VDQ", url=url, path=path)


# ---------------------------------------------------------------------------------------------- fetching


@pytest.mark.slow
def test_a_fetched_file_is_the_site_s_bytes_and_a_rerun_downloads_nothing(
    site: VideoSite, folder: Path, tmp_path: Path, scratch: Path
) -> None:
    cache = str(tmp_path / "cache")
    fetched = fetch(video(site.url("/clip.mp4")), CONFIG, cache)
    assert (fetched.state, fetched.cause) == ("open", ""), fetched.detail
    assert Path(fetched.blob).read_bytes() == (folder / "clip.mp4").read_bytes()
    sha256 = file_sha256(folder / "clip.mp4")
    assert fetched.blob == f"{cache}/{sha256[:2]}/{sha256}.mp4"
    assert (fetched.sha256, fetched.size) == (sha256, (folder / "clip.mp4").stat().st_size)
    assert (fetched.probe["width"], fetched.probe["height"], fetched.probe["frames"]) == (
        160,
        120,
        100,
    )
    assert Version(fetched.source["yt_dlp"]) == Version(yt_dlp.version.__version__)
    assert list(scratch.iterdir()) == []

    visits = site.count()
    assert visits > 0
    assert fetch(video(site.url("/clip.mp4")), CONFIG, cache) == fetched
    assert site.count() == visits


BROKEN = {
    "/cut.mp4": (None, Cause.DOWNLOAD_TRUNCATED),
    "/cut-fast.mp4": (None, Cause.DOWNLOAD_TRUNCATED),
    "/cut.webm": (None, Cause.DOWNLOAD_TRUNCATED),
    "/sound.m4a": (None, Cause.VIDEO_NO_STREAM),
    "/sound.mp4": (None, Cause.VIDEO_NO_STREAM),
    "/page.mp4": (web_page(), Cause.DOWNLOAD_NOT_A_VIDEO),
    "/page-as-video.mp4": (
        replace(web_page(), type="video/mp4"),
        Cause.DOWNLOAD_NOT_A_VIDEO,
    ),
    "/noise.mp4": (Page(body=bytes(5000)), Cause.VIDEO_UNREADABLE),
    "/empty.mp4": (Page(), Cause.DOWNLOAD_EMPTY),
    "/403.mp4": (status(403), Cause.DOWNLOAD_FORBIDDEN),
    "/404.mp4": (status(404), Cause.DOWNLOAD_NOT_FOUND),
    "/429.mp4": (status(429), Cause.DOWNLOAD_RATE_LIMITED),
    "/bot.mp4": (bot_page(), Cause.DOWNLOAD_BOT_CHECK),
    "/500.mp4": (status(500), Cause.DOWNLOAD_SERVER_ERROR),
    "/octets.mp4": (Page(body=b"\x01" * 5000, type="image/png"), Cause.DOWNLOAD_NOT_A_VIDEO),
    "/loop.mp4": (redirect("/loop.mp4"), Cause.DOWNLOAD_SERVER_ERROR),
    "/to-file.mp4": (redirect("file:///etc/passwd"), Cause.DOWNLOAD_SCHEME),
    "/to-ftp.mp4": (redirect("ftp://127.0.0.1/clip.mp4"), Cause.DOWNLOAD_SCHEME),
    "/embeds-ftp.html": (
        web_page('<video src="ftp://127.0.0.1/clip.mp4"></video>'),
        Cause.DOWNLOAD_SCHEME,
    ),
    "/lists-file.m3u8": (
        Page(
            body=b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
            type="application/vnd.apple.mpegurl",
        ),
        Cause.DOWNLOAD_SCHEME,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", BROKEN)
def test_what_is_not_a_whole_video_is_refused_with_its_cause_and_leaves_nothing(
    path: str, site: VideoSite, tmp_path: Path, scratch: Path
) -> None:
    page, cause = BROKEN[path]
    if page:
        site.pages[path] = page
    cache = tmp_path / "cache"
    refused = fetch(video(site.url(path)), CONFIG, str(cache))
    assert (refused.cause, bool(refused.detail)) == (cause.value, True)
    assert refused.state == ("failed" if cause in TRANSIENT else "rejected")
    assert (refused.blob, refused.sha256, refused.probe) == ("", "", {})
    assert "passwd" not in refused.detail or cause is Cause.DOWNLOAD_SCHEME
    assert not cache.exists()
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/clip.webm", "/moved.mp4", "/untyped.mp4", "/streamed.m3u8"])
def test_other_ways_to_serve_a_video(
    path: str, site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    content = (folder / "clip.mp4").read_bytes()
    site.pages["/moved.mp4"] = redirect("/clip.mp4")
    site.pages["/untyped.mp4"] = Page(body=content, type="text/plain")
    site.pages["/streamed.m3u8"] = Page(
        body=b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\nclip.mp4\n#EXT-X-ENDLIST\n",
        type="application/vnd.apple.mpegurl",
    )
    fetched = fetch(video(site.url(path)), CONFIG, str(tmp_path))
    expected = (folder / "clip.webm").read_bytes() if path == "/clip.webm" else content
    assert (fetched.cause, fetched.detail) == ("", "")
    assert Path(fetched.blob).read_bytes() == expected


@pytest.mark.slow
def test_a_stream_without_one_of_its_pieces_is_no_video(site: VideoSite, tmp_path: Path) -> None:
    """By default yt-dlp leaves out what it cannot get and calls that success; here as little as sites round their durations by."""
    site.pages["/holed.m3u8"] = Page(
        body=b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n"
        + b"#EXTINF:4.0,\nclip.mp4\n#EXTINF:0.4,\ngone.mp4\n"
        + b"#EXT-X-ENDLIST\n",
        type="application/vnd.apple.mpegurl",
    )
    config = replace(CONFIG, retries=0)
    failed = fetch(video(site.url("/holed.m3u8")), config, str(tmp_path))
    assert not failed.live
    assert failed.blob == ""


@pytest.mark.slow
def test_a_connection_that_breaks_is_taken_up_again_but_not_for_ever(
    site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    content = (folder / "clip.mp4").read_bytes()
    site.pages["/broken.mp4"] = cut_transfer(content, 0.6)
    failed = fetch(video(site.url("/broken.mp4")), replace(CONFIG, retries=2), str(tmp_path))
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_TRUNCATED.value, "failed")
    ranges = [visit.headers["Range"] for visit in site.visits if "Range" in visit.headers]
    assert len(ranges) == 2
    assert re.fullmatch(r"bytes=[1-9]\d{3,}-", ranges[-1]), (
        "from where it broke, not from the start"
    )


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/a.mp4", "/etc/passwd", "ytsearch:face", "", "data:,a"],
)
def test_only_http_and_https_urls_are_opened(url: str, tmp_path: Path) -> None:
    refused = fetch(video(url), CONFIG, str(tmp_path))
    assert (refused.cause, refused.state) == (Cause.DOWNLOAD_SCHEME.value, "rejected")


@pytest.mark.slow
def test_nobody_listens(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:9/a.mp4", "http://no-such-host.invalid/a.mp4"):
        assert fetch(video(url), CONFIG, str(tmp_path)).cause == Cause.DOWNLOAD_NETWORK.value


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.slow
def test_too_few_lines(site: VideoSite, tmp_path: Path) -> None:
    tall = replace(CONFIG, min_height=1080)
    cache = str(tmp_path)
    refused = fetch(video(site.url("/clip.mp4")), tall, cache)
    assert refused.cause == Cause.DOWNLOAD_LOW_RESOLUTION.value
    assert refused.detail == "height 120, at least 1080 wanted"
    assert storage.names_below(cache) == []

    assert fetch(video(site.url("/clip.mp4")), CONFIG, cache).live
    visits = site.count()
    refused = fetch(video(site.url("/clip.mp4")), tall, cache)
    assert refused.detail == "height 120, at least 1080 wanted"
    assert site.count() == visits, "known from the cache"


@pytest.mark.slow
def test_too_many_bytes_are_not_fetched(site: VideoSite, folder: Path, tmp_path: Path) -> None:
    size = (folder / "clip.mp4").stat().st_size
    refused = fetch(video(site.url("/clip.mp4")), replace(CONFIG, max_bytes=9999), str(tmp_path))
    assert refused.cause == Cause.DOWNLOAD_TOO_LARGE.value
    assert refused.detail == f"{size} bytes, at most 9999 wanted"


@pytest.mark.slow
def test_a_silent_server_costs_no_more_than_the_deadline(
    site: VideoSite, folder: Path, tmp_path: Path, scratch: Path
) -> None:
    site.pages["/silent.mp4"] = stall((folder / "clip.mp4").read_bytes(), after=20_000)
    patient = replace(CONFIG, deadline_seconds=12, socket_timeout_seconds=200)
    before = set(psutil.Process().children(recursive=True))
    started = time.perf_counter()
    failed = fetch(video(site.url("/silent.mp4")), patient, str(tmp_path / "cache"))
    assert time.perf_counter() - started < 190, "less than the socket waits"
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_DEADLINE.value, "failed")
    assert failed.detail == "not done after 12 s"
    assert site.count("/silent.mp4") > 1, "it was in the middle of the file"
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_silent_socket_is_given_up(site: VideoSite, folder: Path, tmp_path: Path) -> None:
    site.pages["/silent.mp4"] = stall((folder / "clip.mp4").read_bytes(), after=20_000)
    hasty = replace(CONFIG, socket_timeout_seconds=0.5, retries=1)
    failed = fetch(video(site.url("/silent.mp4")), hasty, str(tmp_path / "cache"))
    assert failed.cause == Cause.DOWNLOAD_NETWORK.value
    assert "timed out" in failed.detail


@pytest.mark.slow
def test_a_server_that_hardly_goes_on_is_given_up_long_before_the_deadline(
    site: VideoSite, folder: Path, tmp_path: Path, scratch: Path
) -> None:
    site.pages["/drip.mp4"] = drip((folder / "clip.mp4").read_bytes(), after=20_000)
    strict = replace(CONFIG, min_rate_bytes=5000, rate_window_seconds=2)
    started = time.perf_counter()
    failed = fetch(video(site.url("/drip.mp4")), strict, str(tmp_path / "cache"))
    assert time.perf_counter() - started < 50
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_SLOW.value, "failed")
    assert re.fullmatch(r"\d+ bytes in 2 s, at least 5000 a second wanted", failed.detail)
    assert list(scratch.iterdir()) == []
    assert fetch(video(site.url("/clip.mp4")), strict, str(tmp_path / "cache")).live


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_and_no_file(
    site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    site.pages["/silent.mp4"] = stall((folder / "clip.mp4").read_bytes(), after=20_000)
    program = (
        "import sys; from pipelines.download import *; from pipelines.schema import Video;"
        "fetch(Video(identity='i', video='v', url=sys.argv[1]), DownloadConfig(), sys.argv[2])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, site.url("/silent.mp4"), str(tmp_path / "cache")],
        cwd=REPOSITORY,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    wait_until(lambda: site.count("/silent.mp4") > 1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 1
    assert len(list(scratch.iterdir())) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(alive(child) for child in children))
    assert list(scratch.iterdir()) == []


def wait_until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_child_that_crashes_is_a_failure_with_its_last_words(
    site: VideoSite, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    failed = fetch(video(site.url("/clip.mp4")), CONFIG, str(tmp_path))
    assert "yt_dlp" in failed.source
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_OTHER.value, "failed")
    assert "ended with 1" in failed.detail
    assert "encodings" in failed.detail
    assert list(scratch.iterdir()) == []


def test_the_last_words_of_a_crash_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """yt-dlp prints the lines of a cookie file that it cannot use; what is printed before a crash is the row's detail."""
    cookies = tmp_path / "my-account.txt"
    cookies.write_text("# a comment\n127.0.0.1 FALSE / FALSE 0 SID cookievalue\n")
    crashing = tmp_path / "python"
    crashing.write_text(
        f"#!/bin/sh\ncat >/dev/null & cat {cookies}; echo {cookies} http://a:hunter2@h; exit 7\n"
    )
    crashing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crashing))
    failed = fetch(
        video("http://127.0.0.1:9/v"), replace(CONFIG, cookies=str(cookies)), str(tmp_path)
    )
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_OTHER.value, "failed")
    assert "ended with 7" in failed.detail
    assert "comment" in failed.detail
    for secret in ("cookievalue", "hunter2", "my-account", str(tmp_path)):
        assert secret not in failed.detail


# ---------------------------------------------------------------------------------------------- the cache


@pytest.mark.slow
def test_a_damaged_file_in_the_cache_is_fetched_again(
    site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path)
    url = site.url("/clip.mp4")
    fetched = fetch(video(url), CONFIG, cache)
    content = (folder / "clip.mp4").read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for damage in (flipped, content[:-1], None):
        if damage is None:
            Path(fetched.blob).unlink()
        else:
            Path(fetched.blob).write_bytes(damage)
        assert find_cached(url, CONFIG, cache) is None
    visits = site.count()
    assert fetch(video(url), CONFIG, cache) == fetched
    assert site.count() > visits
    assert Path(fetched.blob).read_bytes() == content


@pytest.mark.slow
def test_a_cache_in_an_object_store(site: VideoSite, folder: Path) -> None:
    cache = "memory://test-download/cache"
    fetched = fetch(video(site.url("/clip.mp4")), CONFIG, cache)
    assert fetched.blob.startswith("memory://")
    content = (folder / "clip.mp4").read_bytes()
    with storage.local_file(fetched.blob) as path:
        assert path.read_bytes() == content
    visits = site.count()
    assert fetch(video(site.url("/clip.mp4")), CONFIG, cache) == fetched
    assert site.count() == visits
    storage.write_atomic(fetched.blob, content[:-1])
    assert find_cached(site.url("/clip.mp4"), CONFIG, cache) is None


def test_a_cached_file_of_other_content_is_not_taken(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v"
    good = tmp_path / "good.mp4"
    good.write_bytes(b"good")
    blob = download.keep_file(good, file_sha256(good), str(tmp_path))
    record = {"blob": blob, "size": 4, "sha256": file_sha256(good), "source": {}}
    record |= {"probe": {"height": 720}}
    storage.write_atomic(record_uri(url, CONFIG, str(tmp_path)), json.dumps(record).encode())
    assert find_cached(url, CONFIG, str(tmp_path)) == record
    tall = replace(CONFIG, min_height=1080)  # a run that wants more looks at the same files
    low = fetch(video(url), tall, str(tmp_path))
    assert low.cause == Cause.DOWNLOAD_LOW_RESOLUTION.value
    (tmp_path / blob).write_bytes(b"evil")
    assert find_cached(url, CONFIG, str(tmp_path)) is None


def test_a_file_of_another_size_is_not_taken_from_a_bucket() -> None:
    """Of a file elsewhere nobody reads all to know it."""
    cache, url = "memory://cache-of-sizes", "http://127.0.0.1:9/v"
    record = {"blob": "ab/abab.mp4", "size": 4, "sha256": "abab", "source": {}, "probe": {}}
    storage.write_atomic(record_uri(url, CONFIG, cache), json.dumps(record).encode())
    assert find_cached(url, CONFIG, cache) is None
    for content, found in ((b"four", record), (b"three", None), (b"two", None)):
        storage.write_atomic(storage.join(cache, record["blob"]), content)
        assert find_cached(url, CONFIG, cache) == found


def test_a_record_belongs_to_one_url_and_one_format_rule(tmp_path: Path) -> None:
    url = "https://alice:hunter2@example.org/v?id=1"
    uris = {
        record_uri(address, config, str(tmp_path))
        for address in (url, url + "2")
        for config in (CONFIG, replace(CONFIG, max_height=720))
    }
    assert len(uris) == 4
    assert record_uri(url, replace(CONFIG, min_height=720, retries=9), str(tmp_path)) in uris
    assert not any(secret in uri for uri in uris for secret in ("alice", "hunter2", "example"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"blob": "aa/b.mp4"}'])
def test_a_broken_record_is_no_record(content: bytes, tmp_path: Path) -> None:
    storage.write_atomic(record_uri("http://a/b", CONFIG, str(tmp_path)), content)
    assert find_cached("http://a/b", CONFIG, str(tmp_path)) is None


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.slow
def test_a_file_named_by_the_list_is_checked_and_not_copied(
    folder: Path, tmp_path: Path, scratch: Path
) -> None:
    cache = tmp_path / "cache"
    taken = fetch(video(path=str(folder / "clip.webm")), CONFIG, str(cache))
    assert (taken.blob, taken.cause) == (str(folder / "clip.webm"), "")
    assert taken.sha256 == file_sha256(folder / "clip.webm")
    assert taken.size == (folder / "clip.webm").stat().st_size
    assert taken.probe["codec"] == "vp9"
    assert not cache.exists()

    remote = "memory://test-download/clip.mp4"
    storage.put_file(folder / "clip.mp4", remote)
    taken = fetch(video(path=remote), CONFIG, str(cache))
    assert (taken.blob, taken.sha256) == (remote, file_sha256(folder / "clip.mp4"))

    cut = fetch(video(path=str(folder / "cut.webm")), CONFIG, str(cache))
    assert cut.cause == Cause.DOWNLOAD_TRUNCATED.value
    low = fetch(video(path=remote), replace(CONFIG, min_height=121), str(cache))
    assert low.cause == Cause.DOWNLOAD_LOW_RESOLUTION.value
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("path", ["{}/gone.mp4", "{}", "memory://nowhere/gone.mp4"])
def test_a_file_that_is_not_there(path: str, tmp_path: Path) -> None:
    missing = fetch(video(path=path.format(tmp_path)), CONFIG, str(tmp_path / "cache"))
    assert missing.cause == Cause.DOWNLOAD_NOT_FOUND.value


def test_missing_bytes_of_an_mp4_are_counted(folder: Path, tmp_path: Path) -> None:
    for name in ("clip.mp4", "fast.mp4"):
        assert missing_mp4_bytes(folder / name) == 0
    content = (folder / "fast.mp4").read_bytes()
    for share in (0.3, 0.9, 0.999):
        cut = clips.truncate(folder / "fast.mp4", tmp_path / "cut.mp4", share)
        assert missing_mp4_bytes(cut) == len(content) - cut.stat().st_size
    assert missing_mp4_bytes(folder / "cut.webm") == 0


@pytest.mark.slow
def test_a_last_second_of_zeros_is_not_whole(folder: Path, tmp_path: Path) -> None:
    content = (folder / "fast.mp4").read_bytes()
    zeroed = tmp_path / "zeroed.mp4"
    zeroed.write_bytes(content[:-2500] + bytes(2500))
    assert missing_mp4_bytes(zeroed) == 0
    with pytest.raises(RefusedError) as refused:
        require_whole(zeroed)
    assert refused.value.cause is Cause.DOWNLOAD_TRUNCATED


@pytest.mark.slow
def test_a_hole_in_the_last_second_is_found(tmp_path: Path) -> None:
    """A picture half a second before the end; those after it are there, and need none before the last key frame."""
    whole = clips.encode(tmp_path / "whole.mp4", clips.indexed(50), options={"g": "5"})
    content = bytearray(whole.read_bytes())
    with av.open(str(whole)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    hole = packets[-12]
    content[hole.pos : hole.pos + hole.size] = bytes(hole.size)
    (tmp_path / "holed.mp4").write_bytes(content)
    require_whole(whole)
    with pytest.raises(RefusedError) as refused:
        require_whole(tmp_path / "holed.mp4")
    assert refused.value.cause is Cause.DOWNLOAD_TRUNCATED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_too_slow_is_what_brings_less_than_the_rate_in_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 bytes a second over a minute: 60,000 in each, and not on average. Minutes pass when this test says so."""
    waits: queue.Queue[float] = queue.Queue()
    minutes: queue.Queue[bool] = queue.Queue()
    ended: queue.Queue[int] = queue.Queue()

    class Minutes(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.put(timeout or 0.0)
            return minutes.get()

    def end(code: int) -> None:
        ended.put(code)
        raise SystemExit

    stand_in = types.SimpleNamespace(Event=Minutes, Thread=threading.Thread)
    monkeypatch.setattr(fetch_process, "threading", stand_in)
    monkeypatch.setattr(fetch_process.os, "_exit", end)
    request = Request(deadline_seconds=999, min_rate_bytes=1000, rate_window_seconds=60)
    with fetch_process.watch_rate(request, tmp_path) as received:
        for total in (60_000, 400_000, 460_000, 490_000):
            assert waits.get(timeout=60) == 60
            received({"downloaded_bytes": total})
            minutes.put(False)
        assert ended.get(timeout=60) == 0
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["cause"] == Cause.DOWNLOAD_SLOW
    assert told["detail"].startswith("30000 bytes in 60 s")


@pytest.mark.slow
def test_the_announced_duration_is_held_against_the_file(folder: Path) -> None:
    require_whole(folder / "clip.mp4", announced_seconds=4.9)
    with pytest.raises(RefusedError, match=r"4\.0 s long, 6\.0 s announced") as refused:
        require_whole(folder / "clip.mp4", announced_seconds=6.0)
    assert refused.value.cause is Cause.DOWNLOAD_TRUNCATED


@pytest.mark.slow
@pytest.mark.real
@needs_shared
def test_real_clips_are_whole_and_their_halves_are_not(tmp_path: Path) -> None:
    paths = sorted((SHARED / "videos").glob("*.mp4"))
    assert len(paths) >= 14
    for path in paths[::3]:
        require_whole(path)
        with pytest.raises(RefusedError) as refused:
            require_whole(clips.truncate(path, tmp_path / "half.mp4", 0.5))
        assert refused.value.cause is Cause.DOWNLOAD_TRUNCATED, path


# ---------------------------------------------------------------------------------------------- secrets


@pytest.mark.slow
def test_secrets_stay_out_of_rows_logs_and_files(
    site: VideoSite,
    tmp_path: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    cookies = tmp_path / "cookies.txt"
    cookie = "127.0.0.1\tFALSE\t/\tFALSE\t2147483647\tSID\tcookievalue\n"
    cookies.write_text("# Netscape HTTP Cookie File\n" + cookie)
    before = cookies.read_bytes()
    config = replace(CONFIG, cookies=str(cookies))
    cache = str(tmp_path / "cache")
    site.pages["/denied.mp4"] = status(403)
    results = []
    for path in ("/clip.mp4", "/denied.mp4", "/page.mp4"):
        site.pages.setdefault("/page.mp4", web_page())
        url = site.url(f"{path}?v=1&X-Amz-Signature=SIGNED", user="alice:hunter2")
        results.append(fetch(video(url), config, cache))
    assert [result.live for result in results] == [True, False, False]
    assert results[0].url == site.url("/clip.mp4?v=1")
    assert {visit.headers.get("Cookie") for visit in site.visits} == {"SID=cookievalue"}
    assert all(visit.headers["Authorization"].startswith("Basic ") for visit in site.visits)
    assert cookies.read_bytes() == before

    monkeypatch.setenv("HEADRAY_PROXY", "http://proxyuser:proxypass@127.0.0.1:9")
    results.append(fetch(video(site.url("/clip.webm")), config, cache))
    assert results[-1].cause == Cause.DOWNLOAD_NETWORK.value
    assert "roxy" in results[-1].detail, "it did go through the proxy"
    monkeypatch.delenv("HEADRAY_PROXY")

    # A crash (here: the cache is a file) is reported by run_stage on the row that went in.
    url = site.url("/clip.mp4?token=SIGNED", user="alice:hunter2")
    row = Downloader(config, str(cookies))(to_row(video(url)))
    assert from_row(row)[0].cause == Cause.CRASH.value
    assert "crashed" in caplog.text

    written = [path.read_bytes().decode("latin1") for path in tmp_path.rglob("*.json")]
    assert written
    printed = capfd.readouterr()
    everywhere = [
        *map(to_json, results), row["record"], *written, printed.out, printed.err,
        *(str(vars(record)) for record in caplog.records if record.name.startswith("pipelines")),
    ]  # fmt: skip
    for secret in SECRETS:
        assert not any(secret in text for text in everywhere), secret
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://www.youtube.com/watch?v=21Uxsk56VDQ", "https://www.youtube.com/watch?v=21Uxsk56VDQ"),
        ("https://alice:hunter2@h.org:8443/a%20b.mp4?x=%20", "https://h.org:8443/a%20b.mp4?x=%20"),
        ("https://h.org/a?key=21&sig=S&X-Goog-Signature=S&b=&access_token=S#S", "https://h.org/a?key=21&b="),
        ("http://[::1/a?sig=S", "http://[::1/a"),
        ("/local/path.mp4", "/local/path.mp4"),
        ("", ""),
    ],
)  # fmt: skip
def test_public_url(url: str, public: str) -> None:
    assert public_url(url) == public
    assert public_url(public) == public


def test_scrub_keeps_words_and_drops_secrets() -> None:
    text = (
        "\x1b[0;31mERROR:\x1b[0m [generic] a: Unable to download https://alice:hunter2@h.org/v.mp4?sig=SIGNED "
        "HTTPSConnectionPool(host='h.org', port=443): Max retries exceeded with url: /v.mp4?token=SIGNED (Caused by "
        "ProxyError('http://proxyuser:proxypass@p:1')) in /tmp/headray-1/video.mp4 Did you mean this? yes"
    )
    clean = scrub(text, "/tmp/headray-1")
    assert clean.startswith(
        "[generic] a: Unable to download https://h.org/v.mp4 HTTPSConnectionPool("
    )
    assert clean.endswith("ProxyError('http://p:1')) in /video.mp4 Did you mean this? yes")
    assert not any(secret in clean for secret in SECRETS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"proxy": "http://proxyuser:proxypass@host:1"},
        {"cookies": "/nonexistent/cookies.txt"},
        {"url_template": "https://example.org/"},
        {"min_height": 1080, "max_height": 720},
        {"min_height": -1},
        {"deadline_seconds": 0},
        {"max_bytes": 0},
        {"retries": -1},
        {"tries": 0},
        {"pace": (20.0, 10.0)},
        {"first_pause_seconds": 0},
        {"max_blocks": 0},
        {"canary": "21Uxsk56VDQ", "from_downloads": "archive"},
    ],
)
def test_a_config_that_cannot_work_is_refused_without_its_secrets(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as refused:
        DownloadConfig(**wrong)
    assert not any(secret in str(refused.value) for secret in SECRETS)


# ---------------------------------------------------------------------------------------------- politeness


class Town(Limiter):
    """The state machine on a clock that only sleep moves; ``fetch`` is what the site answers, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.starts: list[float] = []

    def client(self, address: str = "home") -> Limits:
        """As one address sees it."""
        town = self

        class Client:
            def ask(self, site: str, manners: Manners) -> Turn:
                turn = Limiter.ask(town, address, site, town.now, manners)
                if not turn.wait_seconds:
                    town.starts.append(town.now)
                return turn

            def report(
                self, site: str, turn: Turn, outcome: Outcome, cause: str, manners: Manners
            ) -> None:
                Limiter.report(town, address, site, town.now, turn, outcome, cause, manners)

        return Client()

    def sleep(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds


def politely(site: VideoSite, path: str, town: Town, tmp_path: Path, **config: Any) -> Video:
    """One video through :func:`fetch_politely` in its first attempt."""
    wanted = replace(video(site.url(path)), attempts=1)
    manner = replace(CONFIG, **config)
    return fetch_politely(wanted, manner, str(tmp_path), town.client(), town.sleep)


@pytest.mark.slow
def test_a_video_that_meets_a_block_is_fetched_after_the_pause(
    site: VideoSite, folder: Path, tmp_path: Path
) -> None:
    town = Town()
    site.pages["/busy.mp4"] = status(429)

    def sleep(seconds: float) -> None:
        town.sleep(seconds)
        if town.now >= 400:
            site.pages["/busy.mp4"] = Page(body=folder / "clip.mp4")

    wanted = replace(video(site.url("/busy.mp4")), attempts=1)
    fetched = fetch_politely(wanted, CONFIG, str(tmp_path), town.client(), sleep)
    assert (fetched.cause, fetched.attempts) == ("", 1)
    assert town.starts == [0, 60, 180, 420]


@pytest.mark.slow
def test_an_address_that_is_given_up_costs_no_attempt_and_the_rest_is_not_even_asked_for(
    site: VideoSite, tmp_path: Path
) -> None:
    town = Town()
    site.pages["/bot.mp4"] = bot_page()
    failed = politely(site, "/bot.mp4", town, tmp_path, max_blocks=3)
    assert (failed.cause, failed.state) == (Cause.DOWNLOAD_BOT_CHECK.value, "failed")
    assert failed.attempts == 0
    assert failed.detail.startswith("given up after 3 blocks in a row; try again in 4 minutes; ")
    assert town.starts == [0, 60, 180]
    visits = site.count()
    other = politely(site, "/clip.mp4", town, tmp_path, max_blocks=3)
    assert (other.cause, other.attempts) == (failed.cause, 0)
    assert site.count() == visits
    assert not RECOVERS & BLOCKS
    assert RECOVERS | BLOCKS < TRANSIENT


@pytest.mark.slow
def test_a_video_that_alone_is_blocked_is_taken_to_be_its_own_fault(
    site: VideoSite, tmp_path: Path
) -> None:
    town = Town()
    site.pages["/bot.mp4"] = bot_page()

    def sleep(seconds: float) -> None:
        town.sleep(seconds)
        if len(town.starts) < 9:  # in every pause somebody else gets through
            assert politely(site, "/clip.mp4", town, tmp_path / str(town.now)).live

    wanted = replace(video(site.url("/bot.mp4")), attempts=1)
    failed = fetch_politely(wanted, CONFIG, str(tmp_path), town.client(), sleep)
    assert (failed.cause, failed.attempts) == (Cause.DOWNLOAD_BOT_CHECK.value, 1)
    assert town.now == 120


@pytest.mark.parametrize(
    ("answers", "pauses", "tries"),
    [
        ([Cause.DOWNLOAD_RATE_LIMITED, RuntimeError("ours")], [1], 2),
        ([Cause.DOWNLOAD_BOT_CHECK, *[Cause.DOWNLOAD_NETWORK] * 3], [1], 4),
        ([Cause.DOWNLOAD_RATE_LIMITED, Cause.DOWNLOAD_PRIVATE], [], 2),
        ([Cause.DOWNLOAD_RATE_LIMITED, Cause.DOWNLOAD_SERVER_ERROR, None], [], 3),
        ([*[Cause.DOWNLOAD_RATE_LIMITED] * 5, None], [], 6),  # nobody else got through meanwhile
    ],
)
def test_what_a_probe_met_decides_about_its_address(
    answers: list[Any], pauses: list[int], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's own word opens it, a lost connection or a crash of ours says nothing; either way the next may probe at once."""
    town, asked = Town(), iter(answers)

    def answer(wanted: Video, _: DownloadConfig, cache: str, await_turn: Any) -> Video:
        await_turn(wanted.url)
        met = next(asked)
        if isinstance(met, Exception):
            raise met
        return reject(wanted, met, cache) if met else wanted

    monkeypatch.setattr(download, "fetch", answer)
    wanted = replace(video("https://mirror.example/v"), attempts=1)
    with contextlib.suppress(RuntimeError):
        fetch_politely(wanted, CONFIG, "", town.client(), town.sleep)
    assert len(town.starts) == tries
    assert next(asked, "all met") == "all met"
    manners = manners_towards("mirror.example", CONFIG)
    assert [pause.blocks for pause in town.pauses(town.now, manners)] == pauses
    assert town.client().ask("mirror.example", manners).wait_seconds == 0


def test_a_full_disk_is_not_the_videos_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child tells of it as of any trouble."""
    told = json.dumps({"cause": Cause.DOWNLOAD_OTHER, "detail": f"x: {os.strerror(errno.ENOSPC)}"})
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\ncat >/dev/null & echo '{told}' > $4/result.json\n")
    child.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(child))
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(video("http://127.0.0.1:9/v"), CONFIG, str(tmp_path))
    assert caught.value.errno == errno.ENOSPC


def test_a_height_or_a_size_at_the_limit_passes() -> None:
    fetch_process.check_height(1080, 1080)
    fetch_process.check_size(1000, 1000)
    for refuse in (
        lambda: fetch_process.check_height(1079, 1080),
        lambda: fetch_process.check_size(1001, 1000),
    ):
        with pytest.raises(RefusedError, match="wanted"):
            refuse()


def test_a_refused_address_is_told_without_its_secrets(tmp_path: Path) -> None:
    refused = fetch(video("ftp://alice:hunter2@host/a.mp4?token=SIGNED"), CONFIG, str(tmp_path))
    assert (refused.cause, refused.url) == (Cause.DOWNLOAD_SCHEME.value, "ftp://host/a.mp4")
    assert not any(secret in to_json(refused) for secret in SECRETS)


def test_a_crash_is_told_without_the_secrets_of_the_address(tmp_path: Path) -> None:
    """Here the cache is a file; the slow test of secrets sees everything else that is written."""
    (tmp_path / "file").touch()
    url = "http://alice:hunter2@127.0.0.1:9/clip.mp4?token=SIGNED&v=1"
    row = Downloader(CONFIG, str(tmp_path / "file"))(to_row(video(url)))
    crashed, _ = from_row(row)
    assert crashed.cause == Cause.CRASH.value
    assert crashed.url == "http://127.0.0.1:9/clip.mp4?v=1"
    assert not any(secret in row["record"] for secret in SECRETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "page", "starts"),
    [
        ("/500.mp4", status(500), 3),
        ("/empty.mp4", Page(), 3),
        ("/403.mp4", status(403), 1),
        ("/page.mp4", web_page(), 1),
        ("/clip.mp4", None, 1),
    ],
)
def test_only_what_may_be_gone_in_seconds_is_tried_again(
    path: str, page: Page | None, starts: int, site: VideoSite, tmp_path: Path
) -> None:
    if page:
        site.pages[path] = page
    town = Town()
    ended = politely(site, path, town, tmp_path, backoff_seconds=10.0)
    assert ended.attempts == 1
    waits = [backoff_seconds(ended.key, 1, tries, 10.0) for tries in range(1, starts)]
    assert town.starts == [sum(waits[:n]) for n in range(starts)]
    if page is None:
        again = politely(site, path, town, tmp_path)
        assert again == ended
        assert len(town.starts) == 1, "the cache needs no turn"


@pytest.mark.slow
def test_the_pace_is_kept_by_all_of_an_address(site: VideoSite, tmp_path: Path) -> None:
    town = Town()
    for number in range(3):
        assert politely(site, "/clip.mp4", town, tmp_path / str(number), pace=(10.0, 20.0)).live
    gaps = [later - earlier for earlier, later in itertools.pairwise(town.starts)]
    assert all(10 <= gap <= 20 for gap in gaps)
    elsewhere = replace(CONFIG, pace=(10.0, 20.0))
    before = town.now
    wanted = video(site.url("/clip.mp4"))
    cache = str(tmp_path / "elsewhere")
    assert fetch_politely(wanted, elsewhere, cache, town.client("other"), town.sleep).live
    assert town.now == before, "another address has its own pace"


def test_what_the_pace_applies_to() -> None:
    youtube = ["https://www.youtube.com/watch?v=a", "https://youtu.be/a", "http://M.YouTube.com/a"]
    assert {site_of(url) for url in youtube} == {"youtube"}
    assert site_of("http://127.0.0.1:80/youtube.com") == "127.0.0.1"
    assert site_of("https://notyoutube.com/a") == "notyoutube.com"
    auto = DownloadConfig()
    assert manners_towards("youtube", auto).gap_seconds == (10.0, 20.0)
    assert manners_towards("mirror.example", auto).gap_seconds == (0.0, 0.0)
    slow = DownloadConfig(pace=(30.0, 30.0))
    assert manners_towards("mirror.example", slow).gap_seconds == (30.0, 30.0)
    assert manners_towards("youtube", auto).probe_seconds > auto.deadline_seconds
    assert 3600 / (sum(manners_towards("youtube", auto).gap_seconds) / 2) < 300


def test_who_shares_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRAY_PROXY", raising=False)
    monkeypatch.delenv("HEADRAY_COOKIES", raising=False)
    cookies = tmp_path / "cookies.txt"
    cookies.touch()
    assert egress_address(DownloadConfig()) == "", "each node is its own"
    assert egress_address(DownloadConfig(cookies=str(cookies))) == "account"
    monkeypatch.setenv("HEADRAY_COOKIES", str(cookies))
    assert egress_address(DownloadConfig()) == "account"
    monkeypatch.setenv("HEADRAY_PROXY", "http://proxyuser:proxypass@host:3128")
    assert egress_address(DownloadConfig(cookies=str(cookies))) == "proxy host:3128"
    assert egress_address(DownloadConfig(egress="office")) == "office"


def test_every_operational_field_is_a_field() -> None:
    names = {f"download.{field.name}" for field in fields(DownloadConfig)}
    assert set(OPERATIONAL) < names


# ---------------------------------------------------------------------------------------------- formats

# What YouTube offers for one upload, shortened: 1440, 1080 and 720 lines in three codecs, one in HDR, a small file
# with sound, the same 1080 lines as an HLS stream, sound alone, and pictures of the seek bar.
OFFER = [
    {"format_id": "sb0", "vcodec": "none", "acodec": "none", "protocol": "mhtml", "height": 90, "width": 160},
    {"format_id": "140", "vcodec": "none", "acodec": "mp4a.40.2", "protocol": "https", "ext": "m4a"},
    {"format_id": "18", "vcodec": "avc1.42001E", "acodec": "mp4a.40.2", "height": 360, "width": 640, "tbr": 500},
    {"format_id": "136", "vcodec": "avc1.4d401f", "height": 720, "width": 1280, "fps": 30, "tbr": 1500},
    {"format_id": "137", "vcodec": "avc1.640028", "height": 1080, "width": 1920, "fps": 30, "tbr": 4000},
    {"format_id": "270", "vcodec": "avc1.640028", "height": 1080, "width": 1920, "fps": 30, "tbr": 4500,
     "protocol": "m3u8_native"},
    {"format_id": "248", "vcodec": "vp9", "height": 1080, "width": 1920, "fps": 30, "tbr": 2600},
    {"format_id": "399", "vcodec": "av01.0.08M.08", "height": 1080, "width": 1920, "fps": 30, "tbr": 1800},
    {"format_id": "335", "vcodec": "vp9.2", "height": 1080, "width": 1920, "fps": 60, "tbr": 6000,
     "dynamic_range": "HDR10"},
    {"format_id": "271", "vcodec": "vp9", "height": 1440, "width": 2560, "fps": 30, "tbr": 9000},
]  # fmt: skip


def chosen(without: set[str], max_height: int = 1080) -> str:
    formats = [
        {"url": "https://h.org/a", "ext": "mp4", "acodec": "none", "protocol": "https"} | offered
        for offered in OFFER
        if offered["format_id"] not in without
    ]
    options = {
        "format": choose_format,
        "format_sort": format_sort(max_height),
        "quiet": True,
        "cachedir": False,
    }
    info = {
        "id": "a",
        "title": "a",
        "extractor": "test",
        "webpage_url": "https://h.org",
        "formats": formats,
    }
    with yt_dlp.YoutubeDL(options) as ydl:
        return str(ydl.process_ie_result(info, download=False)["format_id"])


def test_formats_are_taken_in_the_order_we_state() -> None:
    gone: set[str] = set()
    for best in ("137", "270", "248", "399", "136", "18", "271"):
        assert chosen(gone) == best
        gone.add(best)
    assert chosen(set(), max_height=720) == "136"
    assert chosen({"136", "18"}, max_height=720) == "137", "the nearest above when nothing is below"


@pytest.mark.parametrize(
    ("keep", "cause"),
    [
        ({"sb0", "140"}, Cause.VIDEO_NO_STREAM),
        ({"sb0", "140", "335"}, Cause.VIDEO_HDR),
    ],
)
def test_an_offer_without_usable_pictures_says_why(keep: set[str], cause: Cause) -> None:
    with pytest.raises(RefusedError) as refused:
        chosen({str(offered["format_id"]) for offered in OFFER} - keep)
    assert refused.value.cause is cause


@pytest.mark.parametrize(
    ("offer", "cause"),
    [
        ({"height": 1080, "filesize": 10**6}, None),
        ({}, None),
        ({"height": 0}, None),
        ({"height": 719}, Cause.DOWNLOAD_LOW_RESOLUTION),
        ({"filesize": 10**6 + 1}, Cause.DOWNLOAD_TOO_LARGE),
        ({"_type": "playlist", "entries": []}, Cause.DOWNLOAD_NOT_A_VIDEO),
        ({"is_live": True}, Cause.DOWNLOAD_OTHER),
    ],
)
def test_unwanted_offers_are_refused_before_the_download(
    offer: dict[str, Any], cause: Cause | None
) -> None:
    request = Request(url="https://h.org/a", deadline_seconds=1, min_height=720, max_bytes=10**6)
    if cause is None:
        check_offer(offer, request)
        return
    with pytest.raises(RefusedError) as refused:
        check_offer(offer, request)
    assert refused.value.cause is cause


# ---------------------------------------------------------------------------------------------- causes

COOKIE_HINT = (
    "Use --cookies-from-browser or --cookies for the authentication. See  https://github.com/yt-dlp/yt-dlp/wiki/"
    "FAQ#how-do-i-pass-cookies-to-yt-dlp  for how to manually pass cookies. Also see  https://github.com/yt-dlp/yt-dlp/"
    "wiki/Extractors#exporting-youtube-cookies  for tips on effectively exporting YouTube cookies"
)
RATE_HINT = (
    "The current session has been rate-limited by YouTube for up to an hour. It is recommended to use `-t sleep` to "
    "add a delay between video requests to avoid exceeding the rate limit."
)

# Texts of YouTube as yt-dlp passes them on (its extractor composes them from YouTube's reason and its own hints).
TEXTS = {
    f"Sign in to confirm you’re not a bot. {COOKIE_HINT}": Cause.DOWNLOAD_BOT_CHECK,
    f"Sign in to confirm you're not a bot. {COOKIE_HINT}": Cause.DOWNLOAD_BOT_CHECK,
    "Please try again. YouTube is requiring a captcha challenge before playback": Cause.DOWNLOAD_BOT_CHECK,
    f"Video unavailable. This content isn't available, try again later. {RATE_HINT}": Cause.DOWNLOAD_RATE_LIMITED,
    "Unable to download API page: HTTP Error 429: Too Many Requests": Cause.DOWNLOAD_RATE_LIMITED,
    "Private video. Sign in if you've been granted access to this video": Cause.DOWNLOAD_PRIVATE,
    f"Private video. Sign in if you’ve been granted access to this video. {COOKIE_HINT}": Cause.DOWNLOAD_PRIVATE,
    "Video unavailable. This video is private": Cause.DOWNLOAD_PRIVATE,
    f"Sign in to confirm your age. This video may be inappropriate for some users. {COOKIE_HINT}":
        Cause.DOWNLOAD_AGE_GATE,
    "Sign in to confirm your age. The video you have requested has been rated TV-14": Cause.DOWNLOAD_AGE_GATE,
    "This video is age-restricted and only available on YouTube": Cause.DOWNLOAD_AGE_GATE,
    "Video unavailable. This video contains content from SME, who has blocked it in your country on copyright grounds":
        Cause.DOWNLOAD_GEO_BLOCKED,
    "Video unavailable. This video is not available in your country": Cause.DOWNLOAD_GEO_BLOCKED,
    "Video unavailable. This video has been removed by the uploader": Cause.DOWNLOAD_REMOVED,
    "This video has been removed for violating YouTube's Terms of Service": Cause.DOWNLOAD_REMOVED,
    "This video has been removed for violating YouTube's policy on hate speech.": Cause.DOWNLOAD_REMOVED,
    "Video unavailable. This video is no longer available because the YouTube account associated with this video has "
    "been terminated.": Cause.DOWNLOAD_REMOVED,
    "Video unavailable. This video is no longer available due to a copyright claim by WMG": Cause.DOWNLOAD_REMOVED,
    "Unable to download webpage: HTTP Error 451: Unavailable For Legal Reasons": Cause.DOWNLOAD_REMOVED,
    "Join this channel to get access to members-only content like this video, and other exclusive perks.":
        Cause.DOWNLOAD_LOGIN,
    "This video is available to this channel's members on level: Assistant (or any higher level). Join this channel "
    "to get access to members-only content and other exclusive perks.": Cause.DOWNLOAD_LOGIN,
    "This video requires payment to watch": Cause.DOWNLOAD_LOGIN,
    f"Please sign in. {COOKIE_HINT}": Cause.DOWNLOAD_LOGIN,
    "This video is only available for registered users. Use --cookies": Cause.DOWNLOAD_LOGIN,
    "Video unavailable": Cause.DOWNLOAD_NOT_FOUND,
    "This video is not available": Cause.DOWNLOAD_NOT_FOUND,
    "This video isn’t available anymore": Cause.DOWNLOAD_NOT_FOUND,
    "This live stream recording is not available.": Cause.DOWNLOAD_NOT_FOUND,
    "Incomplete YouTube ID 21Uxsk. URL https://www.youtube.com/watch?v=21Uxsk looks truncated.":
        Cause.DOWNLOAD_NOT_FOUND,
    "This video is DRM protected": Cause.DOWNLOAD_FORBIDDEN,
    "'21Uxsk56VDQ' is not a valid URL": Cause.DOWNLOAD_NOT_A_VIDEO,
    "Premieres in 3 hours": Cause.DOWNLOAD_OTHER,
    "Failed to extract any player response; please report this issue on  https://github.com/yt-dlp/yt-dlp/issues?q= , "
    "filling out the appropriate issue template. Confirm you are on the latest version using  yt-dlp -U":
        Cause.DOWNLOAD_OTHER,
    "Requested format is not available. Use --list-formats for a list of available formats": Cause.DOWNLOAD_OTHER,
}  # fmt: skip


def said(text: str) -> yt_dlp.utils.DownloadError:
    """What ``extract_info`` raises when YouTube's extractor says ``text``."""
    error = yt_dlp.utils.ExtractorError(text, expected=True, video_id="21Uxsk56VDQ", ie="youtube")
    return yt_dlp.utils.DownloadError(f"ERROR: {error}", (type(error), error, None))


def raised(error: Exception, text: str) -> yt_dlp.utils.DownloadError:
    """What the downloader raises when ``error`` happens below it and it reports ``text``."""
    return yt_dlp.utils.DownloadError(f"ERROR: {text}", (type(error), error, None))


def http_error(code: int) -> yt_dlp.networking.exceptions.HTTPError:
    response = yt_dlp.networking.Response(io.BytesIO(), "http://h.org/a", {}, status=code)
    return yt_dlp.networking.exceptions.HTTPError(response)


def geo_error() -> yt_dlp.utils.DownloadError:
    """As ``YoutubeDL`` words it, country list and advice included; the advice must not look like a login."""
    text = "The uploader has not made this video available in your country"
    error = yt_dlp.utils.GeoRestrictedError(text, countries=["DE"], video_id="a", ie="youtube")
    advice = "You might want to use a VPN or a proxy server (with --proxy) to workaround."
    return raised(error, f"{error}\nThis video is available in Germany.\n{advice}")


NETWORK = yt_dlp.networking.exceptions
FAILURES = [
    (geo_error(), Cause.DOWNLOAD_GEO_BLOCKED),
    (
        raised(http_error(403), "unable to download video data: HTTP Error 403: Forbidden"),
        Cause.DOWNLOAD_BOT_CHECK,
    ),
    (said("Unable to download webpage: HTTP Error 403: Forbidden"), Cause.DOWNLOAD_FORBIDDEN),
    (said("Unable to download webpage: HTTP Error 401: Unauthorized"), Cause.DOWNLOAD_LOGIN),
    (said("Unable to download webpage: HTTP Error 404: Not Found"), Cause.DOWNLOAD_NOT_FOUND),
    (said("Unable to download webpage: HTTP Error 410: Gone"), Cause.DOWNLOAD_NOT_FOUND),
    (said("Unable to download webpage: HTTP Error 502: Bad Gateway"), Cause.DOWNLOAD_SERVER_ERROR),
    (
        raised(NETWORK.IncompleteRead(partial=7, expected=9), "7 bytes read, 9 more expected"),
        Cause.DOWNLOAD_TRUNCATED,
    ),
    (yt_dlp.utils.ContentTooShortError(3, 9), Cause.DOWNLOAD_TRUNCATED),
    (raised(OSError(), "fragment 3 not found, unable to continue"), Cause.DOWNLOAD_TRUNCATED),
    (raised(OSError(), "Did not get any data blocks"), Cause.DOWNLOAD_EMPTY),
    (raised(NETWORK.SSLError(), "EOF occurred in violation of protocol"), Cause.DOWNLOAD_NETWORK),
    (raised(NETWORK.ProxyError(), "Unable to connect to proxy"), Cause.DOWNLOAD_NETWORK),
    (raised(NETWORK.TransportError(), "('Connection aborted.',)"), Cause.DOWNLOAD_NETWORK),
    (raised(OSError(), "The read operation timed out"), Cause.DOWNLOAD_NETWORK),
    (yt_dlp.utils.UnsupportedError("http://h.org/private video"), Cause.DOWNLOAD_NOT_A_VIDEO),
    (NETWORK.RequestError("No connection adapters were found for 'file:///a'"), Cause.DOWNLOAD_SCHEME),
    (KeyError("formats"), Cause.DOWNLOAD_OTHER),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cause"), TEXTS.items())
def test_texts_of_youtube(text: str, cause: Cause) -> None:
    assert cause_of(said(text)) is cause


@pytest.mark.parametrize(("error", "cause"), FAILURES)
def test_failures_of_the_network(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause


def test_every_line_of_the_table_decides_something(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [*map(said, TEXTS), *(error for error, _ in FAILURES)]
    causes = [cause_of(error) for error in errors]
    assert len(CAUSES) > 20
    for line in CAUSES:
        rest = tuple(other for other in CAUSES if other != line)
        monkeypatch.setattr(fetch_process, "CAUSES", rest)
        assert [cause_of(error) for error in errors] != causes, line


def test_words_inside_a_url_say_nothing() -> None:
    assert (
        cause_of(said("Unable to extract https://h.org/terminated/in-your-country/captcha"))
        is Cause.DOWNLOAD_OTHER
    )


def test_the_texts_yt_dlp_itself_composes_are_still_in_its_source() -> None:
    """The half of TEXTS that yt-dlp writes. When an update rewords one, this says so before a run does."""
    package = Path(yt_dlp.__file__).parent
    source = "".join(
        (package / name).read_text()
        for name in (
            "YoutubeDL.py", "extractor/youtube/_video.py", "extractor/youtube/_base.py",
            "extractor/youtube/_mistakes.py", "extractor/common.py",
            "extractor/generic.py", "downloader/http.py", "downloader/fragment.py", "networking/exceptions.py",
            "utils/_utils.py",
        )
    )  # fmt: skip
    for text in (
        "YouTube is requiring a captcha challenge before playback",
        "has been rate-limited by YouTube for up to an hour",
        "This content isn't available, try again later",
        "The uploader has not made this video available in your country",
        "not available from your location due to geo restriction",
        "This video is only available for registered users",
        "This video is DRM protected",
        "looks truncated",
        "is not a valid URL",
        "caused by Cloudflare anti-bot challenge",
        "unable to download video data: ",
        "content too short (expected ",
        "Did not get any data blocks",
        " more expected",
        "HTTP Error {response.status}: ",
        "(redirect loop detected)",
        "Unsupported URL: ",
    ):
        assert text in source, text


# ---------------------------------------------------------------------------------------------- the site


def test_ranges_of_the_fake_site_follow_rfc_9110() -> None:
    assert byte_range("bytes=0-9", 100) == (0, 10)
    assert byte_range("bytes=90-", 100) == (90, 100)
    assert byte_range("bytes=90-500", 100) == (90, 100)
    assert byte_range("bytes=-10", 100) == (90, 100)
    assert byte_range("bytes=-500", 100) == (0, 100)
    assert byte_range("", 100) is None
    assert byte_range("bytes=a-b", 100) is None
    first, end = byte_range("bytes=100-", 100) or (0, 1)
    assert first >= end


def test_leftovers_of_killed_runs_go_by_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, age in (("headray-fetch-old", 5000), ("headray-fetch-new", 10), ("other", 5000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "video.mp4").write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert remove_leftovers(4000) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["headray-fetch-new", "other"]
