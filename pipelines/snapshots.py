"""What the report can show of a video, also of one that was thrown away: a few small pictures, and a line of its time.

*Snapshots* are small JPEGs that travel with a video as members and are committed in its part, after the samples: whole
frames, named after the video, and one window of each track, named after the track. They never enter a shard. The *timeline*
says in a few hundred characters where faces were looked for, found and kept, and where the cuts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FRAME_PX = 256
"""Longer side of a snapshot of a whole frame."""
WINDOW_PX = 160
"""Side of a snapshot of a window."""
FRAMES = 6
"""Of a video, at most: spread over what was searched."""
MOST = 24
"""Snapshots committed of one video: its frames, then windows of its first tracks."""
MAX_BYTES = 16_000
"""Of one: quality is lowered until it fits. A usual one has 4 to 9 kB."""
QUALITIES = (75, 50, 25, 10)
ENDING = ".snapshot.jpg"

BINS = 240
"""Characters of a line of time."""
MAX_CUTS = 100
RANK = ".-xo"
"""Marks by rising worth: nothing was looked for, no face, another face than the annotated one, the face."""


def encode(image: NDArray[np.uint8], side: int) -> bytes:
    """An RGB picture (h, w, 3), shrunk until its longer side is ``side`` px, as a JPEG of at most :data:`MAX_BYTES`."""
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(scale * length)) for length in image.shape[1::-1]]
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return fit(image, QUALITIES, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)


def fit(image: NDArray[np.uint8], qualities: Sequence[int], sampling: int) -> bytes:
    """An RGB picture as a JPEG of the first quality with which it has at most :data:`MAX_BYTES`, or of the last."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    coded = b""
    for quality in qualities:
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        coded = cv2.imencode(".jpg", bgr, options)[1].tobytes()
        if len(coded) <= MAX_BYTES:
            break
    return coded


def shrink(jpeg: bytes) -> bytes:
    """A snapshot of a window that is stored as a JPEG."""
    image = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None, "a crop this pipeline wrote does not decode"
    return encode(np.asarray(image, dtype=np.uint8), WINDOW_PX)


def of_frame(key: str, index: int) -> str:
    """``KEY.000123.snapshot.jpg``: name of a whole frame of a video; the number is its presentation index."""
    return f"{key}.{index:06d}{ENDING}"


def only(key: str) -> str:
    """``KEY.snapshot.jpg``: name of the window of a track, or of the one frame of a video that was rejected unseen."""
    return f"{key}{ENDING}"


def is_snapshot(name: str) -> bool:
    """Whether a member is a snapshot."""
    return name.endswith(ENDING)


# ---------------------------------------------------------------------------------------------- the line of time


def marks(times: Iterable[float], letters: Iterable[str], start: float, end: float) -> str:
    """:data:`BINS` characters from ``start`` to ``end`` seconds: the worthiest mark of each, ``.`` where there is none.

    Args:
        times: of the frames, seconds.
        letters: one of :data:`RANK` for each of them.
        start, end: of the line; what lies outside is left out.
    """
    line = ["."] * BINS
    for time, letter in zip(times, letters, strict=True):
        if start <= time <= end:
            place = min(BINS - 1, int(BINS * (time - start) / max(end - start, 1e-9)))
            line[place] = max(line[place], letter, key=RANK.index)
    return "".join(line)


def timeline(
    found: Sequence[tuple[float, str]],
    cuts: Sequence[float],
    shown: Iterable[tuple[int, float]],
    size: tuple[int, int],
) -> dict[str, Any]:
    """``Video.timeline`` of a video that was searched; empty when nothing was.

    Args:
        found: (seconds, mark) of every frame that was searched.
        cuts: seconds.
        shown: (index, seconds) of every snapshot of a whole frame.
        size: (width, height) of the displayed video, pixels.
    """
    if not found:
        return {}
    times = [time for time, _ in found]
    first, last = min(times), max(times)
    margin = 0.02 * (last - first) + 0.1
    start, end = round(max(0.0, first - margin), 3), round(last + margin, 3)
    inside = [round(cut, 3) for cut in cuts if start <= cut <= end]
    some = np.linspace(0, len(inside) - 1, min(len(inside), MAX_CUTS)).round().astype(int)
    return {
        "start": start,
        "end": end,
        "size": list(size),
        "faces": marks(times, [letter for _, letter in found], start, end),
        "cuts": [inside[i] for i in some],
        "num_cuts": len(inside),
        "shown": [[index, round(time, 3)] for index, time in shown],
    }


def with_kept(line: dict[str, Any], times: Iterable[float]) -> dict[str, Any]:
    """A timeline, with the marks of the frames that were kept at ``times``."""
    if not line:
        return line
    moments = list(times)
    return line | {"kept": marks(moments, "o" * len(moments), line["start"], line["end"])}
