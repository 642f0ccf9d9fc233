"""One frame becomes A, T and T': the same draws every time, the true correspondence kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models.blender.batch import BlenderBatch, join
from models.blender.masks import head_mask
from models.blender.pairs import (
    Frame,
    PairConfig,
    mirror,
    put_heads,
    recolour,
    rotate,
)
from models.frozen.parsing import ParsingLabel
from tests.models.blender.scenes import SIZE, drawn, paired

NEVER = {f"p_{name}": 0.0 for name in ("mirror", "other_frame", "same_identity", "noise", "reenacted", "background", "affine")}  # fmt: skip
FRAME, SAME, STRANGER = drawn(0), drawn(0, dx=2), drawn(5, dx=-2)


STILL = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


class Sample(SimpleNamespace):
    """The tensors of one sample without the dimension of the batch."""


def single(batch: BlenderBatch) -> Sample:
    assert len(batch) == 1
    return Sample(**{name: x[0] for name, x in batch.tensors().items()})


def pair(seed: int = 0, **changes):
    return single(paired("key", (FRAME, SAME, STRANGER), seed, PairConfig(**(NEVER | changes))))


def test_the_same_generator_gives_the_same_sample():
    first, second, third = (
        paired("key", (FRAME, SAME, STRANGER), seed, PairConfig()).tensors() for seed in (4, 4, 5)
    )
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert not torch.equal(first["animated"], third["animated"])


def test_a_is_the_truth_in_other_colours_and_t_is_the_truth():
    made = pair()
    assert torch.equal(made.truth, FRAME.image)
    assert torch.equal(made.target, FRAME.image)
    assert torch.equal(made.animated_labels, FRAME.labels)
    assert (made.animated - FRAME.image).abs().mean() > 0.05
    assert made.animated.abs().max() <= 1
    assert not made.noise.any()
    unchanged = pair(**STILL)
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
    batch = paired("key", (FRAME, SAME, STRANGER), 0, PairConfig(**(NEVER | STILL | {"p_reenacted": 1})))  # fmt: skip
    assert batch.wants_aligner.tolist() == [True]
    torch.testing.assert_close(batch.animated[0], FRAME.image, atol=1e-5, rtol=0)
    picture = -FRAME.image
    made = single(put_heads(batch, picture[None]))
    head = head_mask(FRAME.labels).bool().expand_as(made.animated)
    torch.testing.assert_close(made.animated[head], picture[head], atol=1e-5, rtol=0)
    assert torch.equal(made.animated[~head], batch.animated[0][~head])
    assert torch.equal(made.truth, FRAME.image)


@pytest.mark.parametrize("seed", range(4))
def test_the_aligners_picture_is_turned_and_recoloured_as_the_frame_was(seed):
    """Were the Aligner perfect, nothing would change."""
    frames = (FRAME, SAME, STRANGER)
    batch = paired("key", frames, seed, PairConfig(**(NEVER | {"p_reenacted": 1, "p_affine": 1})))
    assert batch.turn.abs().min() > 0
    again = put_heads(batch, FRAME.image[None])
    torch.testing.assert_close(again.animated, batch.animated, atol=1e-5, rtol=0)
    other = put_heads(batch, -FRAME.image[None])
    assert (other.animated - batch.animated).abs().mean() > 0.05


def test_only_samples_that_want_a_head_get_one():
    config = PairConfig(**(NEVER | {"p_reenacted": 0.5}))
    batch = join([paired(f"{i}", (drawn(i), SAME, STRANGER), i, config) for i in range(8)])
    wanted = batch.wants_aligner
    assert 0 < wanted.sum() < 8
    heads = torch.zeros(int(wanted.sum()), 3, SIZE, SIZE)
    changed = (put_heads(batch, heads).animated != batch.animated).flatten(1).any(dim=1)
    assert torch.equal(changed, wanted)
    with pytest.raises(ValueError, match="zip"):
        put_heads(batch, heads[:-1])


def test_colours_change_as_they_say():
    grey = torch.full((3, 2, 2), 0.2)
    brighter = recolour(grey, torch.tensor([1.25, 1, 1, 0]))
    torch.testing.assert_close(brighter, torch.full_like(grey, 0.5), atol=1e-5, rtol=0)
    red = torch.stack([torch.ones(2, 2), -torch.ones(2, 2), -torch.ones(2, 2)])
    green = recolour(red, torch.tensor([1.0, 1, 1, 1 / 3]))
    torch.testing.assert_close(green, red.roll(1, 0), atol=1e-4, rtol=0)


def test_another_picture_behind_the_head():
    made = pair(p_background=1)
    outside = ~head_mask(FRAME.labels).bool().expand_as(made.animated)
    assert torch.equal(made.animated[outside], STRANGER.image[outside])
    assert torch.equal(made.truth, FRAME.image)


def test_turning_keeps_picture_and_labels_together():
    made = pair(p_affine=1, **STILL)
    torch.testing.assert_close(made.animated, made.truth, atol=1e-5, rtol=0)
    assert not torch.equal(made.truth, FRAME.image)
    assert torch.equal(made.target, FRAME.image)
    hair = FRAME.image[:, FRAME.labels[0] == ParsingLabel.HAIR].mean(dim=1)
    turned = made.truth[:, made.animated_labels[0] == ParsingLabel.HAIR].mean(dim=1)
    assert (hair - turned).abs().max() < 0.2  # outlines are interpolated
    picture = rotate(FRAME.image, torch.tensor([90.0, 0]))
    torch.testing.assert_close(picture, FRAME.image.rot90(1, (1, 2)), atol=1e-4, rtol=0)
    ones = rotate(torch.ones(1, SIZE, SIZE), torch.tensor([45.0, 0]), nearest=True)
    assert ones[0, 0, 0] == 0
    assert ones[0, SIZE // 2, SIZE // 2] == 1
    assert torch.equal(
        rotate(FRAME.labels, torch.tensor([90.0, 0]), nearest=True), FRAME.labels.rot90(1, (1, 2))
    )


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
            paired("key", frames, 0, PairConfig())


@pytest.mark.parametrize("change", [{"p_mirror": 1.5}, {"hue": 0.6}, {"degrees": 50.0}, {"contrast": -1.0}])  # fmt: skip
def test_impossible_configurations_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PairConfig(**change)


def test_batches_divide_and_travel():
    batch = join([paired(key, (drawn(i), SAME, STRANGER), i, PairConfig()) for i, key in enumerate("abcd")])  # fmt: skip
    assert len(batch) == 4
    parts = batch.chunk(2)
    assert [part.keys for part in parts] == [["a", "b"], ["c", "d"]]
    assert torch.equal(torch.cat([part.other_labels for part in parts]), batch.other_labels)
    assert torch.equal(batch.to("cpu").truth, batch.truth)
    assert batch.animated_labels.dtype == torch.uint8
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"into {n}"):
            batch.chunk(n)
