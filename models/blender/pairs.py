"""One frame becomes a training sample of the Blender: A is the frame in other colours, T the frame mirrored, truth the frame.

The mirror keeps the correspondence from copying the same position, the other colours make colour transfer necessary
(HeSer.Pytorch, GHOST 2.0). Label maps are mirrored without exchanging left and right: every pixel keeps its own meaning, so the
true correspondence exists. What is drawn comes from the generator that is passed in, in a fixed order: a sample is a function of
(seed, sample index) and of nothing else.

At test time every A is an Aligner's picture. So in a share of the samples the head of A is the Aligner's re-enactment of the
frame. The Aligner runs beside the Blender, on its device; ``put_heads`` then treats its pictures as A was treated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as colour

from models.blender.batch import BlenderBatch
from models.blender.masks import check_labels, draw_noise, head_mask


class Frame(NamedTuple):
    """One window of a person."""

    image: Tensor
    """(3, S, S) RGB in [-1, 1], black outside the frame."""
    labels: Tensor
    """(1, S, S) uint8, 0..18."""
    valid: Tensor
    """(1, S, S) 1 inside the frame, 0 in the black border."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """How far a sample is taken from its frame. ``p_`` are probabilities."""

    brightness: float = 0.4
    """Factor drawn from 1 ± this. HeSer.Pytorch 0.5, GHOST 2.0 0.2; between."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """Shift drawn from ± this, in turns of the colour circle."""
    p_mirror: float = 0.7
    """T is mirrored. HeSer.Pytorch."""
    p_other_frame: float = 0.3
    """T is another frame of the clip."""
    p_same_identity: float = 0.5
    """T' is another frame of the same person; else another person. The test condition is the latter."""
    p_noise: float = 0.5
    """The painted region is enlarged by random shapes at the outlines. GHOST 2.0."""
    p_reenacted: float = 0.25
    """The head of A is an Aligner's re-enactment of the frame; no effect without an Aligner."""
    p_background: float = 0.5
    """What is not head in A is another picture's, so that the ring cannot be matched by it. HeadSwap (impl2)."""
    p_affine: float = 0.3
    """Frame and A are turned and sheared against T. GHOST 2.0."""
    degrees: float = 15.0
    """Most they are turned, and sheared."""

    def __post_init__(self) -> None:
        for name in ("mirror", "other_frame", "same_identity", "noise", "reenacted", "background", "affine"):  # fmt: skip
            if not 0 <= getattr(self, f"p_{name}") <= 1:
                raise ValueError(
                    f"p_{name} is a probability between 0 and 1, got {getattr(self, f'p_{name}')}"
                )
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be between 0 and 0.5 turns, got {self.hue}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.degrees < 45:
            raise ValueError(f"degrees must be at least 0 and below 45, got {self.degrees}")


class Draws(NamedTuple):
    """What chance says of one sample."""

    mirrored: bool
    other_frame: bool
    same_identity: bool
    noisy: bool
    reenacted: bool
    replaced: bool
    turned: bool
    colours: Tensor
    """(4) what :func:`recolour` takes."""
    turn: Tensor
    """(2) degrees of turning and shearing; 0 unless ``turned``."""


def draw(generator: torch.Generator, config: PairConfig) -> Draws:
    """Throw all coins of a sample, always as many."""
    coins = torch.rand(7, generator=generator)
    strengths = 2 * torch.rand(6, generator=generator) - 1  # in [-1, 1)
    p = (
        config.p_mirror, config.p_other_frame, config.p_same_identity, config.p_noise,
        config.p_reenacted, config.p_background, config.p_affine,
    )  # fmt: skip
    mirrored, other, same, noisy, reenacted, replaced, turned = (coins < torch.tensor(p)).tolist()
    reach = (config.brightness, config.contrast, config.saturation, config.hue)
    colours = torch.tensor([1.0, 1, 1, 0]) + strengths[:4] * torch.tensor(reach)
    turn = strengths[4:] * config.degrees * turned
    return Draws(mirrored, other, same, noisy, reenacted, replaced, turned, colours, turn)


def make_pair(
    key: str,
    frame: Frame,
    same: Frame,
    stranger: Frame,
    drawn: Draws,
    generator: torch.Generator,
) -> BlenderBatch:
    """A training sample from one frame: a batch of one.

    Where T is another frame, too, all of the truth counts (the specification wants the painted region alone): what the Blender
    is given around that region is of the truth, not of T, so nothing asks it for a background that it cannot know.

    Args:
        key: of the frame.
        frame: the truth.
        same: another frame of the same clip; may be ``frame`` where there is none.
        stranger: a frame of another person.
        drawn: what is done to them.
        generator: source of the noise.

    Raises:
        ValueError: a frame is not of the form that :class:`Frame` names.
    """
    for one in (frame, same, stranger):
        check_frame(one)
    target = same if drawn.other_frame else frame
    if drawn.mirrored:
        target = mirror(target)
    truth, labels, valid = frame
    if drawn.turned:
        truth = rotate(truth, drawn.turn)
        labels, valid = (rotate(x, drawn.turn, nearest=True) for x in (labels, valid))
    animated = recolour(truth, drawn.colours)
    if drawn.replaced:
        animated = torch.lerp(stranger.image, animated, head_mask(labels))
    heads = torch.maximum(head_mask(labels), head_mask(target.labels))
    noise = draw_noise(heads, generator) * drawn.noisy
    other = same if drawn.same_identity else stranger
    tensors = {
        "animated": animated,
        "animated_labels": labels,
        "target": target.image,
        "target_labels": target.labels,
        "target_valid": target.valid,
        "truth": truth,
        "truth_valid": valid,
        "noise": noise,
        "other": other.image,
        "other_labels": other.labels,
        "other_valid": other.valid,
        "colours": drawn.colours,
        "turn": drawn.turn,
        "wants_aligner": torch.tensor(drawn.reenacted),
    }
    return BlenderBatch(keys=[key], **{name: x[None] for name, x in tensors.items()})


def put_heads(batch: BlenderBatch, heads: Tensor) -> BlenderBatch:
    """The same batch where A's head is a picture of the Aligner's, turned and recoloured as A was.

    Args:
        batch: of which n samples want one.
        heads: (n, 3, S, S) in [-1, 1], of these samples in order.
    """
    animated = batch.animated.clone()
    rows = batch.wants_aligner.nonzero().flatten().tolist()
    for row, head in zip(rows, heads, strict=True):
        if batch.turn[row].any():
            head = rotate(head, batch.turn[row])
        mask = head_mask(batch.animated_labels[row])
        animated[row] = torch.lerp(animated[row], recolour(head, batch.colours[row]), mask)
    return replace(batch, animated=animated)


def check_frame(frame: Frame) -> None:
    """Raises ``ValueError`` naming what is wrong with a frame."""
    image, labels, valid = frame
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"a window is (3, S, S), got {tuple(image.shape)}")
    check_labels(labels[None], image.shape[-1])
    if valid.shape != labels.shape:
        raise ValueError(
            f"the valid mask must be {tuple(labels.shape)} as the labels, got {tuple(valid.shape)}"
        )


def mirror(frame: Frame) -> Frame:
    """Left and right exchanged; labels keep their numbers, a left eye stays a left eye."""
    return Frame(*(x.flip(-1) for x in frame))


def recolour(image: Tensor, colours: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue changed.

    Args:
        image: (3, S, S) in [-1, 1].
        colours: (4) three factors, and the shift of the hue in turns.
    """
    brightness, contrast, saturation, hue = colours.tolist()
    light = (image + 1) / 2
    light = colour.adjust_brightness(light, brightness)
    light = colour.adjust_contrast(light, contrast)
    light = colour.adjust_saturation(light, saturation)
    return colour.adjust_hue(light, hue).clamp(0, 1) * 2 - 1


def rotate(x: Tensor, degrees: Tensor, *, nearest: bool = False) -> Tensor:
    """(c, S, S) turned about its middle and sheared along the rows; black (labels and masks: 0) comes in from outside.

    Args:
        x: picture in [-1, 1], or labels or a mask with ``nearest``.
        degrees: (2) of turning, and of shearing.
        nearest: no new values.
    """
    turn, shear = (math.radians(angle) for angle in degrees.tolist())
    cos, sin, slant = math.cos(turn), math.sin(turn), math.tan(shear)
    matrix = torch.tensor(
        [[[cos, slant * cos - sin, 0.0], [sin, slant * sin + cos, 0.0]]], device=x.device
    )
    grid = functional.affine_grid(matrix, [1, 1, *x.shape[1:]], align_corners=False)
    if nearest:
        picked = functional.grid_sample(x[None].float(), grid, mode="nearest", align_corners=False)
        return picked[0].to(x.dtype)
    return functional.grid_sample(x[None] + 1, grid, align_corners=False)[0] - 1
