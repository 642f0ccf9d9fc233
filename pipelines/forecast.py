"""What a run would cost and bring, from a sample of its list: asked of the sites, nothing fetched, nothing written.

The sample is the videos whose keys have the smallest hashes: the same for the same list, and spread evenly over it. What
faces reject cannot be known without pictures, so frames, bytes and hours are those of all videos that can be fetched.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import download, storage
from pipelines.fetch_process import RefusedError
from pipelines.preprocess import PreprocessConfig
from pipelines.schema import TRANSIENT, Cause, Span, Video

VIDEOS_PER_HOUR = 300
"""What one address may fetch from YouTube as a guest before it is asked to stop (yt-dlp's wiki on its extractors)."""
ASKED_AT_ONCE = 2
Z95 = 1.96
ASSUMED_BITS_PER_SECOND = 3.0e6
"""Of a video whose site tells neither its size nor its rate: about what YouTube sends for 1080 lines of H.264."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one video costs on one x86 core under the ``laptop`` preset, with the networks that come in wheels: CPU seconds
    of the stages and their decoders, measured on clips of 590 to 1920 lines (2026-11)."""

    cpu_per_video: float = 2.0
    """CPU seconds: the fetching process, its check, the index."""
    cpu_per_video_second: float = 0.46
    """CPU seconds: decoding a second of 1080 lines twice, and the search for cuts."""
    cpu_per_frame: float = 0.15
    """CPU seconds: detection, landmarks, window, embedding (0.076), quality and labels (0.03) of a kept frame."""
    cpu_per_pupils: float = 0.01
    """CPU seconds more a frame with ``--annotate.pupils iris``."""
    bytes_per_frame: float = 59_600.0
    """Of a sample, per frame with windows of 512 pixels at JPEG quality 95 and their labels (3600): mean of 334 frames of ten clips."""


COSTS = Costs()


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What the list alone says."""

    num_videos: int
    rejected: dict[str, int]
    """Videos that the list stage refuses, by cause."""
    sample: tuple[Video, ...]

    @property
    def num_usable(self) -> int:
        """Videos that the list stage lets through."""
        return self.num_videos - sum(self.rejected.values())


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What is known of one sampled video without fetching it."""

    key: str
    cause: str = ""
    """Why it cannot be had; empty when it can."""
    seconds: float = 0.0
    """Its length; 0: not told."""
    size_bytes: float = 0.0
    """0: not told."""
    is_size_assumed: bool = False
    height: int = 0
    """Lines; 0: not told."""
    used_seconds: float = 0.0
    """What its spans use of it."""
    frames: int = 0
    """That would be kept if every frame showed its face."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """An expected number and where it lies with 95 % certainty, as far as the sample's size tells."""

    expected: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Every end multiplied."""
        return Range(
            expected=self.expected * factor, low=self.low * factor, high=self.high * factor
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What :func:`predict` expects of a run."""

    num_videos: int
    num_usable: int
    num_asked: int
    """Sampled videos that answered yes or no."""
    survivors: Range
    """Videos that can be fetched."""
    download_bytes: Range
    frames: Range
    """At most: every face passes."""
    dataset_bytes: Range
    address_hours: float
    """For one egress address at :data:`VIDEOS_PER_HOUR`; 0 for local files."""
    cpu_hours: Range
    work_bytes: Range
    """Disk for OUTPUT/work at its fullest: downloads, and a part per video."""
    causes: dict[str, int] = field(default_factory=dict)
    """Sampled videos that cannot be had, by cause."""
    num_sizes_assumed: int = 0


def read_sample(videos: Iterable[Video], size: int) -> Listing:
    """Read a list once: count it, and pick ``size`` usable videos by the hash of their keys."""
    count = 0
    rejected: Counter[str] = Counter()
    chosen: list[tuple[int, str, Video]] = []  # a heap with the largest hash first
    for video in videos:
        count += 1
        if not video.live:
            rejected[video.cause] += 1
            continue
        rank = -int.from_bytes(hashlib.sha256(f"plan {video.key}".encode()).digest()[:8])
        if len(chosen) < size:
            heapq.heappush(chosen, (rank, video.key, video))
        elif rank > chosen[0][0]:
            heapq.heapreplace(chosen, (rank, video.key, video))
    sample = tuple(video for _, _, video in sorted(chosen, key=lambda item: item[1]))
    return Listing(num_videos=count, rejected=dict(rejected), sample=sample)


def span_seconds(span: Span, seconds: float) -> float:
    """How much of a video of ``seconds`` (0: unknown) a span uses."""
    start = span.times[0] if span.times else span.start
    end = span.times[-1] if span.times else span.end or seconds
    if seconds:
        end = min(end, seconds)
    return max(0.0, end - start)


def ask(video: Video, config: PreprocessConfig) -> Offer:
    """Ask the site about one video, or look at the file that the list names. No video is fetched.

    Of a direct link yt-dlp reads the first 512 bytes, to see that it is one; of a file at a URI only its size is asked.
    """
    with tempfile.TemporaryDirectory(prefix="headray-plan-") as folder:
        try:
            if video.path and not storage.is_local(video.path):
                told = {"filesize": storage.size(video.path)}
            elif video.path:
                size = storage.size(video.path)
                request = download.make_request(config.download, path=video.path)
                answer = download.run_child(request, Path(folder))
                told = answer["probe"] | {"filesize": size}
            else:
                request = download.make_request(config.download, url=video.url, metadata_only=True)
                told = download.run_child(request, Path(folder))["source"]
        except RefusedError as refused:
            return Offer(key=video.key, cause=refused.cause.value)
        except FileNotFoundError:
            return Offer(key=video.key, cause=Cause.DOWNLOAD_NOT_FOUND.value)
    return describe_offer(video, told, config)


def describe_offer(video: Video, told: Mapping[str, float], config: PreprocessConfig) -> Offer:
    """What follows from what a site told of a video: ``duration``, ``filesize``, ``tbr``, ``fps``, ``height``."""
    seconds = float(told.get("duration") or 0.0)
    used = [span_seconds(span, seconds) for span in video.spans]
    rate = config.tracks.frames_per_second or float(told.get("fps") or 25.0)
    most = config.tracks.max_frames_per_track if config.tracks.frames_per_second else math.inf
    frames = sum(min(length * rate, most) for length in used)
    known = float(told.get("filesize") or 0.0)
    bits = 1000 * float(told.get("tbr") or 0.0)
    ends = [span.times[-1] if span.times else span.end for span in video.spans]
    length = seconds or max(ends, default=0.0)
    return Offer(
        key=video.key,
        seconds=seconds,
        size_bytes=known or (bits or ASSUMED_BITS_PER_SECOND) * length / 8,
        is_size_assumed=not known and not bits,
        height=int(told.get("height") or 0),
        used_seconds=sum(used),
        frames=int(min(frames, config.tracks.max_frames_per_video)),
    )


def share(yes: int, asked: int) -> Range:
    """Wilson's 95 % interval of a share, from ``yes`` of ``asked``; of none anything from 0 to 1."""
    if not asked:
        return Range(expected=0.5, low=0.0, high=1.0)
    p, z2 = yes / asked, Z95**2
    centre = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z95 * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2)) / (1 + z2 / asked)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Range(expected=p, low=min(low, p), high=max(high, p))


def predict(listing: Listing, offers: Sequence[Offer], config: PreprocessConfig) -> Forecast:
    """Scale the sample up to the list. Answers that may pass (a rate limit, a lost connection) say nothing."""
    passing = {cause.value for cause in TRANSIENT}
    answered = [offer for offer in offers if offer.cause not in passing]
    had = [offer for offer in answered if not offer.cause]
    survivors = share(len(had), len(answered)).times(listing.num_usable)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(had) if had else 0.0

    pupils = COSTS.cpu_per_pupils if config.annotate.pupils == "iris" else 0.0

    def cpu(offer: Offer) -> float:
        size = ((offer.height or config.download.max_height) / 1080) ** 2
        decoding = COSTS.cpu_per_video_second * size * offer.used_seconds
        return COSTS.cpu_per_video + decoding + (COSTS.cpu_per_frame + pupils) * offer.frames

    size = COSTS.bytes_per_frame * (config.crops.size / 512) ** 2
    fetched = survivors.times(mean(offer.size_bytes for offer in had))
    frames = survivors.times(mean(offer.frames for offer in had))
    dataset = frames.times(size)
    is_fetched = any(not video.path for video in listing.sample)
    return Forecast(
        num_videos=listing.num_videos,
        num_usable=listing.num_usable,
        num_asked=len(answered),
        survivors=survivors,
        download_bytes=fetched.times(float(is_fetched)),
        frames=frames,
        dataset_bytes=dataset,
        address_hours=listing.num_usable / VIDEOS_PER_HOUR if is_fetched else 0.0,
        cpu_hours=survivors.times(mean(map(cpu, had)) / 3600),
        work_bytes=Range(
            expected=fetched.expected * is_fetched + dataset.expected,
            low=fetched.low * is_fetched + dataset.low,
            high=fetched.high * is_fetched + dataset.high,
        ),
        causes=dict(Counter(offer.cause for offer in offers if offer.cause)),
        num_sizes_assumed=sum(offer.is_size_assumed for offer in had),
    )


def plan(videos: Iterable[Video], config: PreprocessConfig) -> Forecast:
    """Sample a list, ask, and scale up."""
    listing = read_sample(videos, config.plan_videos)
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        offers = list(pool.map(lambda video: ask(video, config), listing.sample))
    return predict(listing, offers, config)
