"""One frame becomes A, T and T': the same draws every time, the true correspondence kept."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from models.blender.batch import BlenderBatch, join
from models.blender.masks import head_mask
from models.blender.pairs import (
    Frame,
    PairConfig,
    draw,
    make_pair,
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


def test_masks_and_labels_go_with_their_pictures():
    """Every frame has a border of its own; after what is done to it, picture, labels and border still belong together."""
    frames = []
    for number, frame in enumerate((FRAME, SAME, STRANGER)):
        valid = torch.ones(1, SIZE, SIZE)
        valid[..., : 2 + 3 * number] = 0
        frames.append(Frame(torch.where(valid > 0, frame.image, -1.0), frame.labels, valid))
    one, same, stranger = frames
    for changes, target, other in (
        ({}, one, stranger),
        ({"p_mirror": 1}, Frame(*(x.flip(-1) for x in one)), stranger),
        ({"p_other_frame": 1, "p_same_identity": 1}, same, same),
        ({"p_other_frame": 1, "p_mirror": 1}, Frame(*(x.flip(-1) for x in same)), stranger),
    ):
        made = single(paired("key", (one, same, stranger), 0, PairConfig(**(NEVER | changes))))
        assert torch.equal(made.truth_valid, one.valid)
        for found, wanted in (
            ((made.target, made.target_labels, made.target_valid), target),
            ((made.other, made.other_labels, made.other_valid), other),
        ):
            assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
    generator = torch.Generator().manual_seed(0)
    chances = draw(generator, PairConfig(**(NEVER | {"p_affine": 1})))
    chances = chances._replace(turn=torch.tensor([12.0, 7.0]))
    turned = single(make_pair("key", one, same, stranger, chances, generator))
    black = (turned.truth == -1).all(dim=0, keepdim=True)
    assert (turned.truth_valid == 0).sum() > 50
    assert (black != (turned.truth_valid == 0)).float().mean() < 0.05  # outlines are interpolated
    assert torch.equal(turned.target_valid, one.valid)
    assert (turned.truth_valid != one.valid).float().mean() > 0.06


def test_labels_turn_with_the_picture():
    """A picture of the labels themselves: hair on the right."""
    labels = torch.zeros_like(FRAME.labels)
    labels[..., SIZE // 2 :] = ParsingLabel.HAIR
    frame = FRAME._replace(image=(labels / 9.0 - 1).expand(3, -1, -1), labels=labels)
    generator = torch.Generator().manual_seed(0)
    chances = draw(generator, PairConfig(**(NEVER | {"p_affine": 1})))
    for turn in ([12.0, 7.0], [-9.0, 12.0]):
        turned = chances._replace(turn=torch.tensor(turn))
        made = single(make_pair("key", frame, SAME, STRANGER, turned, generator))
        off = (made.truth[0] - (made.animated_labels[0] / 9.0 - 1)).abs() > 0.5
        assert off.float().mean() < 0.05  # outlines are interpolated
        assert (made.animated_labels != labels).float().mean() > 0.05


def test_draws_fill_their_ranges_on_both_sides():
    config = PairConfig(p_affine=1, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05)
    draws = [draw(torch.Generator().manual_seed(seed), config) for seed in range(300)]
    colours = torch.stack([each.colours for each in draws])
    turns = torch.stack([each.turn for each in draws])
    middle, reach = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0.1, 0.2, 0.3, 0.05])
    assert ((colours.amin(dim=0) - (middle - reach)) / reach).abs().max() < 0.05
    assert ((colours.amax(dim=0) - (middle + reach)) / reach).abs().max() < 0.05
    assert -15 <= turns.min() < -14
    assert 14 < turns.max() <= 15
    for coin, share in (("mirrored", 0.7), ("other_frame", 0.3), ("same_identity", 0.5), ("noisy", 0.5), ("reenacted", 0.25), ("replaced", 0.5)):  # fmt: skip
        assert abs(sum(getattr(each, coin) for each in draws) / 300 - share) < 0.1, coin
    unlike = sum(each.other_frame and not each.mirrored for each in draws) / 300
    assert abs(unlike - 0.3 * 0.3) < 0.05, "every coin is thrown by itself"


def test_shearing_is_opencvs():
    """Against a matrix put together by hand: rows are shifted, then everything is turned."""
    image = cv2.GaussianBlur(FRAME.image.permute(1, 2, 0).numpy(), (0, 0), 2)
    for turn, shear in ((0.0, 14.0), (12.0, -9.0)):
        angle, slant = math.radians(turn), math.tan(math.radians(shear))
        turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = turned @ np.array([[1, slant], [0, 1]])  # from the result to the picture
        middle = np.full(2, SIZE / 2 - 0.5)
        matrix = np.column_stack([linear, middle - linear @ middle])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        expected = cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=flags, borderValue=(-1,) * 3)
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        ours = rotate(tensor, torch.tensor([turn, shear])).permute(1, 2, 0).numpy()
        assert np.abs(ours - expected).mean() < 0.01


def test_no_contrast_is_one_grey_and_no_saturation_three_equal_channels():
    flat = recolour(FRAME.image, torch.tensor([1.0, 0, 1, 0]))
    assert flat.std() < 1e-4
    grey = recolour(FRAME.image, torch.tensor([1.0, 1, 0, 0]))
    assert (grey - grey[:1]).abs().max() < 1e-4
    assert grey.std() > 0.05


def test_noise_touches_either_head():
    """Of two heads side by side, both get some."""
    left, right = (FRAME._replace(labels=torch.zeros_like(FRAME.labels)) for _ in range(2))
    left.labels[:, 10:20, 2:8] = ParsingLabel.SKIN
    right.labels[:, 10:20, 24:30] = ParsingLabel.SKIN
    config = PairConfig(**(NEVER | {"p_noise": 1, "p_other_frame": 1}))
    made = [single(paired("key", (left, right, STRANGER), seed, config)) for seed in range(20)]
    sides = torch.stack([one.noise for one in made]).amax(dim=0)
    assert sides[..., :4].any()
    assert sides[..., -4:].any()


def test_noise_is_where_the_turned_head_is():
    """A head at the left, turned by a quarter to the top or the bottom; T has none."""
    frame = FRAME._replace(labels=torch.zeros_like(FRAME.labels))
    frame.labels[:, 13:19, 1:7] = ParsingLabel.SKIN
    nobody = SAME._replace(labels=torch.zeros_like(SAME.labels))
    touched = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        chances = draw(generator, PairConfig(**(NEVER | {"p_noise": 1, "p_other_frame": 1, "p_affine": 1})))  # fmt: skip
        chances = chances._replace(turn=torch.tensor([90.0, 0]))
        made = single(make_pair("key", frame, nobody, STRANGER, chances, generator))
        grown = torch.nn.functional.max_pool2d(head_mask(made.animated_labels), 3, 1, 1)
        if made.noise.any():
            touched.append(bool((made.noise * grown).any()))
    assert len(touched) > 5
    assert all(touched)


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
    batch = join([paired(key, (drawn(i), SAME, STRANGER), i, PairConfig()) for i, key in enumerate("dacb")])  # fmt: skip
    assert len(batch) == 4
    parts = batch.chunk(2)
    assert [part.keys for part in parts] == [["d", "a"], ["c", "b"]]
    assert torch.equal(torch.cat([part.other_labels for part in parts]), batch.other_labels)
    assert torch.equal(batch.to("cpu").truth, batch.truth)
    assert batch.animated_labels.dtype == torch.uint8
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"into {n}"):
            batch.chunk(n)
