"""Maker of small datasets: drawn faces go through the real commits, shards, index, ledger and manifest, without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.frozen.parsing import ParsingLabel
from pipelines import report, shards, snapshots
from pipelines.annotate import encode_labels
from pipelines.crops import CropsConfig
from pipelines.preprocess import PreprocessConfig, Tally, describe_windows
from pipelines.schema import (
    SCHEMA_VERSION,
    Cause,
    Member,
    Track,
    Video,
    frame_member,
    npy_bytes,
    reject,
    reject_track,
)

CROP = describe_windows(PreprocessConfig(input="list", output="out", crops=CropsConfig(size=128)))
CONFIG = PreprocessConfig(input="list", output="out").recipe

Made = tuple[Video, list[Member]]


def face_points(size: int, turn: float = 0.0) -> NDArray[np.float32]:
    """68 iBUG points (68, 2) of a drawn face in a window of ``size`` pixels, its features moved sideways by ``turn``."""

    def arc(centre: tuple[float, float], radii: tuple[float, float], angles: Any) -> Any:
        return np.stack(
            [centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=-1
        )

    def ring(number: int) -> Any:
        return np.pi + 2 * np.pi * np.arange(number) / number

    features = np.concatenate(
        [
            arc((0.36, 0.42), (0.08, 0.05), np.linspace(np.pi, 2 * np.pi, 5)),
            arc((0.64, 0.42), (0.08, 0.05), np.linspace(np.pi, 2 * np.pi, 5)),
            np.stack([np.full(4, 0.5), np.linspace(0.45, 0.57, 4)], axis=-1),
            arc((0.5, 0.59), (0.06, 0.02), np.linspace(np.pi, 0, 5)),
            arc((0.36, 0.47), (0.05, 0.025), ring(6)),
            arc((0.64, 0.47), (0.05, 0.025), ring(6)),
            arc((0.5, 0.70), (0.10, 0.05), ring(12)),
            arc((0.5, 0.70), (0.06, 0.02), ring(8)),
        ]
    )
    jaw = arc((0.5, 0.48), (0.26, 0.36), np.linspace(np.pi, 0, 17))
    points = np.concatenate([jaw, features + np.array([turn, 0.0])]) * size
    return points.astype(np.float32)


@cache
def face_jpeg(size: int, turn: float, hue: int) -> bytes:
    """The face of :func:`face_points`, painted: a JPEG of ``size`` pixels."""
    colour = cv2.cvtColor(np.array([[[hue % 180, 110, 205]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
    image = np.full((size, size, 3), 60 + hue % 50, np.uint8)
    centre = (size // 2, int(0.48 * size))
    cv2.ellipse(image, centre, (int(0.26 * size), int(0.36 * size)), 0, 0, 360, colour.tolist(), -1)
    points = face_points(size, turn)
    for part in (slice(36, 42), slice(42, 48), slice(48, 60)):
        cv2.fillPoly(image, [points[part].astype(np.int32)], (70, 30, 30))
    coded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    return bytes(coded.tobytes())


@cache
def face_labels(size: int) -> bytes:
    """Labels of the face of :func:`face_jpeg`: skin with hair above it, a PNG of ``size`` pixels."""
    labels = np.zeros((size, size), np.uint8)
    centre, radii = (size // 2, int(0.48 * size)), (int(0.26 * size), int(0.36 * size))
    cv2.ellipse(labels, centre, radii, 0, 0, 360, int(ParsingLabel.SKIN), -1)
    labels[: int(0.25 * size)][labels[: int(0.25 * size)] > 0] = ParsingLabel.HAIR
    return encode_labels(labels)


def made_video(identity: str, video: str, tracks: int = 2, frames: int = 5, **fields: Any) -> Made:
    """A video that passed every stage, and the members of its tracks.

    Args:
        identity: its pictures have a colour of their own.
        video: name.
        tracks: open ones.
        frames: of each.
        fields: of :class:`Video`, such as ``split`` and ``url``.
    """
    size = CROP["size"]
    hue = sum(map(ord, identity)) * 37
    made = Video(
        identity=identity,
        video=video,
        **{
            "split": "train",
            "url": f"https://video.example/watch?v={video}",
            "sha256": "ab" * 32,
            "size": 12_345,
            "probe": {"fps": 25.0, "width": 1920, "height": 1080, "duration": 20.0},
            "shift": {
                "delta_seconds": -0.06,
                "delta_confidence": 0.8,
                "median_iou": 0.7,
                "face_found": 1.0,
                "strip": [
                    {
                        "index": number,
                        "time": 0.4 * number,
                        "annotated": [400.0, 300.0, 800.0, 700.0],
                        "detected": [410.0, 330.0, 790.0, 720.0] if number != 3 else [],
                    }
                    for number in range(8)
                ],
            },
            "seconds": {"download": 1.5, "tracks": 4.0, "crops": 2.5},
            "versions": {"decord": "0.6.0"},
            **fields,
        },
    )
    members: list[Member] = []
    for number in range(tracks):
        indices = tuple(10 + 5 * (number * frames + i) for i in range(frames))
        turns = [round(0.02 * (i - frames // 2), 4) for i in range(frames)]
        inside = round(0.9 - 0.1 * number, 3)
        track = Track(
            name=f"{number:03d}",
            span=f"{number + 1:05d}",
            times=tuple(index / 25 for index in indices),
            indices=indices,
            boxes=tuple((400.0, 300.0, 800.0, 700.0) for _ in indices),
            box_scores=tuple(0.99 for _ in indices),
            scores={"window_side": 700.0 + hue % 300, "inside": inside},
            embedding=tuple(np.eye(8)[hue % 8]),
        )
        made = replace(made, tracks=(*made.tracks, track))
        key = made.track_key(track)
        landmarks = np.stack([face_points(size, turn) for turn in turns])
        matrix = np.tile(np.array([[0.2, 0, 0], [0, 0.2, 0]], np.float32), (frames, 1, 1))
        row = np.array([700.0, inside, 0.99, 50.0, 400.0, 5.0, -3.0, 1.0, 20.0], np.float32)
        scores = np.tile(row, (frames, 1))
        members.append((snapshots.only(key), snapshots.shrink(face_jpeg(size, 0.0, hue))))
        members += [
            (f"{key}.landmarks.npy", npy_bytes(landmarks)),
            (f"{key}.matrix.npy", npy_bytes(matrix)),
            (f"{key}.scores.npy", npy_bytes(scores)),
            (
                f"{key}.embedding.npy",
                npy_bytes(np.tile(np.eye(8, dtype=np.float32)[0], (frames, 1))),
            ),
        ]
        for index, turn in zip(indices, turns, strict=True):
            members += [
                (frame_member(key, index), face_jpeg(size, turn, hue)),
                (frame_member(key, index, "png"), face_labels(size)),
            ]
    if tracks:
        times = sorted(time for track in made.tracks for time in track.times)
        shown = [(number, 0.4 * number) for number in (2, 3, 4)]
        line = snapshots.timeline([(time, "o") for time in times], [0.9], shown, (1920, 1080))
        made = replace(made, timeline=line)
        scene = np.full((270, 480, 3), (90, 20 + hue % 90, 130), np.uint8)
        jpeg = snapshots.encode(scene, snapshots.FRAME_PX)
        members += [(snapshots.of_frame(made.key, index), jpeg) for index, _ in shown]
    return made, members


def some_videos() -> list[Made]:
    """Five people, ten videos: six published, one of them without its second track; one small face, and three that the
    list or the download refused."""
    made = [made_video("id01", f"v{number}") for number in range(3)]
    made += [
        made_video("id02", "v0", split="test"),
        made_video("id03", "v0", split="val", tracks=1),
    ]
    crash, _ = made_video("id04", "v0", tracks=0, shift={})
    short, members = made_video("id05", "v0", tracks=1)
    track = replace(
        short.tracks[0],
        scores={"window_side": 210.0, "inside": 0.8},
        dropped={Cause.CROP_LANDMARKS.value: 3},
    )
    small = reject_track(track, Cause.CROP_SMALL, "window side 210 px < 384 px")
    made += [
        (
            reject(replace(short, tracks=(small,)), Cause.NO_TRACKS, "1 track, none kept"),
            only_snapshots(members),
        ),
        (
            reject(
                crash,
                Cause.DOWNLOAD_PRIVATE,
                "Private video. Sign in if you've been granted access",
            ),
            [],
        ),
        (reject(replace(crash, video="v1"), Cause.DOWNLOAD_NETWORK, "connection reset"), []),
        (reject(replace(crash, video="v2", seconds={}), Cause.LIST_BOXES, "row 3: W is nan"), []),
    ]
    mixed, members = made_video("id02", "v1", split="test")
    mixed = replace(
        mixed,
        tracks=(
            replace(mixed.tracks[0], dropped={Cause.CROP_OUTSIDE.value: 2}),
            reject_track(mixed.tracks[1], Cause.TRACK_SHORT, "0.4 s < 1 s"),
        ),
    )
    kept = [member for member in members if member[0].startswith("id02-v1-000.")]
    return [*made, (mixed, kept + only_snapshots(members))]


def only_snapshots(members: Iterable[Member]) -> list[Member]:
    """What is left of a video that was rejected."""
    return [member for member in members if snapshots.is_snapshot(member[0])]


def commit_all(output: str, made: Iterable[Made]) -> list[shards.Commit]:
    """Commit every video as the last stage does."""
    return [shards.commit(video, members, output, CROP) for video, members in made]


def plan(
    commits: Iterable[shards.Commit], target_mb: float = 512.0
) -> tuple[list[shards.ShardPlan], dict[str, int]]:
    """Shards of all committed samples, and their number by split."""
    kept = [
        (
            commit.video.split,
            commit.video.identity,
            shards.Slice(
                key=key,
                part=commit.video.key,
                sha256=commit.tar_sha256,
                offset=offset,
                length=length,
            ),
        )
        for commit in commits
        for key, (offset, length) in commit.slices.items()
    ]
    return shards.plan_shards(kept, target_mb, {})


def make_dataset(
    output: str,
    made: Iterable[Made],
    refused: Mapping[str, tuple[str, str]] | None = None,
    target_mb: float = 512.0,
) -> dict[str, Any]:
    """Publish a dataset of these videos; returns its manifest.

    Args:
        output: folder or URI.
        made: videos and their members.
        refused: (cause, detail) of the identity filter by sample key.
        target_mb: size of a shard.
    """
    refused = refused or {}
    commits = sorted(commit_all(output, made), key=lambda commit: commit.video.key)
    decisions = {
        key: (commit.video.split, *refused.get(key, ("", "")))
        for commit in commits
        for key in commit.slices
    }
    published = [
        replace(
            commit,
            slices={key: place for key, place in commit.slices.items() if key not in refused},
        )
        for commit in commits
    ]
    plans, buckets = plan(published, target_mb)
    records = [shards.pack(item, output) for item in plans]
    tally = Tally()
    rows = [tally.see(row) for commit in commits for row in shards.ledger_rows(commit, decisions)]
    shards.write_ledger(rows, output)
    listing = [
        {name: record[name] for name in ("name", "split", "bytes", "sha256")}
        | {"samples": len(record["samples"])}
        for record in sorted(records, key=lambda record: record["name"])
    ]
    manifest = {
        "format": "headray",
        "schema_version": SCHEMA_VERSION,
        "dataset_version": 1,
        "config": CONFIG,
        "list_sha256": "0" * 64,
        "counts": tally.counts(),
        "splits": tally.splits(),
        "members": CROP,
        "twins": [],
        "buckets": buckets,
        "shards": listing,
        "index": shards.write_index(records, output) if records else {},
        "tools": {"ray": "2.60.0"},
    }
    report.write(output, manifest)
    if records:
        shards.write_manifest(manifest, output, shards.manifest_version(output))
    return manifest
