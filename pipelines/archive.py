"""Videos that were fetched before: a folder of yt-dlp's or a mirror of VoxCeleb, looked up by video id.

A file belongs to the id that it is named by, at any depth::

    <id>.mp4      <id>.f137.mp4      Title [<id>].mkv      Title-<id>.webm      <identity>/<id>/<anything>.mp4

The last only if it is alone in its folder: several are cuts of the video, and none of them is the video. A file named
by its id goes before one in a folder named by it, then the larger before the smaller.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from pipelines.listing import full_path, list_files, open_location
from pipelines.schema import Cause, Video, reject
from pipelines.voxceleb import VIDEO_ENDINGS

FORMAT = re.compile(r"\.f[0-9][\w-]*$")
"""What yt-dlp appends where it was told to keep, or not to merge, a format of its own."""
BRACKETS = re.compile(r"\[([A-Za-z0-9_-]{1,40})\]$")
DASH = re.compile(r"-([A-Za-z0-9_-]{11})$")
"""The default names of youtube-dl: a title, a dash, a YouTube id."""

DEPTH = 32


class File(NamedTuple):
    """A video file of the archive; sorts from worst to best."""

    size: int
    path: str


class Archive:
    """What a folder holds, by id."""

    def __init__(self, uri: str) -> None:
        """Raises :class:`pipelines.listing.ListError` if nothing is there."""
        self.uri = uri
        fs, root = open_location(uri)
        self.named: dict[str, File] = {}
        self.below: defaultdict[str, list[File]] = defaultdict(list)
        for parts, path, size in list_files(fs, root, DEPTH):
            if PurePosixPath(path).suffix.lower() not in VIDEO_ENDINGS:
                continue
            file = File(size, full_path(fs, path))
            for name in ids_of(PurePosixPath(path).stem):
                self.named[name] = max(file, self.named.get(name, file))
            if len(parts) > 1:
                self.below[parts[-2]].append(file)

    def take(self, video: Video) -> Video:
        """The video with its file as ``path``; rejected as not found if the archive has none."""
        wanted = ids_wanted(video)
        for name in wanted:
            if name in self.named:
                return replace(video, path=self.named[name].path)
        for name in wanted:
            files = self.below.get(name, [])
            if len(files) == 1:
                return replace(video, path=files[0].path)
            if files:
                detail = f"{self.uri}: {len(files)} files in a folder {name}, none named {name}: which is the video?"
                return reject(video, Cause.DOWNLOAD_NOT_FOUND, detail)
        return reject(video, Cause.DOWNLOAD_NOT_FOUND, f"{self.uri} has no file named {wanted[0]}")


def ids_of(stem: str) -> set[str]:
    """Ids that a file's name without its ending may stand for."""
    stem = FORMAT.sub("", stem)
    found = [pattern.search(stem) for pattern in (BRACKETS, DASH)]
    return {stem} | {match[1] for match in found if match}


def ids_wanted(video: Video) -> list[str]:
    """Names under which a video may be filed: its id, and the one in its URL, where a table gave a name of its own."""
    parts = urlsplit(video.url)
    in_url = parse_qs(parts.query).get("v") or [PurePosixPath(parts.path).stem]
    return [video.video, *(name for name in in_url if name and name != video.video)]


def take_from(uri: str, videos: Iterable[Video]) -> Iterator[Video]:
    """Point every video of a list that has a URL at its file in the archive.

    Raises:
        pipelines.listing.ListError: the folder is not there.
    """
    archive = Archive(uri)
    return (archive.take(video) if video.live and video.url else video for video in videos)
