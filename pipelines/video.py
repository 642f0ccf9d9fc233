"""The only file that decodes or encodes video: probe, presentation times, and frames from a child process.

One rule for each thing that tools disagree about (all measured, see tests/pipelines/test_video.py):

* **Index and time.** Frame ``i`` is the one with the i-th smallest presentation time. Times are true timestamps of
  the packets (variable rate, edit lists), in seconds from the container's start, which is subtracted here and
  nowhere else: ffmpeg counts from there, PyAV and the packets do not, decord counts from the first picture.
* **Picture.** As a player shows it: turned by the rotation flag and stretched to square pixels. The shorter axis
  grows, so no pixel is lost.
* **Colour.** The file's matrix and range. A file that names no matrix is BT.709 from 720 lines (or 1280 columns)
  up and BT.601 below, as players assume; range is limited unless the file says full. HDR is refused.
* **Who decodes.** decord where it is right: 8-bit 4:2:0 H.264, HEVC, VP8, VP9 or MPEG-4 in mp4 or Matroska whose
  packets are one picture each in closed groups. Everything else goes to PyAV: AV1 (decord has no decoder), other
  containers (decord loses the first group of an MPEG-TS), packets hidden by an edit list (it counts them as
  pictures), open groups (it seeks to decoding order), rotation (decord turns mp4 but not Matroska), and
  large files without a colour matrix (decord takes them for BT.601). Where decord fails, PyAV gets one try.
  A stage that looks at every frame asks PyAV first (:func:`for_every_frame`).
* **Who waits.** Decoders hang, crash and leak, and decord can hang holding the interpreter lock. So they run in a
  child process: killed when silent for too long, replaced after a number of videos, gone when its parent is gone.
  It is stopped (SIGSTOP) while the caller works on a frame: decord reads ahead without bound, 500 MB in two
  seconds at 1080 lines. Only the child imports decord, after PyAV: before it, PyAV's VP8 and VP9 encoders fail.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from pipelines.causes import Cause, one_line

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]
"""(h, w, 3) RGB."""

THUMB_SIDE = 256
"""Long side of a thumb in pixels; smaller videos keep their size."""

MAX_SIDE = 8192
"""Pixels. A larger stored or displayed side is refused as unreadable: no camera, but a memory bomb."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """How :class:`Decoder` decodes."""

    deadline_seconds: float = 60.0
    """Longest silence of the child while it opens a file or decodes its next 100 frames; then it is killed."""
    videos_per_child: int = 50
    """Reads after which the child is replaced, because decord leaks memory."""
    decoders: tuple[str, ...] = ("decord", "pyav")
    """Decoders to try, in this order; :func:`for_every_frame` may change it."""

    def __post_init__(self) -> None:
        if self.deadline_seconds <= 0 or self.videos_per_child < 1:
            raise ValueError(
                f"deadline_seconds {self.deadline_seconds} must be > 0 "
                f"and videos_per_child {self.videos_per_child} >= 1"
            )
        if not self.decoders or not set(self.decoders) <= {"decord", "pyav"}:
            raise ValueError(f"decoders {self.decoders}: name one or both of decord, pyav")


def for_every_frame(config: DecoderConfig) -> DecoderConfig:
    """The configuration with PyAV before decord, for a stage that wants thumbs of all frames.

    The pictures are the same. Where every frame is converted decord takes a quarter more time; for some frames of many
    the two are equally fast (benchmarks/README.md).
    """
    order = sorted(config.decoders, key=lambda name: name != "pyav")
    return replace(config, decoders=tuple(order))


class VideoError(Exception):
    """A file that cannot be used. ``cause`` is from the closed list, ``detail`` one line for people."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = one_line(detail)

    def __str__(self) -> str:
        return f"{self.cause.value}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What :func:`probe` found. ``probe`` refuses HDR and interlaced files, so both flags are False in its result."""

    codec: str
    """``h264``, ``hevc``, ``vp9``, ``av1``, ..."""
    width: int
    """Of the displayed picture: after rotation, with square pixels."""
    height: int
    coded_width: int
    """Of the stored picture."""
    coded_height: int
    rotation: int
    """Degrees clockwise (0, 90, 180, 270) by which the stored picture is turned for display."""
    sample_aspect: float
    """Width / height of a stored pixel."""
    start_seconds: float
    """Presentation time of the container's start; already subtracted from every time given out."""
    duration: float
    """Seconds from the container's start to the end of the last frame, by the packets."""
    fps: float
    """Average frames a second; 0 for a single frame."""
    frames: int
    pix_fmt: str
    color_range: str
    """``limited``, ``full`` or ``unspecified``."""
    color_matrix: str
    """``bt709``, ``smpte170m``, ... or ``unspecified``."""
    color_transfer: str
    interlaced: bool
    hdr: bool
    audio: bool
    """Whether there is sound."""


@dataclass(frozen=True)
class Frame:
    """One decoded frame."""

    index: int
    """In presentation order."""
    time: float
    """Seconds from the container's start."""
    thumb: Picture | None
    """(h, w, 3) RGB of :func:`thumb_size`, area-averaged."""
    image: Picture | None
    """(height, width, 3) RGB as displayed."""


# Tags by number, ITU-T H.273.
MATRICES = {
    0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco",
    9: "bt2020nc", 10: "bt2020c",
}  # fmt: skip
TRANSFERS = {
    1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear",
    13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 18: "arib-std-b67",
}  # fmt: skip
RANGES = {1: "limited", 2: "full"}
INTERLACED_ORDERS = (2, 3, 4, 5)

DEMUXERS = "mov,matroska,webm,avi,flv,mpegts,mpeg,mp3,ogg,wav,flac,aac"
"""All that is ever opened: no playlists or scripts, which would make ffmpeg open other files and addresses."""

INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Where a seek lands on the key frame asked for (in an MPEG-TS it lands after it)."""

DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4")
DECORD_PIXELS = ("yuv420p", "yuvj420p")
DECORD_MATRICES = ("bt709", "bt470bg", "smpte170m", "unspecified")


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A PyAV container; trouble with the file anywhere inside becomes a :class:`VideoError`."""
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        # Metadata in odd encodings must not raise. "file:" keeps names like "http:..." local.
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as file:
            yield file
    except av.FFmpegError as error:
        raise VideoError(Cause.VIDEO_UNREADABLE, f"{type(error).__name__}: {error}") from error


def _video_stream(container: Any) -> Any:
    """The main video stream, ready to decode with one thread."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoError(Cause.VIDEO_NO_STREAM, f"{container.format.name} without moving pictures")
    if stream.codec_context is None:
        raise VideoError(Cause.VIDEO_UNREADABLE, "no decoder for the video stream")
    stream.codec_context.thread_count = 1  # one decoder has one CPU; more come with more actors
    return stream


@dataclass(frozen=True)
class _Packets:
    """The index of a file, from its packets without decoding."""

    container: str
    pts: NDArray[np.int64]
    """(n,) increasing presentation times in units of ``time_base``."""
    times: NDArray[np.float64]
    """(n,) the same in seconds from the container's start."""
    keys: NDArray[np.int64]
    """(k,) increasing indices where decoding can start; the first is 0."""
    is_plain: bool
    """Every packet is one shown picture, and no picture of a group precedes the group's key frame."""
    damage: str
    """Why the index ends early, or empty."""
    end: float
    """Presentation time of the end of the last packet of any stream, container's start included."""

    def key_before(self, index: int) -> int:
        """Where to start decoding for a frame."""
        return int(self.keys[np.searchsorted(self.keys, index, side="right") - 1])


def _read_packets(path: str | Path) -> _Packets:
    """Demux the whole file.

    Left out are packets that never become a picture: hidden by an edit list, cut short, or shown before the first
    key frame (a file cut out of an open group).
    """
    pts_list: list[int] = []  # in decoding order
    is_key_list: list[bool] = []
    is_shown_list: list[bool] = []
    damage = ""
    end = 0.0
    num_unusable = 0
    with _opened(path) as container:
        stream = _video_stream(container)
        if container.format.name == "avi" and stream.codec_context.has_b_frames:
            raise VideoError(
                Cause.VIDEO_UNREADABLE, "AVI with reordered frames: it stores no presentation times"
            )
        try:
            for packet in container.demux():
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    damage = damage or f"damaged packet in stream {packet.stream_index}"
                if packet.pts is not None:
                    last = (packet.pts + (packet.duration or 0)) * float(packet.time_base)
                    end = max(end, last)
                if packet.stream_index != stream.index:
                    continue
                if packet.pts is None or packet.is_corrupt:
                    num_unusable += 1
                    continue
                pts_list.append(packet.pts)
                is_key_list.append(packet.is_keyframe)
                is_shown_list.append(not packet.is_discard)
        except av.FFmpegError as error:
            damage = damage or f"{type(error).__name__}: {error}"
        time_base = float(stream.time_base)
        start = (container.start_time or 0) / av.time_base
        name = container.format.name

    in_order = np.array(pts_list, np.int64)
    is_key = np.array(is_key_list, bool)
    first_key = in_order[is_key].min(initial=np.iinfo(np.int64).max)
    is_shown = np.array(is_shown_list, bool) & (in_order >= first_key)
    if not is_shown.any():
        raise VideoError(Cause.VIDEO_UNREADABLE, f"no usable frame; {damage or 'no key frame'}")
    pts = np.unique(in_order[is_shown])
    latest_before = np.maximum.accumulate(np.r_[in_order[0] - 1, in_order[:-1]])
    earliest_after = np.minimum.accumulate(in_order[::-1])[::-1]
    is_closed = (latest_before < in_order) & (earliest_after >= in_order)
    return _Packets(
        container=name,
        pts=pts,
        times=np.round(pts.astype(np.float64) * time_base - start, 6).astype(np.float64),
        keys=np.union1d(0, np.searchsorted(pts, in_order[is_key & is_shown])),
        is_plain=len(pts) == len(in_order) + num_unusable and bool(is_closed[is_key].all()),
        damage=damage,
        end=end,
    )


def frame_times(path: str | Path) -> NDArray[np.float64]:
    """(n,) presentation time of every frame in seconds from the container's start, increasing. Decodes nothing.

    Raises :class:`VideoError` for a file without usable frames.
    """
    return _read_packets(path).times


def nearest(times: NDArray[np.float64], seconds: Any) -> NDArray[np.int64]:
    """Index of the frame shown nearest to each moment; of two equally near ones the earlier.

    Args:
        times: (n,) increasing, n >= 1, as :func:`frame_times` gives them.
        seconds: (m,) on the same timeline.
    """
    middles = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middles, np.asarray(seconds, np.float64), side="left").astype(np.int64)


def probe(path: str | Path) -> VideoInfo:
    """Open a file of any origin, index its packets, decode its first frame.

    Raises:
        VideoError: ``VIDEO_UNREADABLE`` (not a video, nothing decodes, absurd size), ``VIDEO_NO_STREAM`` (sound
            only), ``VIDEO_HDR`` (PQ, HLG, or 10-bit BT.2020), ``VIDEO_INTERLACED``.
    """
    packets = _read_packets(path)
    with _opened(path) as container:
        stream = _video_stream(container)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(Cause.VIDEO_UNREADABLE, "no frame decodes")
        found = _describe(container, stream, frame, packets)
    if found.hdr:
        raise VideoError(
            Cause.VIDEO_HDR, f"{found.color_transfer}, {found.color_matrix}, {found.pix_fmt}"
        )
    if found.interlaced:
        raise VideoError(Cause.VIDEO_INTERLACED, f"{found.codec} {found.width}x{found.height}")
    return found


def _describe(container: Any, stream: Any, frame: Any, packets: _Packets) -> VideoInfo:
    context = stream.codec_context
    rotation = _rotation(frame)
    sample_aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    width, height = frame.width * max(sample_aspect, 1), frame.height / min(sample_aspect, 1)
    if max(width, height) > MAX_SIDE:
        raise VideoError(
            Cause.VIDEO_UNREADABLE,
            f"{frame.width}x{frame.height} pixels of aspect {sample_aspect:g}: over {MAX_SIDE} a side",
        )
    if rotation in (90, 270):
        width, height = height, width
    n = len(packets.times)
    span = float(packets.times[-1] - packets.times[0])
    fps = (n - 1) / span if span > 0 else 0.0
    # VP9 and AV1 say it in the frame only, H.264 in both
    transfer = frame.color_trc if frame.color_trc != 2 else context.color_trc
    primaries = frame.color_primaries if frame.color_primaries != 2 else context.color_primaries
    wide = frame.format.components[0].bits > 8 and (primaries == 9 or frame.colorspace in (9, 10))
    return VideoInfo(
        codec=context.codec.canonical_name,
        width=round(width),
        height=round(height),
        coded_width=frame.width,
        coded_height=frame.height,
        rotation=rotation,
        sample_aspect=sample_aspect,
        start_seconds=(container.start_time or 0) / av.time_base,
        duration=round(float(packets.times[-1]) + (1 / fps if fps else 0.0), 6),
        fps=fps,
        frames=n,
        pix_fmt=frame.format.name,
        color_range=RANGES.get(int(frame.color_range), "unspecified"),
        color_matrix=MATRICES.get(int(frame.colorspace), "unspecified"),
        color_transfer=TRANSFERS.get(int(transfer), "unspecified"),
        interlaced=bool(frame.interlaced_frame) or int(context.field_order) in INTERLACED_ORDERS,
        hdr=int(transfer) in (16, 18) or wide,
        audio=len(container.streams.audio) > 0,
    )


def _rotation(frame: Any) -> int:
    """Degrees clockwise by which ``frame`` must be turned: 0, 90, 180 or 270."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.float64)
    rotation = -frame.rotation % 360
    if a * d - b * c <= 0 or rotation % 90:
        raise VideoError(
            Cause.VIDEO_UNREADABLE, f"display matrix mirrors or tilts: {rotation} degrees"
        )
    return int(rotation)


def decodes_at_end(path: str | Path, info: VideoInfo) -> bool:
    """Whether a file that claims to be complete is: nothing damaged, as long as its header says (to half a second
    and a frame), and its last second really decodes. False for a truncated download, which every library opens
    without a word.
    """
    try:
        packets = _read_packets(path)
        with _opened(path) as container:
            claimed = (container.duration or 0) / av.time_base
        if packets.damage or packets.end < claimed - 0.5 - info.duration / info.frames:
            return False
        first = int(np.searchsorted(packets.times, packets.times[-1] - 1.0))
        with Decoder() as decoder:
            for _ in decoder.read(path, info, ranges=[(first, info.frames)], thumbs=True):
                pass
    except VideoError as error:
        logger.info("%s: %s", path, error)
        return False
    return True


def thumb_size(info: VideoInfo) -> tuple[int, int]:
    """(width, height) of the thumbs of a video."""
    scale = min(1.0, THUMB_SIDE / max(info.width, info.height))
    return max(1, round(info.width * scale)), max(1, round(info.height * scale))


def _shrink(picture: Picture, size: tuple[int, int]) -> Picture:
    """Area average. Halving first is 2.5 times faster at 1080 lines (5.9 -> 2.3 ms) and 0.1 levels off in the mean."""
    height, width = picture.shape[:2]
    shrunk: Any = picture
    if width >= 4 * size[0] and width % 2 == 0 and height % 2 == 0:
        shrunk = cv2.resize(shrunk, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, size, interpolation=cv2.INTER_AREA), np.uint8)


def _is_709_by_size(info: VideoInfo) -> bool:
    large = info.coded_height >= 720 or info.coded_width >= 1280
    return info.color_matrix == "unspecified" and large


# What follows runs in the child.

Step = tuple[int, Picture] | None
"""Index and stored-size picture, or None: still alive."""

PATIENCE = 100
"""Frames passed over before a sign of life."""


class _DecordError(Exception):
    """decord failed in one of its many ways."""


def _decord_objection(info: VideoInfo, packets: _Packets) -> str:
    """Why decord would give wrong pictures of this file, or empty."""
    if packets.container not in INDEXED_CONTAINERS:
        return f"container {packets.container}"
    if info.codec not in DECORD_CODECS:
        return f"codec {info.codec}"
    if info.pix_fmt not in DECORD_PIXELS:
        return f"pixel format {info.pix_fmt}"
    if info.color_matrix not in DECORD_MATRICES or _is_709_by_size(info):
        return f"colour matrix {info.color_matrix} at {info.coded_width}x{info.coded_height}"
    if info.rotation:
        return f"rotation {info.rotation}"
    if not packets.is_plain:
        return "packets that are no picture, or open groups"
    return ""


def _decord_pictures(
    path: str, _: VideoInfo, packets: _Packets, wanted: Sequence[int]
) -> Iterator[Step]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        # More than one thread fails on 1080p VP9 (dmlc/decord#246). The tolerance makes it raise
        # where it would otherwise repeat a picture for each one that it could not decode.
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
        stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        if len(stamps) != len(packets.times):
            raise _DecordError(f"counts {len(stamps)} frames, the packets say {len(packets.times)}")
        drift = np.ptp(stamps - packets.times)
        if drift > 0.25 * np.diff(packets.times, append=np.inf).min():
            raise _DecordError(f"times differ by up to {drift:.4f} s from the packets'")
        position = 0
        for index in wanted:
            key = packets.key_before(index)
            if key > position:
                reader.seek_accurate(key)
                position = key
                if position < index:  # skip_frames() forgets that the key frame is already decoded
                    reader.next()
                    position += 1
            while position < index:  # within one group skip_frames() never seeks
                step = min(PATIENCE, index - position)
                reader.skip_frames(step)
                position += step
                yield None
            yield index, reader.next().asnumpy()
            position += 1
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
        raise _DecordError(f"{type(error).__name__}: {error}") from error
    except StopIteration as error:
        raise _DecordError("ended early") from error


def _pyav_pictures(
    path: str, info: VideoInfo, packets: _Packets, wanted: Sequence[int]
) -> Iterator[Step]:
    index_of = {int(pts): index for index, pts in enumerate(packets.pts)}
    matrix = "ITU709" if _is_709_by_size(info) else None  # None: as tagged, else BT.601
    with _opened(path) as container:
        stream = _video_stream(container)
        decoded = container.decode(stream)
        position = 0
        for index in wanted:
            key = packets.key_before(index)
            if key > position and packets.container in INDEXED_CONTAINERS:
                container.seek(int(packets.pts[key]), stream=stream)
                decoded = container.decode(stream)
            frame: Any = None
            found, passed = -1, 0
            while found < index:
                frame = next(decoded, None)
                found = len(packets.pts) if frame is None else index_of.get(frame.pts, -1)
                passed += 1
                if passed % PATIENCE == 0:
                    yield None
            if found > index or frame.is_corrupt:
                at = f"{packets.times[index]:.3f} s"
                raise VideoError(Cause.VIDEO_UNREADABLE, f"frame {index} at {at} does not decode")
            rgb = frame.reformat(format="rgb24", src_colorspace=matrix, threads=1)
            yield index, rgb.to_ndarray()
            position = index + 1


Message = tuple[dict[str, Any], list[Picture]]
"""A JSON header, and the pictures whose shapes it lists under ``shapes``."""


def _answer(request: dict[str, Any]) -> Iterator[Message]:
    """Decode what one request of :meth:`Decoder.read` asks for."""
    path, info = request["path"], VideoInfo(**request["info"])
    packets = _read_packets(path)
    if len(packets.times) != info.frames:
        raise VideoError(
            Cause.VIDEO_UNREADABLE, f"{len(packets.times)} frames, {info.frames} when it was probed"
        )
    objection = _decord_objection(info, packets)
    able = [name for name in request["decoders"] if name == "pyav" or not objection]
    if not able:
        raise VideoError(Cause.VIDEO_UNREADABLE, f"not for decord: {objection}")
    yield {"decoder": able[0]}, []
    pictures = {"decord": _decord_pictures, "pyav": _pyav_pictures}[able[0]]
    images = set(request["images"])
    for step in pictures(path, info, packets, request["wanted"]):
        if step is None:
            yield {"busy": True}, []
            continue
        index, stored = step
        turned = np.ascontiguousarray(np.rot90(stored, -(info.rotation // 90)))
        sent = [_shrink(turned, thumb_size(info))] if request["thumbs"] else []
        if index in images:
            sent.append(_stretch(turned, (info.width, info.height)))
        yield {"index": index, "time": packets.times[index]}, sent
    yield {"end": True}, []


def _stretch(picture: Picture, size: tuple[int, int]) -> Picture:
    """To square pixels."""
    if picture.shape[1::-1] == size:
        return picture
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR), np.uint8)


def _send(pipe: BinaryIO, message: Message) -> None:
    header, pictures = message
    text = json.dumps(header | {"shapes": [picture.shape for picture in pictures]}).encode()
    pipe.write(struct.pack(">I", len(text)) + text)
    for picture in pictures:
        pipe.write(picture.data.cast("B"))
    pipe.flush()


def _serve(parent: int) -> None:
    """The child: a request a line on stdin, messages on stdout, until stdin ends or ``parent`` does."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the messages
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    cv2.setNumThreads(1)
    _send(answers, ({"ready": True}, []))
    for line in sys.stdin.buffer:
        try:
            for message in _answer(json.loads(line)):
                _send(answers, message)
        except VideoError as error:
            _send(answers, ({"error": error.cause, "detail": error.detail}, []))
        except _DecordError as error:
            _send(answers, ({"error": Cause.VIDEO_UNREADABLE, "detail": f"decord: {error}"}, []))
        except Exception:  # our own bug: the parent raises it
            _send(answers, ({"crash": traceback.format_exc()}, []))


# And this in the parent.


KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
}
"""For glibc: pictures of 6 MB come and go; given back each time, their pages cost the child a fifth of its CPU time."""


class _ReadError(Exception):
    """One decoder failed; another may succeed."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail


class _Child:
    """The process that decodes, and the pipes to it."""

    START_SECONDS = 120.0
    """It imports OpenCV and PyAV first, on a machine that may be busy."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        # Not multiprocessing: in a Ray worker that would import Ray's own main module again.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.video", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | KEPT_MEMORY | {"PYTHONPATH": path},
        )
        self.reads = 0
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        if sys.platform == "linux":
            fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, 1 << 20)  # 6 MB images: fewer switches
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        try:
            self.receive(self.START_SECONDS)
        except _ReadError as error:
            self.kill()
            raise RuntimeError(f"the decoding process does not start: {error.detail}") from error

    def request(self, request: dict[str, Any]) -> None:
        self.reads += 1
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise _ReadError(Cause.VIDEO_UNREADABLE, "the decoding process has died") from error

    def receive(self, seconds: float) -> Message:
        """The next message, if all of it arrives within ``seconds``."""
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack(">I", self._bytes(4, deadline))
        header = json.loads(self._bytes(size, deadline))
        pictures = [
            np.frombuffer(self._bytes(int(np.prod(shape)), deadline), np.uint8).reshape(shape)
            for shape in header["shapes"]
        ]
        return header, pictures

    def _bytes(self, count: int, deadline: float) -> bytearray:
        received = bytearray(count)
        view, filled = memoryview(received), 0
        while filled < count:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise _ReadError(Cause.VIDEO_DEADLINE, "the decoder was silent for too long")
            arrived = os.readv(self._answers.fileno(), [view[filled:]])
            if arrived == 0:
                code = self.process.wait()
                raise _ReadError(
                    Cause.VIDEO_UNREADABLE, f"the decoding process died with exit code {code}"
                )
            filled += arrived
        return received

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self._release()

    def end(self) -> None:
        """Let it finish by itself; it is idle."""
        self._requests.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._release()

    def _release(self) -> None:
        self._requests.close()
        self._answers.close()
        self.process.wait()


class Decoder:
    """Decodes frames in a child process that it starts, watches, kills and replaces.

    Use it as a context manager, or keep one for the life of an actor: the child ends with its parent. One read at
    a time; a read that is not iterated to its end costs the child (0.5 s to replace).
    """

    def __init__(self, config: DecoderConfig | None = None) -> None:
        self._config = config or DecoderConfig()
        self._child: _Child | None = None
        self.used = ""
        """Decoder of the last read: ``decord`` or ``pyav``."""

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child. The decoder can be used again."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def read(
        self,
        path: str | Path,
        info: VideoInfo,
        *,
        ranges: Iterable[tuple[int, int]],
        images: Iterable[int] = (),
        thumbs: bool = False,
    ) -> Iterator[Frame]:
        """Decode parts of a video, forward, starting at the key frame before each part.

        Args:
            path: the file that ``info`` was probed from.
            info: of :func:`probe`.
            ranges: (first, last exclusive) frame indices; they may overlap.
            images: indices inside the ranges whose full picture is wanted. Images are large (6 MB at 1080 lines):
                ask for those you need.
            thumbs: give every frame of the ranges, with its thumb. Otherwise only frames in ``images`` come.

        Yields:
            Frames by increasing index. The child rests while the caller works on one.

        Raises:
            VideoError: ``VIDEO_UNREADABLE`` or ``VIDEO_DEADLINE``, after every configured decoder failed. Frames
                given out before stay valid.
            ValueError: a range or image that the video does not have.
        """
        images = set(images)
        wanted = _wanted(info, ranges, images, thumbs)
        decoders = self._config.decoders
        given = 0
        while given < len(wanted):
            request = {
                "path": str(Path(path).resolve()),
                "info": asdict(info),
                "wanted": wanted[given:],
                "images": sorted(images),
                "thumbs": thumbs,
                "decoders": decoders,
            }
            try:
                for frame in self._attempt(request):
                    assert frame.index == wanted[given], (frame.index, wanted[given])
                    given += 1
                    yield frame
            except _ReadError as failed:
                logger.warning("%s with %s: %s", path, self.used, failed.detail)
                decoders = decoders[decoders.index(self.used) + 1 :]
                if not decoders:
                    raise VideoError(failed.cause, failed.detail) from failed

    def _attempt(self, request: dict[str, Any]) -> Iterator[Frame]:
        """Frames from the first decoder of the request that can, until it fails."""
        self.used = request["decoders"][0]
        images = set(request["images"])
        child = self._ready_child()
        is_idle = False
        try:
            child.request(request)
            while not is_idle:
                header, pictures = child.receive(self._config.deadline_seconds)
                if "decoder" in header:
                    self.used = header["decoder"]
                elif "index" in header:
                    index = header["index"]
                    thumb = pictures[0] if request["thumbs"] else None
                    image = pictures[-1] if index in images else None
                    child.pause()
                    yield Frame(index, header["time"], thumb, image)
                    child.resume()
                elif "error" in header:
                    is_idle = True
                    raise _ReadError(Cause(header["error"]), header["detail"])
                elif "crash" in header:
                    raise RuntimeError(f"decoding {request['path']}:\n{header['crash']}")
                else:
                    is_idle = "end" in header
        finally:
            if not is_idle:
                self._child = None
                child.kill()

    def _ready_child(self) -> _Child:
        child = self._child
        if child is not None and child.reads >= self._config.videos_per_child:
            self.close()
        if child is not None and child.process.poll() is not None:  # killed from outside
            self._child = None
            child.kill()
        if self._child is None:
            self._child = _Child()
        return self._child


def _wanted(
    info: VideoInfo, ranges: Iterable[tuple[int, int]], images: set[int], thumbs: bool
) -> list[int]:
    """Increasing indices of the frames to give out."""
    inside: set[int] = set()
    for first, last in ranges:
        if not 0 <= first < last <= info.frames:
            raise ValueError(f"range ({first}, {last}) of a video with {info.frames} frames")
        inside.update(range(first, last))
    if not images <= inside:
        raise ValueError(f"images {sorted(images - inside)[:5]} are outside the ranges")
    return sorted(inside if thumbs else images)


COPIED_SOUND = ("aac", "mp3", "ac3", "eac3")
"""Codecs of sound that every player takes in an mp4; any other becomes AAC."""
PCM = {
    "u8": "pcm_u8",
    "s16": "pcm_s16le",
    "s32": "pcm_s32le",
    "flt": "pcm_f32le",
    "dbl": "pcm_f64le",
}
"""What sound becomes in Matroska, which has no place for what an AAC or MP3 decoder must skip: by the samples' format."""
CLOCK = Fraction(1, 90000)
"""Unit of presentation times, seconds, when they are given."""
Codec = Literal["h264", "ffv1"]
"""What :func:`encode_part` writes: H.264, which everything plays, or FFV1 of RGB, which loses nothing."""
FORMATS = {".mp4": "mp4", ".mkv": "matroska"}
"""Suffix of a file → its container. FFV1 is for Matroska only."""
ENCODER_THREADS = 4
"""Of every encoder on every machine: x264's output depends on it."""


def encode(
    path: Path,
    pictures: Iterable[Picture],
    rate: Fraction,
    crf: int = 18,
    *,
    times: Sequence[float] | None = None,
    sound: Path | None = None,
) -> None:
    """Write pictures as an H.264 mp4, tagged BT.709. Holds a picture at a time, however long the video.

    Args:
        path: of the file to make.
        pictures: (height, width, 3) RGB each, all of one size, sides even.
        rate: frames per second.
        crf: quality of x264; 18 is visually lossless.
        times: presentation time of each picture in seconds, increasing; without them the rate is constant.
        sound: a file whose sound is added, on the same time line: seconds from that file's start.

    Raises:
        ValueError: no picture came.
        VideoError: the file with the sound cannot be opened.
    """
    with av.open(str(path), "w", format="mp4") as container, ExitStack() as opened:
        packets: Iterator[tuple[float, Any]] = iter(())
        waiting: tuple[float, Any] | None = None
        stream: Any = None
        for index, picture in enumerate(pictures):
            if stream is None:
                stream = _add_h264(container, picture, rate, crf)
                if times is not None:
                    stream.codec_context.time_base = CLOCK
                if sound is not None:
                    packets = _sound_packets(container, opened.enter_context(_opened(sound)))
                waiting = next(packets, None)
            seconds = float(index / rate) if times is None else times[index]
            while waiting is not None and waiting[0] <= seconds:  # muxers want both side by side
                container.mux(waiting[1])
                waiting = next(packets, None)
            shown = _shown(picture, stream)
            if times is not None:
                shown.pts, shown.time_base = round(Fraction(seconds) / CLOCK), CLOCK
            container.mux(stream.encode(shown))
        if stream is None:
            raise ValueError(f"{path}: no pictures to encode")
        container.mux(stream.encode(None))
        if waiting is not None:
            container.mux(waiting[1])
        for _, packet in packets:
            container.mux(packet)


def _add_h264(container: Any, picture: Picture, rate: Fraction, crf: int) -> Any:
    """A stream for pictures of this one's size."""
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": str(crf), "preset": "veryfast"}
    stream.codec_context.color_range = ColorRange.MPEG
    stream.codec_context.colorspace = Colorspace.ITU709
    return stream


def encode_part(
    path: Path, pictures: Iterable[Picture], rate: Fraction, codec: Codec, crf: int = 18
) -> int:
    """Write pictures so that parts can be joined: packets come in the order in which they are shown. Returns their number.

    Args:
        path: of the file to make, ``.mp4`` or ``.mkv``; its times mean nothing, :func:`join` gives them.
        pictures: (height, width, 3) RGB each, all of one size, of any size: where a side is odd, H.264 keeps all colours.
        rate: frames per second.
        codec: H.264 tagged BT.709, or FFV1 in RGB.
        crf: quality of x264; 18 is visually lossless.

    Raises:
        ValueError: no picture came.
    """
    count = 0
    with av.open(str(path), "w", format=FORMATS[path.suffix]) as container:
        stream: Any = None
        for picture in pictures:
            if stream is None:
                stream = (_add_ffv1 if codec == "ffv1" else _add_h264)(
                    container, picture, rate, crf
                )
                stream.codec_context.thread_count = ENCODER_THREADS
                if codec == "h264":
                    stream.options = stream.options | {"bf": "0"}
                    if picture.shape[0] % 2 or picture.shape[1] % 2:
                        stream.pix_fmt = "yuv444p"
            container.mux(stream.encode(_shown(picture, stream)))
            count += 1
        if stream is None:
            raise ValueError(f"{path}: no pictures to encode")
        container.mux(stream.encode(None))
    return count


def join(
    path: Path,
    parts: Iterable[Path],
    times: Sequence[float],
    *,
    sound: Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One file of parts that :func:`encode_part` made of one video; nothing is encoded again but sound an mp4 cannot hold.

    Args:
        path: of the file to make, ``.mp4`` or ``.mkv``.
        parts: in order.
        times: presentation time of every picture of all parts in seconds, increasing.
        sound: a file whose sound is added, on the same time line: seconds from that file's start.
        metadata: of the container, any keys.

    Raises:
        VideoError: the file with the sound cannot be opened.
    """
    ticks = [round(Fraction(seconds) / CLOCK) for seconds in times]
    last = ticks[-1] - ticks[-2] if len(ticks) > 1 else round(1 / (25 * CLOCK))
    lengths = np.diff(ticks, append=ticks[-1] + last)
    form = FORMATS[path.suffix]
    options = {"movflags": "use_metadata_tags"} if form == "mp4" else {}
    with av.open(str(path), "w", format=form, options=options) as container, ExitStack() as opened:
        container.metadata.update(metadata or {})
        packets: Iterator[tuple[float, Any]] = iter(())
        waiting: tuple[float, Any] | None = None
        stream: Any = None
        index = 0
        for part in parts:
            with av.open(str(part)) as source:
                if stream is None:
                    stream = container.add_stream_from_template(source.streams.video[0])
                    stream.time_base = CLOCK
                    if sound is not None:
                        packets = _sound_packets(container, opened.enter_context(_opened(sound)))
                    waiting = next(packets, None)
                for packet in source.demux(video=0):
                    if packet.size == 0:
                        continue
                    while waiting is not None and waiting[0] <= times[index]:
                        container.mux(waiting[1])
                        waiting = next(packets, None)
                    packet.stream, packet.time_base = stream, CLOCK
                    packet.pts = packet.dts = ticks[index]
                    packet.duration = int(lengths[index])
                    container.mux(packet)
                    index += 1
        assert index == len(times), (index, len(times))
        if waiting is not None:
            container.mux(waiting[1])
        for _, packet in packets:
            container.mux(packet)


def _add_ffv1(container: Any, picture: Picture, rate: Fraction, _: int) -> Any:
    """A lossless stream for pictures of this one's size: RGB, which FFmpeg's FFV1 calls bgr0 where there are 8 bits (gbrp above)."""
    stream = container.add_stream("ffv1", rate=rate)
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = "bgr0"
    stream.options = {"level": "3", "slices": "4", "slicecrc": "1"}
    return stream


def _shown(picture: Picture, stream: Any) -> Any:
    """A picture as a stream's encoder wants it."""
    frame = av.VideoFrame.from_ndarray(picture, "rgb24")
    if stream.pix_fmt == "bgr0":
        return frame.reformat(format="bgr0")
    return frame.reformat(
        format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


def _sound_packets(container: Any, source: Any) -> Iterator[tuple[float, Any]]:
    """Packets of the source's sound with their times, for a stream that is added to ``container`` at once.

    Sound that ends in damage ends there, with a warning: the pictures are worth more.
    """
    stream = source.streams.best("audio")
    if stream is None or stream.codec_context is None:
        return iter(())
    codec, rate = stream.codec_context.codec.canonical_name, stream.codec_context.sample_rate
    if container.format.name == "matroska":
        copied = codec.startswith("pcm_") or codec == "flac"
        encoder = PCM[stream.codec_context.format.packed.name]
    else:
        copied, encoder = codec in COPIED_SOUND, "aac"
    added = (
        container.add_stream_from_template(stream)
        if copied
        else container.add_stream(encoder, rate=rate, layout=stream.codec_context.layout.name)
    )
    start = Fraction(source.start_time or 0, av.time_base)

    def copy() -> Iterator[tuple[float, Any]]:
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            shift = round(start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            seconds = float(packet.pts * packet.time_base)
            packet.stream = added
            yield seconds, packet

    def recode() -> Iterator[tuple[float, Any]]:
        for frame in source.decode(stream):
            frame.pts -= round(start / frame.time_base)
            yield from ((_seconds(packet), packet) for packet in added.encode(frame))
        yield from ((_seconds(packet), packet) for packet in added.encode(None))

    def until_damage() -> Iterator[tuple[float, Any]]:
        try:
            yield from copy() if copied else recode()
        except av.FFmpegError as error:
            logger.warning("%s: its sound ends early: %s", source.name, error)

    return until_damage()


def _seconds(packet: Any) -> float:
    return float((packet.pts or 0) * packet.time_base)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
