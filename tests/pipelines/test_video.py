"""Every frame of these clips carries its index in its pixels, so time and order are checked against pictures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import psutil
import pytest

from pipelines import video
from pipelines.schema import Cause
from pipelines.video import (
    Decoder,
    DecoderConfig,
    Frame,
    VideoError,
    VideoInfo,
    decodes_at_end,
    encode_part,
    frame_times,
    join,
    nearest,
    probe,
    thumb_size,
)
from tests import clips
from tests.clips import encode, index_picture, indexed, read_index
from tests.material import REPOSITORY, SHARED, needs_shared

VARIABLE = np.cumsum(np.random.default_rng(7).choice([0.02, 0.0334, 0.04, 0.1], 60)).tolist()
GROUPS = {"x264-params": "keyint=20:bframes=3:scenecut=0", "preset": "medium"}
OPEN_GROUPS = {"x264-params": "keyint=20:bframes=3:scenecut=0:open-gop=1", "preset": "medium"}

Clip = Callable[..., Path]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """``clip(name, ...)``: the path of a clip, encoded once per module. 60 indexed frames if not told otherwise."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name: str, pictures: Any = None, **options: Any) -> Path:
        path = folder / name
        if not path.exists():
            encode(path, pictures if pictures is not None else indexed(60), **options)
        return path

    return make


@pytest.fixture(scope="module", params=["decord", "pyav"])
def forced(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    """A decoder that may use only one of the two."""
    with Decoder(DecoderConfig(decoders=(request.param,))) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


@pytest.fixture(scope="module")
def reference() -> Iterator[Decoder]:
    with Decoder(DecoderConfig(decoders=("pyav",))) as decoder:
        yield decoder


def read(decoder: Decoder, path: Path, *ranges: tuple[int, int], **options: Any) -> list[Frame]:
    found = probe(path)
    options.setdefault("thumbs", True)
    return list(decoder.read(path, found, ranges=ranges or [(0, found.frames)], **options))


# Time


@pytest.mark.parametrize("rate", [*clips.RATES, "variable"], ids=lambda rate: str(rate))
def test_frame_nearest_to_an_annotation_carries_the_expected_index(
    clip: Clip, forced: Decoder, rate: Fraction | str
) -> None:
    if isinstance(rate, str):
        path = clip("variable.mp4", times=VARIABLE)
        truth = np.array(VARIABLE) - VARIABLE[0]
    else:
        path = clip(f"{float(rate):.3f}.mp4", fps=rate)
        truth = np.arange(60) / float(rate)
    annotated = np.arange(0, int(truth[-1] * 25) + 1) / 25
    expected = [int(np.abs(truth - second).argmin()) for second in annotated]

    indices = nearest(frame_times(path), annotated)
    shown = {
        frame.index: frame
        for frame in read(forced, path, images=set(indices.tolist()), thumbs=False)
    }

    assert [read_index(shown[index].image) for index in indices.tolist()] == expected
    assert max(abs(shown[i].time - truth[i]) for i in shown) < 2e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groups.mp4", {"options": GROUPS}),
        ("variable.webm", {"times": VARIABLE, "codec": "libvpx-vp9"}),
        ("late.mp4", {"start": 1.5, "fps": clips.NTSC}),
        ("late.mkv", {"start": 1.5, "options": GROUPS}),
        ("late_with_sound.mp4", {"start": 1.5, "audio_seconds": 4.0}),
        ("late_with_sound.webm", {"start": 1.5, "audio_seconds": 4.0, "codec": "libvpx-vp9"}),
        ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("hevc.mp4", {"codec": "libx265"}),
        ("vp8.webm", {"codec": "libvpx"}),
        ("mpeg4.mp4", {"codec": "mpeg4"}),
    ],
)
def test_both_decoders_agree_on_index_time_and_picture(
    clip: Clip, forced: Decoder, name: str, options: dict[str, Any]
) -> None:
    path = clip(name, **options)
    frames = read(forced, path)
    assert [frame.index for frame in frames] == [read_index(frame.thumb) for frame in frames]
    assert [frame.time for frame in frames] == frame_times(path).tolist()
    assert len(frames) == 60


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [
        ("late.mp4", {"start": 1.5, "fps": clips.NTSC}, 0.0),
        ("late.mkv", {"start": 1.5, "options": GROUPS}, 0.0),
        ("late_with_sound.mp4", {"start": 1.5, "audio_seconds": 4.0}, 1.5),
        ("late_with_sound.webm", {"start": 1.5, "audio_seconds": 4.0, "codec": "libvpx-vp9"}, 1.5),
    ],
)
def test_times_count_from_the_start_of_the_container(
    clip: Clip, name: str, options: dict[str, Any], first: float
) -> None:
    path = clip(name, **options)
    found = probe(path)
    rate = float(options.get("fps", 25))
    np.testing.assert_allclose(frame_times(path), first + np.arange(60) / rate, atol=2e-5)
    assert found.start_seconds == pytest.approx(1.5 - first)
    assert found.duration == pytest.approx(first + 60 / rate, abs=1e-3)
    assert found.fps == pytest.approx(rate, abs=1e-3)


def test_frames_hidden_by_an_edit_list_do_not_count(clip: Clip, decoder: Decoder) -> None:
    whole = clip("groups120.mp4", indexed(120), options=GROUPS)
    cut = clips.stream_copy(whole, whole.parent / "cut.mp4", ["-ss", "1.3"])
    frames = read(decoder, cut)
    assert decoder.used == "pyav"  # decord shows the right pictures under the wrong times
    assert [read_index(frame.thumb) for frame in frames] == list(range(33, 120))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(87) / 25, atol=1e-3)


def test_start_of_a_file_cut_from_an_open_group_is_skipped(clip: Clip, decoder: Decoder) -> None:
    """Its first pictures refer to a group that is gone; ffmpeg drops them, so they have no index."""
    whole = clip("open120.mkv", indexed(120), options=OPEN_GROUPS)
    headless = clips.stream_copy(whole, whole.parent / "headless.mkv", ["-ss", "2.0", "-copyts"])
    frames = read(decoder, headless)
    assert [read_index(frame.thumb) for frame in frames][-1] == 119
    firsts = [read_index(frame.thumb) for frame in frames]
    assert firsts == list(range(firsts[0], 120))


def test_transport_stream_keeps_its_first_group(clip: Clip, decoder: Decoder) -> None:
    path = clip("stream.ts", options=GROUPS)
    frames = read(decoder, path, (0, 3), (45, 50))
    assert [read_index(frame.thumb) for frame in frames] == [0, 1, 2, 45, 46, 47, 48, 49]
    assert decoder.used == "pyav"  # decord starts at the second group and calls it 0


def test_nearest_takes_the_earlier_of_two_and_stays_inside() -> None:
    times = np.array([0.0, 1.0, 3.0])
    assert nearest(times, [-5, 0.5, 0.51, 2.0, 2.1, 99]).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest(np.array([4.0]), [0.0, 9.0]).tolist() == [0, 0]
    random = np.random.default_rng(0)
    times = np.sort(random.random(50))
    seconds = random.random(200) * 1.2 - 0.1
    reference = np.abs(times[:, None] - seconds).argmin(axis=0)
    assert nearest(times, seconds).tolist() == reference.tolist()


# Reading parts


@pytest.mark.parametrize("name", ["groups120.mp4", "open120.mp4", "groups120.webm", "mpeg4.mp4"])
def test_seeking_finds_the_asked_frames(clip: Clip, decoder: Decoder, name: str) -> None:
    """Many short jumps over key frames, with and without pictures between."""
    if name.endswith("webm"):
        path = clip(name, indexed(120), codec="libvpx-vp9", options={"g": "25"})
    elif name == "mpeg4.mp4":
        path = clip(name, codec="mpeg4")
    else:
        options = OPEN_GROUPS if "open" in name else GROUPS
        path = clip(name, indexed(120), options=options)
    found = probe(path)
    random = np.random.default_rng(3)
    for _ in range(6):
        starts = np.sort(random.integers(0, found.frames - 5, 3)).tolist()
        ranges = [(start, start + int(random.integers(1, 6))) for start in starts]
        inside = sorted({index for first, last in ranges for index in range(first, last)})
        images = set(random.choice(inside, 2).tolist())

        frames = list(decoder.read(path, found, ranges=ranges, images=images, thumbs=True))
        assert [frame.index for frame in frames] == inside
        assert [read_index(frame.thumb) for frame in frames] == inside
        assert {frame.index for frame in frames if frame.image is not None} == images
        assert all(read_index(f.image) == f.index for f in frames if f.image is not None)

        alone = list(decoder.read(path, found, ranges=ranges, images=images))
        assert [frame.index for frame in alone] == sorted(images)
        assert [read_index(frame.image) for frame in alone] == sorted(images)
        assert all(frame.thumb is None for frame in alone)
    assert decoder.used == ("pyav" if "open" in name else "decord")


def test_thumb_is_the_area_average_of_the_image(clip: Clip, forced: Decoder) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (45, 80, 3), np.uint8)
    path = clip("noise.mp4", [np.kron(noise, np.ones((16, 16, 1), np.uint8))] * 3)
    found = probe(path)
    for frame in read(forced, path, images={0, 1, 2}):
        assert frame.image is not None
        assert frame.image.shape == (720, 1280, 3)
        assert frame.thumb is not None
        assert frame.thumb.shape == (144, 256, 3)
        reference = cv2.resize(frame.image, thumb_size(found), interpolation=cv2.INTER_AREA)
        assert np.abs(frame.thumb.astype(int) - reference).mean() < 0.3


def test_small_videos_are_not_enlarged_for_their_thumbs(clip: Clip, decoder: Decoder) -> None:
    assert read(decoder, clip("25.000.mp4"), (0, 1))[0].thumb.shape == (120, 160, 3)


def test_ranges_and_images_must_exist(clip: Clip, decoder: Decoder) -> None:
    path = clip("25.000.mp4")
    found = probe(path)
    for ranges in ([(0, 61)], [(5, 5)], [(-1, 3)]):
        with pytest.raises(ValueError, match="video with 60 frames"):
            list(decoder.read(path, found, ranges=ranges, thumbs=True))
    with pytest.raises(ValueError, match=r"images \[7\] are outside"):
        list(decoder.read(path, found, ranges=[(0, 5)], images={3, 7}))
    assert list(decoder.read(path, found, ranges=[(0, 5)])) == []


# Picture


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_rotation_flag_is_obeyed(
    clip: Clip, decoder: Decoder, container: str, rotation: int
) -> None:
    path = clip(f"turned{rotation}.{container}", rotation=rotation)
    found = probe(path)
    assert (found.rotation, found.width, found.height) == (rotation, 160, 120)
    stored = (160, 120) if rotation == 180 else (120, 160)
    assert (found.coded_width, found.coded_height) == stored
    frames = read(decoder, path, (20, 24), images={21})
    assert [read_index(frame.thumb) for frame in frames] == [20, 21, 22, 23]
    assert frames[1].image is not None
    assert frames[1].image.shape == (120, 160, 3)


@pytest.mark.parametrize("sample_aspect", [Fraction(4, 3), Fraction(1, 2)])
def test_pixels_become_square(clip: Clip, forced: Decoder, sample_aspect: Fraction) -> None:
    path = clip(f"sar{sample_aspect.denominator}.mp4", sample_aspect=sample_aspect)
    found = probe(path)
    assert (found.width, found.height) == (160, 120)
    assert (found.coded_width, found.coded_height) in [(120, 120), (160, 60)]
    frame = read(forced, path, (9, 10), images={9})[0]
    assert frame.image is not None
    assert frame.image.shape == (120, 160, 3)
    assert read_index(frame.image) == read_index(frame.thumb) == 9


def test_rotation_and_aspect_together(clip: Clip, decoder: Decoder) -> None:
    path = clip("both.mp4", rotation=90, sample_aspect=Fraction(4, 3))
    found = probe(path)
    assert (found.width, found.height) == (160, 120)
    assert (found.coded_width, found.coded_height) == (90, 160)
    assert read_index(read(decoder, path, (9, 10), images={9})[0].image) == 9


PATCHES = np.array(
    [
        [224, 172, 105],
        [141, 85, 36],
        [255, 219, 172],
        [60, 140, 220],
        [200, 40, 60],
        [128, 128, 128],
    ],
    np.uint8,
)
"""Three tones of skin, blue, red, grey."""


def patches(width: int, height: int) -> np.ndarray:
    return np.ascontiguousarray(
        np.broadcast_to(np.repeat(PATCHES, width // 6, axis=0), (height, width // 6 * 6, 3))
    )


def patch_errors(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    middles = image[height // 2, width // 12 :: width // 6].astype(int)
    return np.abs(middles - PATCHES)


@pytest.mark.parametrize(
    ("name", "colour", "size", "used"),
    [
        ("bt709", clips.BT709, (384, 240), "decord"),
        ("bt601", clips.BT601, (384, 240), "decord"),
        ("full", clips.FULL_709, (384, 240), "decord"),
        ("untagged", clips.UNTAGGED_601, (384, 240), "decord"),
        ("bt709_large", clips.BT709, (1284, 720), "decord"),
        ("bt601_large", clips.BT601, (1284, 720), "decord"),
        ("untagged_large", clips.UNTAGGED_709, (1284, 720), "pyav"),
    ],
)
def test_colours_come_back(
    clip: Clip,
    decoder: Decoder,
    reference: Decoder,
    name: str,
    colour: clips.Colour,
    size: tuple[int, int],
    used: str,
) -> None:
    path = clip(f"{name}.mp4", [patches(*size)] * 2, colour=colour, options={"crf": "4"})
    images = [frame.image for frame in read(decoder, path, images={0, 1}, thumbs=False)]
    assert decoder.used == used
    others = [frame.image for frame in read(reference, path, images={0, 1}, thumbs=False)]
    for image, other in zip(images, others, strict=True):
        assert patch_errors(image).max() <= 4  # the wrong matrix is 20 off
        np.testing.assert_array_equal(image, other)


def test_colour_check_can_fail(clip: Clip, decoder: Decoder) -> None:
    lie = replace(clips.BT709, matrix="ITU601")
    path = clip("lie.mp4", [patches(384, 240)], colour=lie, options={"crf": "4"})
    image = read(decoder, path, images={0}, thumbs=False)[0].image
    assert patch_errors(image).max() > 12


# Codecs


@pytest.mark.parametrize(
    ("name", "codec", "used"),
    [
        ("av1.mp4", "libsvtav1", "pyav"),
        ("vp9.webm", "libvpx-vp9", "decord"),
    ],
)
def test_1080p_of_modern_codecs(
    clip: Clip, decoder: Decoder, name: str, codec: str, used: str
) -> None:
    path = clip(name, indexed(10, (1920, 1080)), codec=codec)
    found = probe(path)
    assert (found.width, found.height, found.frames) == (1920, 1080, 10)
    frames = read(decoder, path, images={7})
    assert [read_index(frame.thumb) for frame in frames] == list(range(10))
    assert read_index(frames[7].image) == 7
    assert decoder.used == used


def test_av1_in_webm(clip: Clip, decoder: Decoder) -> None:
    frames = read(decoder, clip("small_av1.webm", indexed(30), codec="libsvtav1"))
    assert [read_index(frame.thumb) for frame in frames] == list(range(30))


def test_ten_bit_goes_to_pyav(clip: Clip, decoder: Decoder) -> None:
    path = clip("ten.mp4", pixel_format="yuv420p10le")
    assert [read_index(frame.thumb) for frame in read(decoder, path, (0, 5))] == [0, 1, 2, 3, 4]
    assert decoder.used == "pyav"


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("pq.mp4", {"colour": clips.PQ}, Cause.VIDEO_HDR),
        ("hlg.mp4", {"colour": clips.HLG}, Cause.VIDEO_HDR),
        ("wide.mp4", {"colour": replace(clips.PQ, transfer_tag=14)}, Cause.VIDEO_HDR),
        # by its curve alone
        ("pq709.mp4", {"colour": replace(clips.BT709, transfer_tag=16)}, Cause.VIDEO_HDR),
        ("hlg709.mp4", {"colour": replace(clips.BT709, transfer_tag=18)}, Cause.VIDEO_HDR),
    ],
)
def test_hdr_is_refused(clip: Clip, name: str, options: dict[str, Any], cause: Cause) -> None:
    path = clip(name, indexed(3), codec="libx265", pixel_format="yuv420p10le", **options)
    with pytest.raises(VideoError) as refusal:
        probe(path)
    assert refusal.value.cause == cause


@pytest.mark.slow
def test_decord_is_not_believed_when_its_times_are_not_the_packets(clip: Clip) -> None:
    """In a process of its own, since decord must not come before PyAV's encoders. One packet is said to be half a frame later."""
    program = """
import sys
from dataclasses import replace
from pipelines import video
path = sys.argv[1]
info, packets = video.probe(path), video._read_packets(path)
assert next(video._decord_pictures(path, info, packets, [0]))[0] == 0
times = packets.times.copy()
times[7] += 0.5 * (times[1] - times[0])
try:
    next(video._decord_pictures(path, info, replace(packets, times=times), [0]))
except video._DecordError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(clip("25.000.mp4"))]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "times differ by up to 0.02" in told.stdout, told.stderr


def test_a_packet_that_becomes_no_picture_is_not_given_the_next_one(clip: Clip) -> None:
    path = str(clip("25.000.mp4"))
    info, packets = probe(path), video._read_packets(path)
    pts = np.insert(packets.pts, 7, packets.pts[6] + 1)
    more = replace(packets, pts=pts, times=np.insert(packets.times, 7, packets.times[6] + 0.01))
    found = video._pyav_pictures(path, info, more, [6, 7])
    step = next(found)
    assert step
    assert (step[0], read_index(step[1])) == (6, 6)
    with pytest.raises(VideoError, match=r"frame 7 at .* does not decode"):
        next(found)


def test_a_joined_video_shows_its_last_picture_as_long_as_the_one_before(tmp_path: Path) -> None:
    """Or a player ends with it, and the sound's last moments are lost."""
    part = tmp_path / "part.mp4"
    assert encode_part(part, indexed(3), Fraction(10), "h264") == 3
    joined = tmp_path / "joined.mp4"
    join(joined, [part], [0.0, 0.1, 0.4])
    assert frame_times(joined).tolist() == pytest.approx([0.0, 0.1, 0.4])
    with av.open(str(joined)) as file:
        assert file.duration / av.time_base == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize(
    "audio_codec", ["aac", "libopus"]
)  # one is copied into an mp4, the other encoded again
def test_sound_of_a_file_that_starts_later_stays_beside_its_pictures(
    clip: Clip, tmp_path: Path, audio_codec: str
) -> None:
    """Recordings of broadcasts count from some hour of the day. Pictures are counted from the container's start, so must be sound."""
    later = tmp_path / "later.mkv"
    name, codec = (
        ("opus.webm", "libvpx-vp9") if audio_codec == "libopus" else ("aac.mp4", "libx264")
    )
    with (
        av.open(str(clip(name, indexed(20), codec=codec, audio_seconds=0.8))) as source,
        av.open(str(later), "w") as made,
    ):
        streams = {stream.index: made.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                shift = round(1.5 / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream_index]
                made.mux(packet)
    times = frame_times(later).tolist()
    assert times[0] < 0.1
    part, joined = tmp_path / "part.mp4", tmp_path / "joined.mp4"
    encode_part(part, indexed(20), Fraction(25), "h264")
    join(joined, [part], times, sound=later)
    with av.open(str(joined)) as file:
        packets = [packet for packet in file.demux(audio=0) if packet.pts is not None]
        assert float(packets[0].pts * packets[0].time_base) == pytest.approx(0, abs=0.1)
        assert float(packets[-1].pts * packets[-1].time_base) == pytest.approx(0.8, abs=0.15)


def test_interlaced_is_refused(clip: Clip) -> None:
    path = clip("interlaced.mp4", indexed(3), options={"x264-params": "interlaced=1"})
    with pytest.raises(VideoError, match="interlaced: h264 160x120"):
        probe(path)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    for name in ("sound.m4a", "sound.mp4", "sound.webm"):
        with pytest.raises(VideoError) as refusal:
            probe(clips.encode_audio(tmp_path / name))
        assert refusal.value.cause == Cause.VIDEO_NO_STREAM


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 5000,
        b"<!doctype html><html><body>Sign in to confirm you're not a bot</body></html>" * 30,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n25.000.mp4\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile 25.000.mp4\n",
        cv2.imencode(".png", index_picture(1))[1].tobytes(),
    ],
    ids=["empty", "zeros", "html", "playlist", "concat", "picture"],
)
def test_hostile_files_are_unreadable(clip: Clip, content: bytes) -> None:
    path = clip("25.000.mp4").parent / "hostile.mp4"  # beside the clip that the playlists name
    path.write_bytes(content)
    for function in (probe, frame_times):
        with pytest.raises(VideoError) as refusal:
            function(path)
        assert refusal.value.cause == Cause.VIDEO_UNREADABLE
        assert "\n" not in refusal.value.detail


def test_other_unreadable_files(clip: Clip, tmp_path: Path) -> None:
    headless = clips.truncate(
        clip("25.000.mp4"), tmp_path / "headless.mp4", 0.5
    )  # index at the end
    mirrored = tmp_path / "mirrored.mp4"
    with av.open(str(mirrored), "w") as container:
        stream: Any = container.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(index_picture(0), format="rgb24")))
        container.mux(stream.encode())
    broad = encode(tmp_path / "broad.mp4", [np.zeros((16, 8256, 3), np.uint8)])
    reordered = encode(tmp_path / "reordered.avi", indexed(10), options=GROUPS)
    for path in (headless, mirrored, broad, reordered, tmp_path, tmp_path / "absent.mp4"):
        with pytest.raises(VideoError) as refusal:
            probe(path)
        assert refusal.value.cause == Cause.VIDEO_UNREADABLE, path


def test_a_frame_that_does_not_decode_is_an_error_not_another_frame(
    clip: Clip, decoder: Decoder, tmp_path: Path
) -> None:
    whole = clip("vp9.mp4", indexed(120), codec="libvpx-vp9", options={"g": "25"})
    with av.open(str(whole)) as container:
        victim = [packet for packet in container.demux(video=0) if packet.size][60]
        first, last = victim.pos, victim.pos + victim.size
    content = bytearray(whole.read_bytes())
    content[first:last] = b"\xff" * (last - first)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    given: list[Frame] = []
    with pytest.raises(VideoError) as refusal:
        given.extend(decoder.read(broken, probe(broken), ranges=[(0, 120)], thumbs=True))
    assert refusal.value.cause == Cause.VIDEO_UNREADABLE
    frames = decoder.read(broken, probe(broken), ranges=[(40, 60), (100, 120)], thumbs=True)
    assert [read_index(frame.thumb) for frame in frames] == [*range(40, 60), *range(100, 120)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("start.mp4", {"container_options": {"movflags": "faststart"}}),
        pytest.param(
            "start.webm", {"codec": "libvpx-vp9", "audio_seconds": 4.0}, marks=pytest.mark.slow
        ),
        pytest.param(
            "long_sound.mp4",
            {"audio_seconds": 7.0, "container_options": {"movflags": "faststart"}},
            marks=pytest.mark.slow,
        ),
        pytest.param("late.mkv", {"start": 1.5, "options": GROUPS}, marks=pytest.mark.slow),
    ],
)
def test_truncated_downloads_are_noticed(
    clip: Clip, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    whole = clip(name, **({"pictures": indexed(100)} | options if "late" not in name else options))
    assert decodes_at_end(whole, probe(whole))
    for fraction in (0.35, 0.6, 0.8):
        cut = clips.truncate(whole, tmp_path / f"{fraction}-{name}", fraction)
        try:
            found = probe(cut)
        except VideoError:
            continue
        assert not decodes_at_end(cut, found), fraction


def test_a_file_that_changed_since_its_probe_is_an_error(clip: Clip, decoder: Decoder) -> None:
    found = replace(probe(clip("25.000.mp4")), frames=59)
    with pytest.raises(VideoError, match="60 frames, 59 when it was probed"):
        list(decoder.read(clip("25.000.mp4"), found, ranges=[(0, 5)], thumbs=True))


# The child


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "pipelines.video" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE
    ]


def new_child(before: list[psutil.Process]) -> psutil.Process:
    (child,) = [process for process in children() if process not in before]
    return child


def zombies() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_child_that_hangs_on_opening_is_killed(clip: Clip, tmp_path: Path) -> None:
    """A named pipe that nobody writes to: opening it blocks for ever, in both decoders."""
    found = probe(clip("25.000.mp4"))
    os.mkfifo(tmp_path / "pipe.mp4")
    with Decoder(DecoderConfig(deadline_seconds=0.3)) as decoder:
        started = time.monotonic()
        with pytest.raises(VideoError) as refusal:
            list(decoder.read(tmp_path / "pipe.mp4", found, ranges=[(0, 5)], thumbs=True))
        assert refusal.value.cause == Cause.VIDEO_DEADLINE
        assert time.monotonic() - started < 30
        assert zombies() == []
        assert len(read(decoder, clip("25.000.mp4"), (0, 5))) == 5  # and it goes on


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGSTOP, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_child_that_freezes_or_dies_between_frames_is_replaced(
    clip: Clip, sign: signal.Signals
) -> None:
    """The first frames come from decord, the rest from PyAV in another child; none is lost or given twice. So many are left when it is
    struck that it cannot be done with them before, on however busy a machine."""
    path = clip("long.mp4", indexed(150, (640, 480)), options=GROUPS)
    before = children()
    with Decoder(DecoderConfig(deadline_seconds=0.5)) as decoder:
        indices, used = [], []
        struck, stop = threading.Event(), threading.Event()

        def torment(child: psutil.Process) -> None:
            while child.is_running() and not stop.wait(0.001):
                try:
                    child.send_signal(sign)
                    struck.set()
                except psutil.NoSuchProcess:
                    return

        first = None
        for frame in decoder.read(path, probe(path), ranges=[(0, 150)], thumbs=True):
            assert read_index(frame.thumb) == frame.index
            indices.append(frame.index)
            used.append(decoder.used)
            if frame.index == 20:
                first = new_child(before)
                tormentor = threading.Thread(target=torment, args=(first,))
                tormentor.start()
                assert struck.wait(60)
        stop.set()
        tormentor.join()
        assert indices == list(range(150))
        assert used[0] == "decord"
        assert used[-1] == "pyav"
        assert new_child(before) != first
        assert zombies() == []


@pytest.mark.slow
def test_the_child_rests_while_the_caller_works(clip: Clip) -> None:
    before = children()
    with Decoder() as decoder:
        path = clip("big.mp4", indexed(60, (640, 480)), options=GROUPS)
        for frame in decoder.read(path, probe(path), ranges=[(0, 60)], thumbs=True):
            if frame.index == 2:
                child = new_child(before)
                time.sleep(0.05)
                spent = child.cpu_times()
                time.sleep(0.2)
                assert child.cpu_times() == spent
                assert child.status() == psutil.STATUS_STOPPED
        assert child.is_running()
    assert not child.is_running()


@pytest.mark.slow
def test_children_are_replaced_after_some_videos_and_leave_nothing(clip: Clip) -> None:
    before = children()
    path = clip("25.000.mp4")
    with Decoder(DecoderConfig(videos_per_child=2)) as decoder:
        seen = []
        for _ in range(4):
            read(decoder, path, (0, 1))
            seen.append(new_child(before).pid)
        assert seen[0] == seen[1] != seen[2] == seen[3]
        for _ in decoder.read(path, probe(path), ranges=[(0, 9)], thumbs=True):
            break  # a read given up half-way
        assert len(read(decoder, path, (0, 9))) == 9
    assert children() == before
    assert zombies() == []


@pytest.mark.slow
def test_an_idle_child_killed_from_outside_costs_nothing(clip: Clip) -> None:
    before = children()
    with Decoder() as decoder:
        read(decoder, clip("25.000.mp4"), (0, 1))
        new_child(before).kill()
        time.sleep(0.1)
        assert len(read(decoder, clip("25.000.mp4"), (0, 2))) == 2
        assert decoder.used == "decord"


def test_a_bug_in_the_child_is_not_blamed_on_the_video(clip: Clip, decoder: Decoder) -> None:
    wrong: VideoInfo = replace(probe(clip("25.000.mp4")), rotation="ninety")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="TypeError"):
        list(decoder.read(clip("25.000.mp4"), wrong, ranges=[(0, 1)], thumbs=True))
    assert len(read(decoder, clip("25.000.mp4"), (0, 2))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a read"])
def test_the_child_ends_when_its_parent_is_killed(clip: Clip, busy: bool) -> None:
    program = f"""
import sys, time
from pathlib import Path
from pipelines.video import Decoder, probe
path = Path(sys.argv[1])
decoder = Decoder()
frames = decoder.read(path, probe(path), ranges=[(0, 9)], thumbs=True)
{"next(frames)" if busy else "list(frames)"}
print(decoder._child.process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(clip("25.000.mp4"))],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=120)


# The clips themselves


def test_moving_puts_a_point_where_its_matrix_says(tmp_path: Path, decoder: Decoder) -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[40:44, 60:64] = 255  # centre (62, 42)
    matrices = [
        np.array([[1.5, 0.0, 10.0 + i], [0.0, 1.5, 5.0]]) @ np.diag([1, 1, 1]) for i in range(3)
    ]
    path = encode(
        tmp_path / "moving.mp4", clips.moving(picture, matrices, (320, 240)), options={"crf": "2"}
    )
    for frame in read(decoder, path, images={0, 1, 2}):
        weights = frame.image[:150, :, 1].astype(float)
        weights[weights < 120] = 0
        ys, xs = np.mgrid[0:150, 0:320] + 0.5
        centre = np.array([(xs * weights).sum(), (ys * weights).sum()]) / weights.sum()
        expected = matrices[frame.index] @ [62, 42, 1]
        np.testing.assert_allclose(centre, expected, atol=0.1)


@pytest.mark.parametrize(("rate", "low", "high"), [(25, 0.0, 0.0), (30, 0.04, 0.07)])
def test_the_annotators_copy_lags(
    clip: Clip, decoder: Decoder, rate: int, low: float, high: float
) -> None:
    """``-r 25`` shows at frame k a picture from before k / 25 unless the source has 25 fps."""
    source = clip(f"annotated{rate}.mp4", indexed(90), fps=rate)
    copy = clips.as_annotators_saw_it(source, source.parent / f"annotators{rate}.mp4")
    shown = [read_index(frame.thumb) / rate for frame in read(decoder, copy, (10, 60))]
    lag = float(np.mean(np.arange(10, 60) / 25 - shown))
    assert low <= lag <= high


# Real clips


@needs_shared
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "size", "num_frames", "used"),
    [
        ("kitchen_a.mp4", (1080, 1920), 250, "decord"),
        ("phone_a.mp4", (720, 1280), 352, "decord"),
        ("aoc_a.mp4", (512, 512), 200, "decord"),
        ("shotcut.mp4", (640, 360), 197, "decord"),
        ("m003_a.mp4", (1920, 1080), 118, "pyav"),  # says nothing about its colours
    ],
)
def test_real_clips(
    decoder: Decoder,
    reference: Decoder,
    name: str,
    size: tuple[int, int],
    num_frames: int,
    used: str,
) -> None:
    path = SHARED / "videos" / name
    found = probe(path)
    assert (found.width, found.height, found.frames) == (*size, num_frames)
    assert decodes_at_end(path, found)
    parts = [(num_frames // 3, num_frames // 3 + 4), (num_frames - 4, num_frames)]
    images = {first for first, _ in parts} | {num_frames - 1}
    frames, others = (read(one, path, *parts, images=images) for one in (decoder, reference))
    assert decoder.used == used
    for ours, theirs in zip(frames, others, strict=True):
        assert (ours.index, ours.time) == (theirs.index, theirs.time)
        np.testing.assert_array_equal(ours.thumb, theirs.thumb)
        if ours.image is not None:
            np.testing.assert_array_equal(ours.image, theirs.image)


@needs_shared
@pytest.mark.real
def test_memory_does_not_grow_while_the_caller_works() -> None:
    """Left running, decord reads ahead: more than 500 MB in these two seconds."""
    path = SHARED / "videos" / "kitchen_a.mp4"
    before = children()
    with Decoder(DecoderConfig(decoders=("decord",))) as decoder:
        frames = decoder.read(path, probe(path), ranges=[(0, 250)], thumbs=True)
        next(frames)
        child = new_child(before)
        held = child.memory_info().rss
        time.sleep(2.0)
        grown = child.memory_info().rss - held
        frames.close()
    assert grown < 20 << 20
