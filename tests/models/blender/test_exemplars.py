"""Colours stay inside their labels and masks, absent labels find a substitute, cycles come back."""

from __future__ import annotations

import pytest
import torch

from models.blender.exemplars import (
    View,
    cycle_loss,
    enlarge,
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
