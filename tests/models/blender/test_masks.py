"""Masks obey their algebra, labels survive the grid, and what is no label map is refused."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from models.blender.masks import (
    GROUPS,
    HEAD_LABELS,
    NO_GROUP,
    cell_colours,
    check_labels,
    dilate,
    draw_noise,
    group_map,
    make_masks,
    to_cells,
)
from models.blender.network import BlenderConfig
from models.frozen.parsing import ParsingLabel
from tests.models.blender.scenes import SIZE, drawn


def label_maps(*frames):
    return torch.stack([frame.labels for frame in frames])


def test_head_is_everything_but_background_neck_and_clothes():
    assert set(HEAD_LABELS) == set(range(1, 14)) | {17, 18}


@pytest.mark.parametrize("label_set", ["fine", "merged8"])
def test_every_label_of_the_head_is_in_one_group(label_set):
    labels = [label for group in GROUPS[label_set] for label in group.labels]
    assert sorted(labels) == sorted(HEAD_LABELS)
    names = [group.name for group in GROUPS[label_set]]
    assert len(names) == (14 if label_set == "fine" else 8)
    assert {name for group in GROUPS[label_set] for name in group.fallback} <= set(names)


def test_masks_obey_the_papers_algebra():
    a, t = label_maps(drawn(0, dx=-3), drawn(1)), label_maps(drawn(2, dx=4), drawn(3))
    noise = torch.stack([draw_noise(torch.ones(1, SIZE, SIZE) * 0, torch.Generator()) for _ in a])
    noise[:, :, :3, :3] = 1
    masks = make_masks(a, t, 2, noise=noise)
    assert (masks.ring_a * masks.head_a).sum() == 0
    assert torch.equal(masks.head_a + masks.ring_a, masks.painted)
    assert (masks.ring_t * masks.head_t).sum() == 0
    assert masks.painted[:, :, :5, :5].all()
    assert (masks.painted >= dilate(torch.maximum(masks.head_a, masks.head_t), 2)).all()
    same = make_masks(a, a, 2)
    assert torch.equal(same.painted, dilate(same.head_a, 2))


def test_dilation_is_opencvs():
    mask = (torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.97).float()
    expected = cv2.dilate(mask[0, 0].numpy(), np.ones((7, 7)))
    np.testing.assert_array_equal(dilate(mask, 3)[0, 0].numpy(), expected)


def test_no_colour_is_taken_from_the_black_border():
    labels = label_maps(drawn(0))
    valid = torch.ones(1, 1, SIZE, SIZE)
    valid[..., :6] = 0
    masks = make_masks(labels, labels, 2, valid_t=valid)
    assert (masks.ring_t * (1 - valid)).sum() == 0
    assert torch.equal(masks.ring_a, make_masks(labels, labels, 2).ring_a)


def test_small_labels_survive_the_grid_and_no_cell_gets_a_label_it_has_not():
    labels = torch.full((1, 1, SIZE, SIZE), int(ParsingLabel.SKIN), dtype=torch.uint8)
    labels[0, 0, 10:12, 8:14] = (
        ParsingLabel.L_EYE
    )  # 12 of 1024 pixels, a quarter or half of each cell of 4 x 4
    groups = group_map(labels, torch.zeros(1, 1, SIZE, SIZE), "fine")
    cells = to_cells(groups, 15, 4)
    eye = [group.name for group in GROUPS["fine"]].index("l_eye")
    assert (cells == eye).sum() == 2
    assert (torch.nn.functional.max_pool2d((groups == eye).float(), 4)[cells == eye] == 1).all()
    nearest = groups[:, 2::4, 2::4]
    assert (nearest == eye).sum() in (0, 1, 2)


def test_a_cell_goes_to_whom_most_of_it_belongs_by_the_root_of_the_areas():
    """960 pixels of skin and 64 of an eye: the eye's weigh sqrt(15) = 3.9 times as much. By area, they would 15 times."""
    eye = [group.name for group in GROUPS["fine"]].index("l_eye")
    labels = torch.full((1, 1, SIZE, SIZE), int(ParsingLabel.SKIN), dtype=torch.uint8)
    labels[0, 0, :2, :1] = (
        ParsingLabel.L_EYE
    )  # 2 of 16 in the first cell, 4 in the second, 3 in the third
    labels[0, 0, :2, 4:6] = ParsingLabel.L_EYE
    labels[0, 0, :3, 8:9] = ParsingLabel.L_EYE
    labels[0, 0, 24:31, 20:27] = ParsingLabel.L_EYE
    labels[0, 0, 24:30, 27] = ParsingLabel.L_EYE
    assert (labels == ParsingLabel.L_EYE).sum() == 64
    cells = to_cells(group_map(labels, torch.zeros(1, 1, SIZE, SIZE), "fine"), 15, 4)
    assert (cells[0, 0, :3] == eye).tolist() == [False, True, False]


def test_the_painted_region_is_as_wide_on_every_size():
    """Radius 8 at 512 (HeSer.Pytorch's kernel of 17)."""
    assert [BlenderConfig(size=size).paint_radius for size in (512, 256, 64)] == [8, 4, 1]
    assert [BlenderConfig(size=size).feather for size in (512, 256)] == [6, 3]


def test_cells_take_the_colour_of_their_own_label_only():
    frame = drawn(0)
    masks = make_masks(frame.labels[None], frame.labels[None], 2)
    groups = group_map(frame.labels[None], masks.ring_t, "fine")
    cells = to_cells(groups, 15, 4)
    colours = cell_colours(frame.image[None], groups, cells, 4)
    for row in range(8):
        for column in range(8):
            block = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            own = groups[0][block] == cells[0, row, column]
            assert own.any()
            expected = frame.image[:, block[0], block[1]][:, own].mean(dim=1)
            torch.testing.assert_close(colours[0, :, row, column], expected)


def test_groups_number_the_ring_last():
    frame = drawn(0)
    masks = make_masks(frame.labels[None], frame.labels[None], 2)
    groups = group_map(frame.labels[None], masks.ring_a, "merged8")
    assert torch.equal(groups[:, None] == 8, masks.ring_a > 0)
    assert torch.equal(groups[:, None] == NO_GROUP, masks.painted == 0)


def test_noise_is_made_of_discs_squares_and_strokes():
    """By how much of its bounding box a drawing fills: a square all of it, a disc π / 4, a slanted stroke little."""
    head = torch.zeros(1, 64, 64)
    head[0, 32, 32] = 1
    fills = []
    for seed in range(150):
        noise = draw_noise(head, torch.Generator().manual_seed(seed))[0]
        if noise.any():
            rows, columns = noise.any(dim=1).sum(), noise.any(dim=0).sum()
            if min(rows, columns) > 7:
                fills.append((noise.sum() / (rows * columns)).item())
    assert sum(fill == 1 for fill in fills) > 3
    assert sum(0.74 < fill < 0.83 for fill in fills) > 3
    assert sum(fill < 0.6 for fill in fills) > 3


def test_noise_touches_the_outline_and_is_a_function_of_the_generator():
    head = make_masks(*[drawn(0).labels[None]] * 2, 2).head_a[0]
    drawings = [draw_noise(head, torch.Generator().manual_seed(i)) for i in range(30)]
    again = draw_noise(head, torch.Generator().manual_seed(3))
    assert torch.equal(drawings[3], again)
    outline = dilate(head[None], 1)[0] - head
    assert all((noise * outline).any() for noise in drawings if noise.any())
    assert sum(bool(noise.any()) for noise in drawings) > 25
    assert sum(bool((noise * (1 - dilate(head[None], 1)[0])).any()) for noise in drawings) > 20
    # discs and squares end at a tenth of the side, strokes at three
    reach = max((noise * (1 - dilate(head[None], 10)[0])).sum().item() for noise in drawings)
    assert 0 < sum(noise.mean().item() for noise in drawings) / 30 < 0.25
    assert reach < 60
    empty = draw_noise(torch.zeros(1, SIZE, SIZE), torch.Generator())
    assert not empty.any()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), r"\(1, 1, 16, 16\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "coloured picture"),
        (torch.full((1, 1, 32, 32), 19, dtype=torch.uint8), "found 19"),
        (torch.zeros(1, 1, 32, 32), "float32"),
        (torch.zeros(32, 32, dtype=torch.uint8), r"\(32, 32\)"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, reason):
    with pytest.raises(ValueError, match=reason):
        check_labels(labels, 32)
