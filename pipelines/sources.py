"""Pictures of one person → windows as the Aligner was trained on. A video counts as some of its frames.

Used by swapping, once a person, and by fine-tuning. Which face of a picture is meant is decided here, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.aligner.network import Aligner
from models.frozen.arcface import IdentityName, IdentityNetwork
from pipelines import storage
from pipelines.annotate import frame_mask
from pipelines.follower import FOUND, FollowConfig, Follower, largest, read_picture
from pipelines.geometry import Floats, Image, heser_window, transform, warp
from pipelines.output import ConfigError
from pipelines.samples import pictures, reduce
from pipelines.samples_aligner import FACES, face_matrix
from pipelines.video import Decoder, VideoError, probe

LARGEST = -1
"""Of ``--source-face``: whichever face is largest."""


@dataclass(frozen=True)
class Source:
    """One picture of the person."""

    name: str
    """File it is from; of a video also the frame's index."""
    window: Image
    """(S, S, 3) RGB, black outside the picture."""
    landmarks: Floats
    """(68, 2) pixels of the window."""
    inside: NDArray[np.bool_]
    """(S, S) False outside the picture."""


def read_sources(
    uris: Sequence[str],
    faces: FollowConfig,
    size: int,
    *,
    face: int = LARGEST,
    frames: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> list[Source]:
    """All pictures of a person.

    Args:
        uris: pictures and videos.
        faces: how faces are found.
        size: side of the windows, pixels.
        face: which face of a picture with several, counted from the left from 0; ``LARGEST``: the largest.
        frames: of a video, taken evenly.
        say: told where there was a choice.

    Raises:
        ConfigError: one of them cannot be read, or has no such face.
        WeightsError: of the detector or the landmarker.
    """
    found: list[Source] = []
    for uri in uris:
        if not storage.exists(uri):
            raise ConfigError(f"--source {uri}: no such file")
        try:
            picture = read_picture(uri)
        except ConfigError as error:
            found += _of_video(uri, faces, size, frames, error)
            continue
        height, width = picture.shape[:2]
        follower = Follower(faces, (width, height))
        points = _choose(follower, uri, picture, face, say)
        found.append(_source(uri, picture, points, size))
    return found


def _choose(
    follower: Follower, uri: str, picture: Image, face: int, say: Callable[[str], None]
) -> Floats:
    """Points of the face that is meant."""
    height, width = picture.shape[:2]
    told = f"--source {uri} ({width} x {height})"
    boxes = follower.faces(picture)
    if not len(boxes):
        raise ConfigError(f"{told}: no face")
    if face >= len(boxes):
        raise ConfigError(
            f"{told}: no face {face}: it has {len(boxes)}, counted from the left from 0 (--source-face)"
        )
    chosen = largest(boxes) if face == LARGEST else face
    if len(boxes) > 1 and face == LARGEST:
        say(
            f"{told}: {len(boxes)} faces; taken is the largest, number {chosen} from the left (--source-face)"
        )
    points, cause = follower.locate(picture, boxes[chosen])
    if points is None:
        raise ConfigError(f"{told}: {cause}")
    return points


def _of_video(
    uri: str, faces: FollowConfig, size: int, frames: int, not_a_picture: ConfigError
) -> list[Source]:
    """Frames of a video, evenly over all of it; those without the face are left out."""
    try:
        with storage.local_file(uri) as path:
            found = list(_frames(uri, path, faces, size, frames))
    except FileNotFoundError:
        raise not_a_picture from None
    except VideoError as error:
        raise ConfigError(
            f"--source {uri}: neither a picture that OpenCV reads nor a video ({error})"
        ) from error
    if not found:
        raise ConfigError(f"--source {uri}: no face in {frames} frames of this video")
    return found


def _frames(uri: str, path: Path, faces: FollowConfig, size: int, frames: int) -> Iterator[Source]:
    info = probe(path)
    step = info.frames / min(frames, info.frames)
    wanted = [int((i + 0.5) * step) for i in range(min(frames, info.frames))]
    follower = Follower(faces, (info.width, info.height))
    with Decoder() as decoder:
        for frame in decoder.read(path, info, ranges=[(0, info.frames)], images=wanted):
            assert frame.image is not None
            points, cause = follower.find(frame.image, frame.time)
            if cause == FOUND:
                assert points is not None
                yield _source(f"{uri}#{frame.index}", frame.image, points, size)


def _source(name: str, picture: Image, points: Floats, size: int) -> Source:
    matrix = heser_window(points, size)
    return Source(
        name=name,
        window=warp(picture, matrix, (size, size)),
        landmarks=transform(matrix, points),
        inside=frame_mask(matrix, (picture.shape[1], picture.shape[0]), size),
    )


def identity_faces(sources: Sequence[Source], identity: IdentityName) -> Tensor:
    """What the identity network is shown of the pictures: (k, 3, fh, fw) in [-1, 1], cut from the windows as in training."""
    height, width = FACES[identity].size
    return pictures(
        [warp(s.window, face_matrix(s.landmarks, identity), (width, height)) for s in sources]
    )


@torch.no_grad()
def encode(aligner: Aligner, identity: IdentityNetwork, sources: Sequence[Source]) -> Tensor:
    """Who it is: the code (1, d1 + d2) of all pictures together, on the Aligner's device."""
    device = next(aligner.parameters()).device
    windows = pictures([reduce(s.window, aligner.config.encoder_size) for s in sources])
    vectors = identity.embedding(identity_faces(sources, aligner.config.identity).to(device))
    return aligner.encode_sources(windows.to(device)[None], vectors[None])
