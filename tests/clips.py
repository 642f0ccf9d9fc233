"""Maker of test videos: every frame carries its own index in its pixels, and everything odd can be asked for.

The index is drawn as 4 x 4 black and white cells that fill the picture (:func:`index_picture`), so it survives
compression, scaling and stretching, and :func:`read_index` reads it from a full image or a thumb alike; its
checksum fails on a turned, mirrored or half-decoded picture. :func:`encode` takes any *displayed* pictures.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""(h, w, 3) RGB."""

FILM, NTSC, NTSC_DOUBLE = Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)
RATES = (FILM, Fraction(25), NTSC, Fraction(30), Fraction(50), Fraction(60))
"""Frames a second that uploads have: 23.976, 25, 29.97, 30, 50, 60."""

FAST: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    "libx265": {"preset": "ultrafast", "crf": "20", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "2M"},
    "libsvtav1": {"preset": "8", "crf": "10", "b": "0", "svtav1-params": "lp=1"},
    "mpeg4": {"qscale": "3"},
}
"""Encoder options that keep tests quick, by encoder; ``encode(options=...)`` adds to them."""


@dataclass(frozen=True, kw_only=True)
class Colour:
    """How a clip is converted from RGB and what its file says about it (numbers of ITU-T H.273)."""

    matrix: str = "ITU709"
    """Matrix really used: ``ITU709`` or ``ITU601``."""
    full_range: bool = False
    """Luma in 0..255 rather than 16..235."""
    matrix_tag: int = 1
    """1 BT.709, 5 and 6 BT.601, 9 BT.2020, 2 unspecified."""
    range_tag: int = 1
    """1 limited, 2 full, 0 unspecified."""
    primaries_tag: int = 1
    transfer_tag: int = 1
    """1 BT.709, 16 PQ (smpte2084), 18 HLG (arib-std-b67), 2 unspecified."""


BT709 = Colour()
BT601 = Colour(matrix="ITU601", matrix_tag=6, primaries_tag=6, transfer_tag=6)
UNTAGGED_709 = Colour(matrix_tag=2, range_tag=0, primaries_tag=2, transfer_tag=2)
UNTAGGED_601 = Colour(matrix="ITU601", matrix_tag=2, range_tag=0, primaries_tag=2, transfer_tag=2)
FULL_709 = Colour(full_range=True, range_tag=2)
PQ = Colour(matrix_tag=9, primaries_tag=9, transfer_tag=16)
HLG = Colour(matrix_tag=9, primaries_tag=9, transfer_tag=18)


def index_picture(index: int, size: tuple[int, int] = (160, 120)) -> Picture:
    """``index`` (0..4095) as a 4 x 4 grid of black and white cells over a picture of ``size`` (width, height)."""
    if not 0 <= index < 4096:
        raise ValueError(f"index {index} is not in 0..4095")
    code = index | _checksum(index) << 12
    cells = np.array([code >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4)
    grid = cv2.resize(cells * 200 + 25, size, interpolation=cv2.INTER_NEAREST)
    return np.repeat(grid[:, :, None], 3, axis=2)


def read_index(picture: Picture) -> int:
    """Inverse of :func:`index_picture` for a decoded frame or thumb of any size; ``ValueError`` when unreadable."""
    height, width = picture.shape[:2]
    ys = [(2 * row + 1) * height // 8 for row in range(4)]
    xs = [(2 * column + 1) * width // 8 for column in range(4)]
    dy, dx = max(1, height // 16), max(1, width // 16)
    means = [picture[y - dy : y + dy, x - dx : x + dx].mean() for y in ys for x in xs]
    code = sum(int(mean > 125) << bit for bit, mean in enumerate(means))
    index = code & 4095
    if code >> 12 != _checksum(index):
        raise ValueError(f"no index in this picture: cells {np.round(means).astype(int).tolist()}")
    return index


def _checksum(index: int) -> int:
    return (5 + 3 * (index & 15) + 7 * (index >> 4 & 15) + 11 * (index >> 8)) % 16


def indexed(count: int, size: tuple[int, int] = (160, 120)) -> Iterator[Picture]:
    """``index_picture`` of 0 .. ``count - 1``."""
    return (index_picture(index, size) for index in range(count))


def moving(picture: Picture, matrices: Iterable[Any], size: tuple[int, int]) -> Iterator[Picture]:
    """A real picture (of a face) moved through the frame.

    Args:
        picture: (h, w, 3) RGB, such as ``skimage.data.astronaut()``.
        matrices: one (2, 3) affine matrix a frame, from pixels of ``picture`` to pixels of the frame, both with
            pixel centres at integer + 0.5.
        size: (width, height) of the frames. What the picture does not cover is grey.
    """
    half = np.array([0.5, 0.5])
    for matrix in matrices:
        moved = np.array(matrix, np.float64)
        moved[:, 2] += moved[:, :2] @ half - half  # OpenCV's pixel centres lie at integers
        yield cv2.warpAffine(
            picture,
            moved,
            size,
            flags=cv2.INTER_AREA if abs(np.linalg.det(moved[:, :2])) < 0.25 else cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(96, 96, 96),
        )


def encode(
    path: Path,
    pictures: Iterable[Picture],
    *,
    fps: float | Fraction = 25,
    times: Sequence[float] | None = None,
    start: float = 0.0,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    colour: Colour = BT709,
    rotation: int = 0,
    sample_aspect: Fraction = Fraction(1),
    audio_seconds: float = 0.0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode displayed pictures to ``path``, whose suffix decides the container, and return it.

    Args:
        path: ``.mp4``, ``.webm``, ``.mkv``, ``.ts``, ``.avi``, ...
        pictures: RGB, as they should be *seen*: already turned and with square pixels.
        fps: constant rate, when ``times`` is not given.
        times: seconds of each picture, increasing, for a variable rate.
        start: seconds added to every presentation time of the video (not of the audio). With ``times`` or
            ``start`` presentation times are rounded to 1/90000 s, otherwise exact.
        codec: encoder name.
        options: encoder options beside :data:`FAST`.
        pixel_format: as ffmpeg calls it.
        colour: conversion and tags.
        rotation: degrees clockwise (0, 90, 180, 270) that a player must turn the stored frames by.
        sample_aspect: width / height of a stored pixel; the stored frames are narrower (or flatter) to match.
        audio_seconds: length of a quiet AAC or Opus track that starts at 0; 0 for none.
        container_options: options of the muxer.
    """
    rate = Fraction(fps).limit_denominator(1001)
    base = Fraction(1, 90000) if times is not None or start else 1 / rate
    stored = (_stored(picture, rotation, sample_aspect) for picture in pictures)
    first = next(stored)
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate, FAST.get(codec, {}) | (options or {}))
        context = stream.codec_context
        context.height, context.width = first.shape[:2]
        context.pix_fmt = pixel_format
        context.thread_count = 1  # the same bytes on every machine, and cheaper for small pictures
        context.time_base = base
        context.sample_aspect_ratio = sample_aspect
        context.colorspace, context.color_range = colour.matrix_tag, colour.range_tag
        context.color_primaries, context.color_trc = colour.primaries_tag, colour.transfer_tag
        if rotation:
            stream.set_display_rotation(-rotation)  # it counts counter-clockwise
        if audio_seconds:
            container.mux(_tone(container, audio_seconds))
        for index, picture in enumerate([first, *stored]):
            frame: Any = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=colour.matrix,
                dst_color_range=2 if colour.full_range else 1,
                threads=1,
            )
            seconds = Fraction(times[index]) if times is not None else index / rate
            frame.pts, frame.time_base = round((seconds + Fraction(start)) / base), base
            frame.colorspace, frame.color_range = colour.matrix_tag, colour.range_tag
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with a tone and no picture."""
    with av.open(str(path), "w") as container:
        container.mux(_tone(container, seconds))
    return path


def truncate(source: Path, target: Path, fraction: float) -> Path:
    """Copy the first ``fraction`` of the bytes of ``source``, as a broken download leaves them."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * fraction)])
    return target


def stream_copy(source: Path, target: Path, arguments: Sequence[str]) -> Path:
    """Copy packets with the ffmpeg program, e.g. ``["-ss", "1.3"]`` before the input for an edit list."""
    return _ffmpeg([*arguments, "-i", str(source), "-c", "copy"], target)


def as_annotators_saw_it(source: Path, target: Path) -> Path:
    """``ffmpeg -i source -r 25 target``: the annotators' 25 fps file, whose frames lag (anchors-pipeline §2.2)."""
    return _ffmpeg(["-i", str(source), "-r", "25", "-preset", "veryfast"], target)


def _ffmpeg(arguments: Sequence[str], target: Path) -> Path:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def _stored(picture: Picture, rotation: int, sample_aspect: Fraction) -> Picture:
    """The frame that a player turns and stretches into ``picture``."""
    turned = np.ascontiguousarray(np.rot90(picture, rotation // 90))
    height, width = turned.shape[:2]
    if sample_aspect > 1:
        width = round(width / sample_aspect)
    if sample_aspect < 1:
        height = round(height * sample_aspect)
    if (height, width) != turned.shape[:2]:
        turned = cv2.resize(turned, (width, height), interpolation=cv2.INTER_AREA)
    return turned


def _tone(container: Any, seconds: float) -> list[Any]:
    """Packets of a quiet 440 Hz tone from time 0, with their stream added to ``container``."""
    rate, chunk = 48000, 960
    codec = "libopus" if "webm" in container.format.name else "aac"
    stream = container.add_stream(codec, rate, layout="mono")
    packets = []
    for start in range(0, round(seconds * rate), chunk):
        phase = 2 * np.pi * 440 * np.arange(start, start + chunk) / rate
        samples = (np.sin(phase) * 0.05).astype(np.float32)[None]
        format_name = stream.codec_context.format.name
        if not format_name.startswith("flt"):
            samples = (samples * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format=format_name, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        packets += stream.encode(frame)
    return packets + stream.encode()
