"""The forecast: which videos are asked about, that nothing is fetched, and that the arithmetic is right."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from pipelines import forecast
from pipelines.annotate import AnnotateConfig
from pipelines.download import DownloadConfig
from pipelines.forecast import Listing, Offer
from pipelines.preprocess import PreprocessConfig
from pipelines.schema import Cause, Span, Video, reject
from pipelines.tracks import TracksConfig
from tests import clips
from tests.runs import empty_store, run_job
from tests.site import Page, VideoSite, status

ANNOTATED = Span(name="00001", times=(2.0, 12.0), boxes=((0, 0, 1, 1), (0, 0, 1, 1)))


def videos(count: int) -> list[Video]:
    return [
        Video(identity="a", video=f"v{i}", url=f"http://x/{i}", spans=(ANNOTATED,))
        for i in range(count)
    ]


def config(**fields: object) -> PreprocessConfig:
    return PreprocessConfig(input="list", output="out", **fields)  # type: ignore[arg-type]


def test_sample_depends_on_the_list_alone() -> None:
    listed = videos(200)
    listed[3] = reject(listed[3], Cause.LIST_BOXES, "row 3")
    first = forecast.read_sample(listed, 20)
    random.Random(1).shuffle(listed)
    again = forecast.read_sample(listed, 20)
    assert first == again
    assert (first.num_videos, first.num_usable) == (200, 199)
    assert first.rejected == {"list: boxes": 1}
    assert len(first.sample) == 20
    assert all(video.live for video in first.sample)
    larger = forecast.read_sample(listed, 30).sample
    assert {video.key for video in first.sample} < {video.key for video in larger}
    assert forecast.read_sample(videos(3), 20).sample == tuple(videos(3))


@pytest.mark.parametrize(("yes", "asked"), [(0, 20), (4, 20), (20, 20), (13, 31)])
def test_share_is_wilsons(yes: int, asked: int) -> None:
    told = forecast.share(yes, asked)
    assert told.expected == yes / asked
    assert told.low < told.high
    for end in (
        told.low,
        told.high,
    ):  # each lies as many of its own deviations off as the normal has at 95 %
        deviation = math.sqrt(end * (1 - end) / asked)
        assert abs(end - told.expected) == pytest.approx(1.96 * deviation, abs=1e-9)


def test_nobody_answered() -> None:
    told = forecast.share(0, 0)
    assert (told.low, told.high) == (0, 1)


def test_prediction_by_hand() -> None:
    sample = tuple(videos(4))
    listing = Listing(num_videos=1200, rejected={"list: boxes": 200}, sample=sample)
    good = {"size_bytes": 3e6, "frames": 50, "used_seconds": 10.0, "height": 1080}
    offers = [
        Offer(key="1", **good),
        Offer(key="2", cause="download: private"),
        Offer(key="3", cause="download: rate limited"),  # says nothing about the video
        Offer(key="4", **good | {"frames": 30, "is_size_assumed": True}),
    ]
    told = forecast.predict(listing, offers, config())
    assert told.num_asked == 3
    assert told.survivors.expected == pytest.approx(1000 * 2 / 3)
    assert told.survivors.low < 500 < 800 < told.survivors.high
    assert told.download_bytes.expected == pytest.approx(2000 / 3 * 3e6)
    assert told.frames.expected == pytest.approx(2000 / 3 * 40)
    per_frame = forecast.COSTS.bytes_per_frame
    assert told.dataset_bytes.expected == pytest.approx(2000 / 3 * 40 * per_frame)
    for end in ("expected", "low"):
        parts = (getattr(part, end) for part in (told.download_bytes, told.dataset_bytes))
        assert getattr(told.work_bytes, end) == pytest.approx(sum(parts))
    assert told.work_bytes.high == pytest.approx(told.download_bytes.high + told.dataset_bytes.high)
    assert told.address_hours == pytest.approx(1000 / 300)
    costs = forecast.COSTS
    seconds = costs.cpu_per_video + 10 * costs.cpu_per_video_second + 40 * costs.cpu_per_frame
    assert told.cpu_hours.expected == pytest.approx(2000 / 3 * seconds / 3600)
    gaze = forecast.predict(listing, offers, config(annotate=AnnotateConfig(pupils="iris")))
    more = gaze.cpu_hours.expected - told.cpu_hours.expected
    assert more == pytest.approx(2000 / 3 * 40 * costs.cpu_per_pupils / 3600)
    assert told.causes == {"download: private": 1, "download: rate limited": 1}
    assert told.num_sizes_assumed == 1


def test_decoding_costs_by_the_area_of_the_picture() -> None:
    """A picture of half the lines has a quarter of the pixels."""
    listing = Listing(num_videos=100, rejected={}, sample=tuple(videos(1)))

    def hours(height: int, used: float) -> float:
        offer = Offer(key="1", size_bytes=1.0, frames=0, used_seconds=used, height=height)
        return forecast.predict(listing, [offer], config()).cpu_hours.expected

    whole, half = (hours(height, 50.0) - hours(height, 0.0) for height in (1080, 540))
    assert half == pytest.approx(whole / 4)


def test_what_an_offer_means() -> None:
    (video,) = videos(1)
    told = {"duration": 8.0, "tbr": 1000.0, "height": 720}
    offer = forecast.describe_offer(video, told, config())
    assert (offer.used_seconds, offer.frames) == (6.0, 30)  # from 2 s to the video's end
    assert offer.size_bytes == 1_000_000
    assert not offer.is_size_assumed
    # kept at the video's rate no track is thinned, but the video's budget holds for all of them
    native = config(tracks=TracksConfig(frames_per_second=0.0, max_frames_per_video=400))
    for fps, frames in ((30.0, 300), (60.0, 400)):
        told = {"duration": 60.0, "fps": fps}
        assert forecast.describe_offer(video, told, native).frames == frames
    unknown = forecast.describe_offer(video, {}, config())
    assert unknown.is_size_assumed
    assert unknown.frames == 50


@pytest.mark.slow
def test_sites_are_asked_and_nothing_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 5000)
    listed = [
        Video(identity="a", video=name, url="", spans=(ANNOTATED,))
        for name in ("good", "gone", "low")
    ]
    with VideoSite(tmp_path) as site:
        for name, height in (("good", 1080), ("low", 360)):
            told = {
                "@context": "https://schema.org",
                "@type": "VideoObject",
                "name": name,
                "contentUrl": site.url("/clip.mp4"),
                "duration": "PT20S",
                "contentSize": "4000000",
                "height": height,
                "width": height * 16 // 9,
            }
            script = f'<script type="application/ld+json">{json.dumps(told)}</script>'
            page = f"<!doctype html><html><head><title>{name}</title>{script}</head></html>"
            site.pages[f"/{name}"] = Page(body=page.encode(), type="text/html; charset=utf-8")
        site.pages["/gone"] = status(404)
        urls = [Video(**{**vars(video), "url": site.url(f"/{video.video}")}) for video in listed]
        wanted = config(download=DownloadConfig(min_height=720, retries=0))
        told = forecast.plan(urls, wanted)
        assert site.count("/clip.mp4") <= 2  # its first bytes, that it is a video
    assert told.num_asked == 3
    assert told.causes == {"download: not found": 1, "download: low resolution": 1}
    assert told.survivors.expected == pytest.approx(1)
    assert told.download_bytes.expected == pytest.approx(4e6)
    assert told.frames.expected == pytest.approx(50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]


def test_a_local_file_that_is_none(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    for path, cause in (
        (text, "download: not a video"),
        (tmp_path / "no.mp4", "download: not found"),
    ):
        video = Video(identity="a", video="v", path=str(path), spans=(ANNOTATED,))
        assert forecast.ask(video, config()).cause == cause


@pytest.mark.slow
def test_the_job_plans_and_writes_nothing(tmp_path: Path) -> None:
    clips.encode(tmp_path / "clip.mp4", clips.indexed(75))
    table = tmp_path / "list.csv"
    table.write_text(f"identity,path\nanna,{tmp_path}/clip.mp4\nanna,{tmp_path}/none.mp4\n")
    output = tmp_path / "out"
    code, text = run_job(
        "preprocess",
        f"--input={table}",
        f"--output={output}",
        "--download.allow-local",
        "--plan",
        folder=tmp_path,
    )
    assert code == 0, text
    assert not output.exists()
    assert (tmp_path / "mlflow.db").read_bytes() == empty_store()
    survivors = next(line for line in text.splitlines() if "can be fetched" in line)
    assert re.findall(r"[\d.]+", survivors)[:2] == ["1", "0"]
    assert "1 of the sample: download: not found" in text
    assert "CPU-hours" in text
