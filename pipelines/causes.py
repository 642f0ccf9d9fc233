"""The closed list of reasons to reject a video or a track.

A file of its own, since the child processes of a download import it and little else: one that waits for the network, or is told
that a video is gone, needs neither numpy nor OpenCV, and starts in half of the time.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Why a video or a track is not in the dataset. The value is ``stage: reason``; the ledger splits it."""

    LIST_MALFORMED = "list: malformed"
    LIST_BOXES = "list: boxes"
    LIST_UNSAFE = "list: unsafe"
    LIST_DUPLICATE = "list: duplicate"

    DOWNLOAD_SCHEME = "download: scheme"
    DOWNLOAD_NOT_FOUND = "download: not found"
    DOWNLOAD_PRIVATE = "download: private"
    DOWNLOAD_REMOVED = "download: removed"
    DOWNLOAD_GEO_BLOCKED = "download: geo-blocked"
    DOWNLOAD_AGE_GATE = "download: age gate"
    DOWNLOAD_LOGIN = "download: login"
    DOWNLOAD_FORBIDDEN = "download: forbidden"
    DOWNLOAD_RATE_LIMITED = "download: rate limited"
    DOWNLOAD_BOT_CHECK = "download: bot check"
    DOWNLOAD_SERVER_ERROR = "download: server error"
    DOWNLOAD_NETWORK = "download: network"
    DOWNLOAD_DEADLINE = "download: deadline"
    DOWNLOAD_SLOW = "download: slow"
    DOWNLOAD_NOT_A_VIDEO = "download: not a video"
    DOWNLOAD_EMPTY = "download: empty"
    DOWNLOAD_TRUNCATED = "download: truncated"
    DOWNLOAD_LOW_RESOLUTION = "download: low resolution"
    DOWNLOAD_TOO_LARGE = "download: too large"
    DOWNLOAD_OTHER = "download: other"

    VIDEO_NO_STREAM = "video: no video stream"
    VIDEO_UNREADABLE = "video: unreadable"
    VIDEO_HDR = "video: hdr"
    VIDEO_INTERLACED = "video: interlaced"
    VIDEO_DEADLINE = "video: deadline"
    VIDEO_BLACK = "video: black"

    TIMELINE_SHORT = "timeline: short"
    TIMELINE_EDITED = "timeline: edited"
    ANNOTATION_ASPECT = "annotation: aspect"

    TRACK_NO_FACE = "track: no face"
    TRACK_MISMATCH = "track: annotation mismatch"
    TRACK_SHORT = "track: short"
    TRACK_OVERLAP = "track: overlap"
    TRACK_BUDGET = "track: budget"

    CROP_LANDMARKS = "crop: implausible landmarks"
    CROP_JUMP = "crop: landmarks jump"
    CROP_UNSTEADY = "crop: unsteady landmarks"
    CROP_SMALL = "crop: small window"
    CROP_OUTSIDE = "crop: outside frame"
    CROP_FEW_FRAMES = "crop: few frames"

    CLIP_STATIC = "clip: static"

    QUALITY_UNSURE = "quality: unsure detection"
    QUALITY_SMALL = "quality: small face"
    QUALITY_BLURRED = "quality: blurred"
    QUALITY_POSE = "quality: extreme pose"
    QUALITY_REPEATED = "quality: repeated frame"
    QUALITY_FEW_FRAMES = "quality: few frames"
    QUALITY_DUPLICATE = "quality: duplicate"

    IDENTITY_DRIFT = "identity: drift"
    IDENTITY_DISAGREES = "identity: disagrees"
    IDENTITY_FEW_VIDEOS = "identity: few videos"
    IDENTITY_FEW_FRAMES = "identity: few frames"
    IDENTITY_SPLIT_LEAK = "identity: split leak"

    TAKEDOWN = "takedown: requested"

    NO_TRACKS = "track: none kept"
    CRASH = "stage: crash"

    @property
    def stage(self) -> str:
        """The part before the colon."""
        return self.value.split(": ", 1)[0]

    @property
    def reason(self) -> str:
        """The part after the colon."""
        return self.value.split(": ", 1)[1]


TRANSIENT = frozenset(
    {
        Cause.DOWNLOAD_RATE_LIMITED,
        Cause.DOWNLOAD_BOT_CHECK,
        Cause.DOWNLOAD_SERVER_ERROR,
        Cause.DOWNLOAD_NETWORK,
        Cause.DOWNLOAD_DEADLINE,
        Cause.DOWNLOAD_SLOW,
        Cause.DOWNLOAD_TRUNCATED,
        Cause.DOWNLOAD_EMPTY,
        Cause.DOWNLOAD_OTHER,
        Cause.VIDEO_DEADLINE,
        Cause.CRASH,
    }
)
"""Causes that may pass: the row is ``failed``, keeps its attempts, and the next run tries it again."""


def one_line(text: str, limit: int = 400) -> str:
    """Fold white space and cut to ``limit`` characters, for details and messages."""
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"
