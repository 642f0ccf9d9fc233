from __future__ import annotations

import threading

import cv2
import pytest

from pipelines.crops import Cropper, CropsConfig
from pipelines.identities import IdentitiesConfig, IdentityEmbedder
from pipelines.schema import Cause, StageResources, Video, VideoRow, add_actors, reject, to_row
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
