from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest

from pipelines.crops import Cropper, CropsConfig
from pipelines.identities import IdentitiesConfig, IdentityEmbedder
from pipelines.schema import (
    Cause,
    StageResources,
    Track,
    Video,
    VideoRow,
    add_actors,
    frame_member,
    from_row,
    npy_array,
    npy_bytes,
    reject,
    run_stage,
    select_frames,
    to_row,
)
from pipelines.tracks import Tracker, TracksConfig


@pytest.mark.parametrize(
    ("actor", "config"),
    [
        (Tracker, TracksConfig()),
        (Cropper, CropsConfig()),
        (IdentityEmbedder, IdentitiesConfig()),
    ],
)
def test_actors_use_one_thread_so_that_sums_do_not_depend_on_their_cpus(actor, config):
    import torch

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(2)
    cv2.setNumThreads(2)
    try:
        actor(config)
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (1, 1)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def test_frames_are_dropped_everywhere_at_once_and_every_time_counts():
    track = Track(
        name="000",
        span="a",
        times=(0.0, 1.0, 2.0, 3.0),
        indices=(0, 25, 50, 75),
        boxes=tuple((float(i), 0.0, 9.0, 9.0) for i in range(4)),
        box_scores=(0.1, 0.2, 0.3, 0.4),
    )
    video = Video(identity="anna", video="one", tracks=(track,))
    members = [("anna-one-000.scores.npy", npy_bytes(np.arange(4)))]
    members += [(frame_member("anna-one-000", index), b"x") for index in track.indices]
    other = ("anna-one-001.scores.npy", npy_bytes(np.arange(9)))
    for keep in ([True, False, True, True], [True, True, False]):
        track, members = select_frames(
            video, track, [*members, other], np.array(keep), Cause.CROP_LANDMARKS
        )
        assert members.pop() == other
    assert track.dropped == {Cause.CROP_LANDMARKS.value: 2}
    assert (track.indices, track.times, track.box_scores) == ((0, 50), (0.0, 2.0), (0.1, 0.3))
    assert [box[0] for box in track.boxes] == [0.0, 2.0]
    assert [name for name, _ in members[1:]] == [
        "anna-one-000.000000.jpg",
        "anna-one-000.000050.jpg",
    ]
    assert npy_array(members[0][1]).tolist() == [0, 2]


def test_a_row_remembers_the_time_of_every_stage():
    row = to_row(Video(identity="anna", video="one", seconds={"download": 1.5}))
    for name in ("tracks", "crops"):
        row = run_stage(name, lambda video, members: (video, members), row)
    seconds = from_row(row)[0].seconds
    assert list(seconds) == ["download", "tracks", "crops"]
    assert seconds["download"] == 1.5


def test_a_decoder_that_was_too_slow_may_succeed_on_another_day():
    video = Video(identity="anna", video="one")
    assert reject(video, Cause.VIDEO_DEADLINE).state == "failed"
    assert reject(video, Cause.VIDEO_UNREADABLE).state == "rejected"


class Meeting:
    """An actor that answers a row only when as many are with it at once as it was told of."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)

    def __call__(self, row: VideoRow) -> VideoRow:
        self.barrier.wait(120)
        return row


@pytest.mark.slow
def test_one_actor_works_on_several_videos_side_by_side():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = [to_row(Video(identity="anna", video=f"v{number}")) for number in range(6)]
        videos = ray.data.from_items(rows, override_num_blocks=6)
        one = StageResources(num_cpus=0.5, memory_gb=0.1, max_actors=1)
        met = add_actors(videos, Meeting, one, 3, size=3).take_all()
        assert sorted(row["key"] for row in met) == [row["key"] for row in rows]
    finally:
        ray.shutdown()
