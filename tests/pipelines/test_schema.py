from __future__ import annotations

import cv2
import pytest

from pipelines.crops import Cropper, CropsConfig
from pipelines.identities import IdentitiesConfig, IdentityEmbedder
from pipelines.schema import Cause, Video, reject
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
