"""One frame becomes A, T and T': the same draws every time, the true correspondence kept."""

from __future__ import annotations

import pytest
import torch

from models.blender.batch import collate
from models.blender.masks import head_mask
from models.blender.pairs import Frame, PairConfig, make_pair, mirror, rotate
from models.frozen.parsing import ParsingLabel
from tests.models.blender.scenes import SIZE, drawn

NEVER = {f"p_{name}": 0.0 for name in ("mirror", "other_frame", "same_identity", "noise", "reenacted", "background", "affine")}  # fmt: skip
FRAME, SAME, STRANGER = drawn(0), drawn(0, dx=2), drawn(5, dx=-2)


def pair(seed: int = 0, reenacted=None, **changes):
    config = PairConfig(**(NEVER | changes))
    return make_pair(FRAME, SAME, STRANGER, torch.Generator().manual_seed(seed), config, reenacted=reenacted)  # fmt: skip


def test_the_same_generator_gives_the_same_sample():
    first, second, third = (
        make_pair(FRAME, SAME, STRANGER, torch.Generator().manual_seed(seed), PairConfig())
        for seed in (4, 4, 5)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first.animated, third.animated)


def test_a_is_the_truth_in_other_colours_and_t_is_the_truth():
    made = pair()
    assert torch.equal(made.truth, FRAME.image)
    assert torch.equal(made.target, FRAME.image)
    assert torch.equal(made.animated_labels, FRAME.labels)
    assert (made.animated - FRAME.image).abs().mean() > 0.05
    assert made.animated.abs().max() <= 1
    assert not made.noise.any()
    unchanged = pair(brightness=0, contrast=0, saturation=0, hue=0)
    torch.testing.assert_close(unchanged.animated, FRAME.image, atol=1e-5, rtol=0)


def test_mirroring_moves_labels_with_their_pixels_and_renames_none():
    made = pair(p_mirror=1)
    assert torch.equal(made.target, FRAME.image.flip(-1))
    assert torch.equal(made.target_labels, FRAME.labels.flip(-1))
    assert (made.target_labels == ParsingLabel.L_EYE).sum() == (
        FRAME.labels == ParsingLabel.L_EYE
    ).sum()
    assert torch.equal(made.truth, FRAME.image)
    assert torch.equal(mirror(mirror(FRAME)).image, FRAME.image)


def test_t_prime_is_one_or_the_other():
    assert torch.equal(pair(p_same_identity=1).other, SAME.image)
    assert torch.equal(pair(p_same_identity=0).other, STRANGER.image)
    own = sum(torch.equal(pair(seed, p_same_identity=0.5).other, SAME.image) for seed in range(60))
    assert 18 < own < 42


def test_another_frame_of_the_clip_may_be_the_target():
    made = pair(p_other_frame=1)
    assert torch.equal(made.target, SAME.image)
    assert torch.equal(made.truth, FRAME.image)


def test_the_aligners_picture_replaces_the_head_only():
    reenacted = -FRAME.image
    still = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    made = pair(reenacted=reenacted, p_reenacted=1, **still)
    head = head_mask(FRAME.labels).bool().expand_as(made.animated)
    torch.testing.assert_close(made.animated[head], reenacted[head], atol=1e-5, rtol=0)
    torch.testing.assert_close(made.animated[~head], FRAME.image[~head], atol=1e-5, rtol=0)
    assert torch.equal(made.truth, FRAME.image)
    without = pair(p_reenacted=1, **still)
    torch.testing.assert_close(without.animated, FRAME.image, atol=1e-5, rtol=0)


def test_another_picture_behind_the_head():
    made = pair(p_background=1)
    outside = ~head_mask(FRAME.labels).bool().expand_as(made.animated)
    assert torch.equal(made.animated[outside], STRANGER.image[outside])
    assert torch.equal(made.truth, FRAME.image)


def test_turning_keeps_picture_and_labels_together():
    made = pair(p_affine=1, brightness=0, contrast=0, saturation=0, hue=0)
    torch.testing.assert_close(made.animated, made.truth, atol=1e-5, rtol=0)
    assert not torch.equal(made.truth, FRAME.image)
    assert torch.equal(made.target, FRAME.image)
    hair = FRAME.image[:, FRAME.labels[0] == ParsingLabel.HAIR].mean(dim=1)
    turned = made.truth[:, made.animated_labels[0] == ParsingLabel.HAIR].mean(dim=1)
    assert (hair - turned).abs().max() < 0.2  # outlines are interpolated
    picture = rotate(FRAME.image, 90, 0)
    torch.testing.assert_close(picture, FRAME.image.rot90(1, (1, 2)), atol=1e-4, rtol=0)
    ones = rotate(torch.ones(1, SIZE, SIZE), 45, 0, nearest=True)
    assert ones[0, 0, 0] == 0
    assert ones[0, SIZE // 2, SIZE // 2] == 1
    assert torch.equal(rotate(FRAME.labels, 90, 0, nearest=True), FRAME.labels.rot90(1, (1, 2)))


def test_noise_enlarges_what_is_painted():
    assert sum(bool(pair(seed, p_noise=1).noise.any()) for seed in range(20)) > 15


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (FRAME._replace(labels=FRAME.labels[:, :16]), r"\(1, 1, 16, 32\)"),
        (FRAME._replace(labels=FRAME.labels + 40), "found"),
        (FRAME._replace(labels=FRAME.labels.expand(3, -1, -1)), "coloured picture"),
        (FRAME._replace(image=FRAME.image[:, :16]), r"\(3, 16, 32\)"),
        (FRAME._replace(valid=FRAME.valid[:, :16]), r"\(1, 16, 32\)"),
    ],
)
def test_frames_of_another_form_are_refused(frame: Frame, reason: str):
    for frames in ((frame, SAME, STRANGER), (FRAME, frame, STRANGER), (FRAME, SAME, frame)):
        with pytest.raises(ValueError, match=reason):
            make_pair(*frames, torch.Generator(), PairConfig())


@pytest.mark.parametrize("change", [{"p_mirror": 1.5}, {"hue": 0.6}, {"degrees": 50.0}, {"contrast": -1.0}])  # fmt: skip
def test_impossible_configurations_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PairConfig(**change)


def test_batches_divide_and_travel():
    pairs = [make_pair(drawn(i), SAME, STRANGER, torch.Generator().manual_seed(i), PairConfig()) for i in range(4)]  # fmt: skip
    batch = collate(list("abcd"), pairs)
    assert len(batch) == 4
    parts = batch.chunk(2)
    assert [part.keys for part in parts] == [["a", "b"], ["c", "d"]]
    assert torch.equal(torch.cat([part.other_labels for part in parts]), batch.other_labels)
    assert torch.equal(batch.to("cpu").truth, batch.truth)
    assert batch.animated_labels.dtype == torch.uint8
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"into {n}"):
            batch.chunk(n)
