"""Colours stay inside their labels and masks, absent labels find a substitute, cycles come back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from models.blender.exemplars import (
    Exemplar,
    View,
    cycle_loss,
    enlarge,
    exemplar_pair,
    fall_back,
    fallback_table,
    make_view,
    transfer,
    transfer_back,
)
from models.blender.masks import GROUPS, group_map, make_masks, to_cells
from models.blender.warp import WarpConfig, unit_features
from models.frozen.parsing import ParsingLabel
from tests.models.blender.scenes import drawn

NAMES = [group.name for group in GROUPS["fine"]]
TABLE = fallback_table("fine")
SHARP = WarpConfig(tau=1e-3)


def view(frame, features) -> View:
    masks = make_masks(frame.labels[None], frame.labels[None], 2)
    groups = group_map(frame.labels[None], masks.ring_t, "fine")
    return make_view(unit_features(features), frame.image[None], groups, to_cells(groups, 15, 2))


def random_features(seed: int) -> torch.Tensor:
    return torch.randn(1, 24, 16, 16, generator=torch.Generator().manual_seed(seed))


def given(a: View, t: View, config: WarpConfig = SHARP, least: int = 1):
    return transfer(a, t, TABLE, config, least=least, still=t.colours)


def test_colours_stay_within_those_of_their_label_in_the_target():
    a, t = view(drawn(0, dx=1), random_features(0)), view(drawn(1, dx=-1), random_features(1))
    found = given(a, t, WarpConfig(tau=0.1))
    assert torch.equal(found.matched, a.groups)
    for group in a.groups.unique().tolist():
        of_a = found.colours.movedim(1, -1)[a.groups == group]
        of_t = t.colours.movedim(1, -1)[t.groups == group]
        if group < 0:
            assert not of_a.any()
        else:
            assert (of_a >= of_t.amin(dim=0) - 1e-6).all()
            assert (of_a <= of_t.amax(dim=0) + 1e-6).all()


def test_the_same_picture_comes_back_through_both_warps():
    one = view(drawn(0), random_features(0))
    there = given(one, one)
    shown = (one.groups >= 0)[:, None]
    torch.testing.assert_close(there.colours, one.colours * shown)
    back, covered = transfer_back(one, one, there, SHARP)
    assert torch.equal(covered[:, None], shown)
    torch.testing.assert_close(back, one.colours * shown)
    assert cycle_loss(one, one, there, SHARP) < 1e-6


def softmax_means(queries, keys, colours, query_groups, key_groups, tau):
    """Equation (8) by a loop: (n, c), (m, c), (m, 3), (n), (m) to (n, 3), and where there is anything."""
    queries, keys = (x - x.mean(dim=1, keepdim=True) for x in (queries, keys))
    cosines = queries @ keys.T / (queries.norm(dim=1)[:, None] * keys.norm(dim=1))
    found, known = torch.zeros(len(queries), 3), torch.zeros(len(queries), dtype=torch.bool)
    for u, group in enumerate(query_groups.tolist()):
        own = (key_groups == group).nonzero().flatten() if group >= 0 else []
        if len(own):
            weights = (cosines[u, own] / tau).exp()
            found[u] = (weights[:, None] * colours[own]).sum(dim=0) / weights.sum()
            known[u] = True
    return found, known


def test_both_warps_and_the_cycle_are_their_equations():
    """Two pairs of pictures that share unequally many labels; some of A's groups live on fallbacks."""
    config = WarpConfig(tau=0.2)
    frames = ((drawn(0, dx=2), drawn(1, dx=-2, without=(ParsingLabel.NOSE, ParsingLabel.L_EYE))), (drawn(2), drawn(3, dx=4)))  # fmt: skip
    views = [(view(a, random_features(i)), view(t, random_features(i + 7))) for i, (a, t) in enumerate(frames)]  # fmt: skip
    losses, shares = [], []
    for a, t in views:
        found = given(a, t, config, least=8)  # T's few cells of a nose count as none
        rows = [x[0].flatten(1).T for x in (a.features, t.features, a.colours, t.colours)]
        of_a, of_t, colours_a, colours_t = rows
        groups_a, groups_t, matched = (x.flatten() for x in (a.groups, t.groups, found.matched))
        there, _ = softmax_means(of_a, of_t, colours_t, matched, groups_t, config.tau)
        alone = (groups_a >= 0) & (matched < 0)
        there[alone] = colours_a[alone]
        torch.testing.assert_close(found.colours[0].flatten(1).T, there, atol=1e-5, rtol=0)
        honest = torch.where(matched == groups_a, groups_a, -1)
        expected, known = softmax_means(of_t, of_a, there, groups_t, honest, config.tau)
        back, covered = transfer_back(a, t, found, config)
        assert torch.equal(covered.flatten(), known)
        torch.testing.assert_close(back[0].flatten(1).T, expected, atol=1e-5, rtol=0)
        losses.append((expected - colours_t).abs()[known].mean())
        shares.append(int(known.sum()))
        torch.testing.assert_close(cycle_loss(a, t, found, config), losses[-1], atol=1e-5, rtol=0)
    assert shares[0] != shares[1]
    a, t = (View(*(torch.cat(parts) for parts in zip(*side, strict=True))) for side in zip(*views, strict=True))  # fmt: skip
    both = cycle_loss(a, t, given(a, t, config, least=8), config)
    torch.testing.assert_close(both, torch.stack(losses).mean(), atol=1e-5, rtol=0)


def test_the_cycle_trains_the_way_there_as_well():
    a, t = view(drawn(0, dx=1), random_features(0)), view(drawn(1), random_features(1))
    found = given(a, t, WarpConfig(tau=0.2))
    found = found._replace(colours=found.colours.detach().requires_grad_())
    cycle_loss(a, t, found, WarpConfig(tau=0.2)).backward()
    assert found.colours.grad.abs().max() > 0


def test_a_mirrored_picture_is_found_by_its_features():
    frame = drawn(0, dx=3)
    features = random_features(0)
    mirrored = frame._replace(image=frame.image.flip(-1), labels=frame.labels.flip(-1))
    found = given(view(frame, features), view(mirrored, features.flip(-1)))
    one = view(frame, features)
    torch.testing.assert_close(found.colours, one.colours * (one.groups >= 0)[:, None])


@pytest.mark.parametrize(
    ("absent", "chain"),
    [
        ("l_brow", ["hair", "skin"]),
        ("ears", ["skin"]),
        ("upper_lip", ["lower_lip", "skin"]),
        ("mouth", []),
        ("glasses", []),
        ("skin", ["nose"]),
        ("r_brow", ["hair", "skin"]),
        ("lower_lip", ["upper_lip", "skin"]),
        ("nose", ["skin"]),
        ("hair", ["l_brow", "r_brow"]),
        ("l_eye", []),
        ("r_eye", []),
        ("earring", []),
    ],
)
def test_an_absent_label_is_replaced_along_its_chain(absent, chain):
    number = NAMES.index(absent)
    a = torch.full((1, 1, 4), number)
    for left in range(len(chain) + 1):
        there = [NAMES.index(name) for name in chain[left:]] + [NAMES.index("hat")]
        t = torch.tensor([there * 4]).reshape(1, 4, -1)
        expected = NAMES.index(chain[left]) if left < len(chain) else -1
        assert (fall_back(a, t, TABLE, 4) == expected).all()
        assert (fall_back(a, t, TABLE, 5) == -1).all()  # four cells are too few then


def test_nothing_serves_in_the_place_of_the_ring():
    ring, skin = len(NAMES), NAMES.index("skin")
    a = torch.full((1, 1, 4), ring)
    assert (fall_back(a, torch.full((1, 4, 4), skin), TABLE, 1) == -1).all()
    assert (fall_back(a, torch.full((1, 4, 4), ring), TABLE, 1) == ring).all()


def test_absent_labels_get_finite_colours_that_are_not_grey():
    a_frame = drawn(0)
    t_frame = drawn(1, without=(ParsingLabel.NOSE, ParsingLabel.L_EYE))
    a, t = view(a_frame, random_features(0)), view(t_frame, random_features(1))
    found = given(a, t, WarpConfig(tau=0.1))
    nose, eye, skin = (NAMES.index(name) for name in ("nose", "l_eye", "skin"))
    colours = found.colours.movedim(1, -1)
    assert (found.matched[a.groups == nose] == skin).all()
    skin_mean = t.colours.movedim(1, -1)[t.groups == skin].mean(dim=0)
    assert (colours[a.groups == nose].mean(dim=0) - skin_mean).abs().max() < 0.1
    assert (found.matched[a.groups == eye] == -1).all()
    own = a.colours.movedim(1, -1)[a.groups == eye]
    assert len(own) > 0
    assert torch.equal(colours[a.groups == eye], own)
    back, covered = transfer_back(a, t, found, SHARP)
    assert back.isfinite().all()
    assert set(t.groups[covered].tolist()) <= set(a.groups.unique().tolist()) - {nose, eye}


def test_a_target_without_a_head_leaves_the_head_and_the_scene_as_they_are():
    a_frame = drawn(0)
    t_frame = drawn(1)
    t_frame = t_frame._replace(labels=torch.zeros_like(t_frame.labels))
    a, t = view(a_frame, random_features(0)), view(t_frame, random_features(1))
    found = given(a, t)
    ring = a.groups == len(NAMES)
    head = (a.groups >= 0) & ~ring
    colours = found.colours.movedim(1, -1)
    assert torch.equal(colours[head], a.colours.movedim(1, -1)[head])
    assert torch.equal(colours[ring], t.colours.movedim(1, -1)[ring])
    assert cycle_loss(a, t, found, SHARP) == 0


def test_enlarged_exemplars_are_zero_outside_and_untouched_by_what_is_beside():
    cells = torch.zeros(1, 8, 8, dtype=torch.bool)
    cells[:, 2:6, 2:5] = True
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 7:26, 8:30] = 1  # wider than its cells on one side
    colours = torch.where(cells[:, None], torch.tensor([0.5, -0.25, 1.0])[:, None, None], 9.0)
    large = enlarge(colours, cells, mask)
    assert not large[(mask == 0).expand_as(large)].any()
    inside = large.movedim(1, -1)[mask[:, 0] > 0]
    torch.testing.assert_close(inside, torch.tensor([0.5, -0.25, 1.0]).expand_as(inside))


def test_an_enlarged_exemplar_without_borders_is_opencvs():
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = torch.ones(1, 8, 8, dtype=torch.bool)
    large = enlarge(colours, whole, torch.ones(1, 1, 32, 32))[0].permute(1, 2, 0).numpy()
    expected = cv2.resize(colours[0].permute(1, 2, 0).numpy(), (32, 32))
    np.testing.assert_allclose(large, expected, atol=1e-5)


def test_pixels_far_from_any_cell_get_the_mean_of_all():
    cells = torch.zeros(1, 8, 8, dtype=torch.bool)
    cells[:, 0, :2] = True
    colours = torch.zeros(1, 3, 8, 8)
    colours[..., 0, 0], colours[..., 0, 1] = 0.2, 0.6
    large = enlarge(colours, cells, torch.ones(1, 1, 32, 32))
    torch.testing.assert_close(large[..., 28:, 28:], torch.full((1, 3, 4, 4), 0.4))


def test_head_and_ring_do_not_bleed_into_each_other():
    frame = drawn(0)
    masks = make_masks(frame.labels[None], frame.labels[None], 2)
    one = view(frame, random_features(0))
    is_ring = (one.groups == len(NAMES))[:, None]
    colours = torch.where(is_ring, -0.5, 0.5).expand(-1, 3, -1, -1) * (one.groups >= 0)[:, None]
    head, ring = exemplar_pair(Exemplar(colours, one.groups), one, masks, len(NAMES))
    torch.testing.assert_close(head, 0.5 * masks.head_a.expand_as(head))
    torch.testing.assert_close(ring, -0.5 * masks.ring_a.expand_as(ring))
