"""Losses against their equations written out, and what must not be differentiated."""

import math

import pytest
import torch

from models import losses


def test_l1_with_a_mask_is_the_mean_over_what_it_keeps_of_each_picture():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = (torch.rand(2, 1, 4, 5) > 0.5).float()
    kept = mask.expand_as(a).bool()
    means = [(a[i] - b[i]).abs()[kept[i]].mean() for i in range(2)]
    torch.testing.assert_close(losses.l1(a, b, mask), torch.stack(means).mean())
    torch.testing.assert_close(losses.l1(a, b), torch.nn.functional.l1_loss(a, b))
    assert losses.l1(a, b, torch.zeros(2, 1, 4, 5)) == 0


def test_the_hinge_has_the_values_of_its_equation():
    zero, one = torch.zeros(4), torch.ones(4)
    assert losses.hinge_discriminator(zero, zero) == 2
    assert losses.hinge_discriminator(one, -one) == 0
    assert losses.hinge_discriminator(3 * one, -3 * one) == 0
    assert losses.hinge_discriminator(-one, one) == 4
    assert losses.hinge_generator(3 * one) == -3


def test_feature_matching_is_the_weighted_sum_over_layers():
    a = [torch.zeros(1, 2), torch.zeros(1, 3)]
    b = [torch.full((1, 2), 2.0), torch.full((1, 3), -4.0)]
    assert losses.feature_matching(a, b, [0.5, 0.25]) == 2
    with pytest.raises(ValueError, match="2 and 2 layers with 1"):
        losses.feature_matching(a, b, [1.0])


def test_calibrated_layers_count_the_same():
    torch.manual_seed(0)
    batches = [[torch.randn(n, 4, 3, 3), 100 * torch.randn(n, 8)] for n in (3, 5)]
    weights = losses.calibrated_weights(batches, total=3.0)
    for layer, weight in enumerate(weights):
        pictures = torch.cat([features[layer] for features in batches])
        torch.testing.assert_close(weight * pictures.abs().mean(), torch.tensor(1.5))
    with pytest.raises(ValueError, match="0 pictures"):
        losses.calibrated_weights([])


def test_identity_is_one_minus_the_cosine():
    a = torch.tensor([[1.0, 0], [0, 2]])
    b = torch.tensor([[3.0, 0], [5, 0]])
    torch.testing.assert_close(losses.identity(a, b), torch.tensor(0.5))


def test_dice_is_zero_for_equal_masks_and_follows_its_formula():
    mask = torch.tensor([1.0, 1, 0, 0]).reshape(1, 1, 2, 2)
    assert losses.dice(mask, mask).abs() < 1e-6
    half = torch.full((1, 1, 2, 2), 0.5)
    torch.testing.assert_close(losses.dice(half, mask), torch.tensor(-math.log(2 * 1 / (1 + 2))))
    assert losses.dice(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)) == 0


@pytest.mark.parametrize("loss", [losses.l1, losses.dice, losses.identity])
def test_halves_of_a_batch_add_up_to_it(loss):
    torch.manual_seed(0)
    a, b = torch.rand(4, 3, 4, 5).double(), torch.rand(4, 3, 4, 5).double()
    mask = (
        ((torch.rand(4, 1, 4, 5) > torch.rand(4, 1, 1, 1)).double(),) if loss is losses.l1 else ()
    )
    if loss is losses.identity:
        a, b = a.flatten(1), b.flatten(1)
    halves = [loss(*(x[part] for x in (a, b, *mask))) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, loss(a, b, *mask), rtol=1e-12, atol=0)


def test_references_are_never_differentiated():
    def leaf() -> torch.Tensor:
        return torch.rand(2, 1, 4, 4, requires_grad=True)

    for loss in (losses.l1, losses.dice):
        generated, real = leaf(), leaf()
        loss(generated, real).backward()
        assert generated.grad is not None
        assert real.grad is None
    generated, real = leaf(), leaf()
    losses.identity(generated.flatten(1), real.flatten(1)).backward()
    losses.feature_matching([generated], [real], [1.0]).backward()
    assert real.grad is None


def test_what_autocast_made_coarse_is_compared_in_float32_and_float64_stays():
    assert losses.l1(torch.ones(2).bfloat16(), torch.zeros(2)).dtype == torch.float32
    assert losses.l1(torch.ones(2).double(), torch.zeros(2).double()).dtype == torch.float64
