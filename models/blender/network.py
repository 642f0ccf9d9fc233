"""The Head2Scene Blender (HeSer, Shu et al. 2022, §2 of the supplement): a head is given a scene's colours and painted into it.

Exemplars by semantic-guided warping (``exemplars.py``), then a residual UNet: "a seven-layer deep residual U-type network" is the
wording of Deep Residual U-Net (Zhang et al. 2018), whose three encoding units, bridge and three decoding units are ``resunet7``.
``deep7`` halves the picture six times, for holes wider than the 75 pixels that ``resunet7`` sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blender.batch import BlenderBatch
from models.blender.exemplars import (
    Exemplar,
    View,
    cycle_loss,
    exemplar_pair,
    fallback_table,
    make_view,
    transfer,
)
from models.blender.features import FeatureExtractor, TrunkName, strides_of
from models.blender.masks import (
    GROUPS,
    PAINT_RADIUS,
    LabelSet,
    Masks,
    check_labels,
    dilate,
    group_map,
    make_masks,
    to_cells,
)
from models.blender.warp import WarpConfig
from models.layers import spectral

UNetName = Literal["resunet7", "deep7"]
LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601."""
UNET_INPUTS = 12
"""I^H (3), I^I (3), M_A^H, I_BG (3), M_A^I, gray(I_A) on M_A^H: in this order."""
ENCODERS: dict[UNetName, tuple[int, ...]] = {
    "resunet7": (1, 2, 4, 8),
    "deep7": (1, 1, 2, 4, 8, 8, 8),
}
DECODERS: dict[UNetName, tuple[int, ...]] = {
    "resunet7": (4, 2, 1),
    "deep7": (8, 8, 4, 2, 1, 1),
}
"""Channels of the units, in multiples of the base."""
FEATHER = 6.0
"""How far the blended picture fades into the target outside the painted region, pixels of a 512 px window."""


@dataclass(frozen=True, kw_only=True)
class BlenderConfig:
    """Shape of the Blender; saved with its weights."""

    size: int = 512
    """Side of the window, px. Supplement §3.2."""
    labels: LabelSet = "fine"
    """``fine``, 14 groups of labels as in the supplement's Figure 5, or ``merged8``, those of HeSer.Pytorch."""
    trunk: TrunkName = "vgg19"
    """``vgg19`` (supplement §3.2), ``vgg_normalised_conv3_1`` (ends at stride 4) or ``small`` (trained from scratch)."""
    feature_stride: int = 4
    """Pixels a cell of the correspondence. 4 fits the 9 GB that the supplement saves."""
    feature_width: int = 256
    """Channels of the features."""
    warp: WarpConfig = field(default_factory=WarpConfig)
    """Temperature and back-end of the correspondence."""
    min_cells: int = 4
    """Cells below which a label counts as absent in T."""
    unet: UNetName = "resunet7"
    """``resunet7`` (supplement) or ``deep7``."""
    unet_base: int = 64
    """Channels of the UNet's first unit."""

    def __post_init__(self) -> None:
        if self.feature_stride not in strides_of(self.trunk):
            raise ValueError(
                f"trunk {self.trunk} has features at strides {strides_of(self.trunk)}, not {self.feature_stride}"
            )
        coarsest = max(2 ** (len(ENCODERS[self.unet]) - 1), strides_of(self.trunk)[-1])
        if self.size < coarsest or self.size % coarsest:
            raise ValueError(
                f"size must be a multiple of {coarsest} for {self.unet} on {self.trunk}, got {self.size}"
            )
        if min(self.feature_width, self.unet_base, self.min_cells) < 1:
            raise ValueError(
                "feature_width, unet_base and min_cells must be at least 1, got "
                f"{self.feature_width}, {self.unet_base}, {self.min_cells}"
            )

    @property
    def paint_radius(self) -> int:
        """Of the dilation, pixels of this size."""
        return max(1, round(PAINT_RADIUS * self.size / 512))

    @property
    def feather(self) -> int:
        """Pixels of this size."""
        return max(1, round(FEATHER * self.size / 512))


class ResidualUnit(nn.Module):
    """[ReLU,] 3x3, ReLU, 3x3 beside a 1x1. No instance or batch norm: it would erase the colour that is to be copied."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, is_first: bool = False
    ) -> None:
        super().__init__()
        self.is_first = is_first
        self.first = spectral(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1))
        self.second = spectral(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = spectral(nn.Conv2d(inputs, outputs, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h / stride, w / stride)."""
        y = x if self.is_first else torch.relu(x)
        y = self.second(torch.relu(self.first(y)))
        return y + self.skip(x)


class BlendingUNet(nn.Module):
    """Twelve channels to a picture."""

    def __init__(self, name: UNetName, base: int) -> None:
        super().__init__()
        widths = [base * factor for factor in ENCODERS[name]]
        self.encoders = nn.ModuleList(
            [
                ResidualUnit(inputs, outputs, stride=2 if level else 1, is_first=level == 0)
                for level, (inputs, outputs) in enumerate(
                    zip([UNET_INPUTS, *widths[:-1]], widths, strict=True)
                )
            ]
        )
        self.decoders = nn.ModuleList()
        inputs = widths[-1]
        for factor, skipped in zip(DECODERS[name], widths[-2::-1], strict=True):
            self.decoders.append(ResidualUnit(inputs + skipped, base * factor))
            inputs = base * factor
        self.output = spectral(nn.Conv2d(inputs, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, 12, S, S) to (b, 3, S, S) in [-1, 1]."""
        skipped = []
        for encoder in self.encoders:
            x = encoder(x)
            skipped.append(x)
        for decoder, skip in zip(self.decoders, skipped[-2::-1], strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = decoder(torch.cat([x, skip], dim=1))
        return torch.tanh(self.output(x))


class Blended(NamedTuple):
    """What the Blender makes of a batch."""

    image: Tensor
    """(b, 3, S, S) I_B, in [-1, 1]."""
    head_exemplar: Tensor
    """(b, 3, S, S) I^H: T's colours on the head of A, 0 elsewhere."""
    ring_exemplar: Tensor
    """(b, 3, S, S) I^I: T's surroundings where there is to be painted, 0 elsewhere."""
    masks: Masks
    cycle: Tensor
    """Scalar, equation (8)."""
    cycle_other: Tensor
    """Scalar, equation (9)."""


class Blender(nn.Module):
    """Features, correspondence and UNet."""

    def __init__(self, config: BlenderConfig) -> None:
        """Build without reading any file; ``features.load_trunk()`` fetches a trained trunk before training."""
        super().__init__()
        self.config = config
        self.features = FeatureExtractor(config.trunk, config.feature_stride, config.feature_width)
        self.unet = BlendingUNet(config.unet, config.unet_base)
        self.ring = len(GROUPS[config.labels])
        self.fallbacks: Tensor
        self.register_buffer("fallbacks", fallback_table(config.labels), persistent=False)

    def forward(self, batch: BlenderBatch) -> Blended:
        """A training batch: the blended picture, and both cycles."""
        config = self.config
        masks = make_masks(
            batch.animated_labels,
            batch.target_labels,
            config.paint_radius,
            noise=batch.noise,
            valid_t=batch.target_valid,
        )
        _, ring_other = self._own_masks(batch.other_labels, batch.other_valid)
        both = torch.cat([batch.target, batch.other])
        of_a, of_t = self.features(batch.animated, both)
        a = self._view(of_a, batch.animated, batch.animated_labels, masks.ring_a)
        labels = torch.cat([batch.target_labels, batch.other_labels])
        t = self._view(of_t, both, labels, torch.cat([masks.ring_t, ring_other]))
        target, other = (View(*parts) for parts in zip(*(x.chunk(2) for x in t), strict=True))
        exemplar = self._transfer(a, target, batch.target)
        exemplar_other = self._transfer(a, other, batch.other)
        head, ring = exemplar_pair(exemplar, a, masks, self.ring)
        return Blended(
            image=self._paint(batch.animated, batch.truth, head, ring, masks),
            head_exemplar=head,
            ring_exemplar=ring,
            masks=masks,
            cycle=cycle_loss(a, target, exemplar, config.warp),
            cycle_other=cycle_loss(a, other, exemplar_other, config.warp),
        )

    @torch.no_grad()
    def blend(
        self,
        animated: Tensor,
        animated_labels: Tensor,
        target: Tensor,
        target_labels: Tensor,
        target_valid: Tensor | None = None,
    ) -> Tensor:
        """The head of A in the scene of T, for use: :meth:`repaint` composed over the target.

        Returns:
            (b, 3, S, S): the target's own pixels outside the painted region and a narrow feather around it.
        """
        image, painted = self.repaint(
            animated, animated_labels, target, target_labels, target_valid
        )
        return compose(image, target, painted, self.config.feather)

    @torch.no_grad()
    def repaint(
        self,
        animated: Tensor,
        animated_labels: Tensor,
        target: Tensor,
        target_labels: Tensor,
        target_valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is painted, and where, for whoever composes it over something finer than the window.

        Args:
            animated: (b, 3, S, S) RGB in [-1, 1].
            animated_labels: (b, 1, S, S) uint8, 0..18.
            target: (b, 3, S, S).
            target_labels: (b, 1, S, S).
            target_valid: (b, 1, S, S) 0 in the black border of the target; without it there is none.

        Returns:
            (b, 3, S, S) I_B, worth something in the painted region only; (b, 1, S, S) that region, 0 or 1.

        Raises:
            ValueError: pictures or label maps are not of this form.
        """
        size = self.config.size
        for image in (animated, target):
            if image.ndim != 4 or image.shape[1:] != (3, size, size):
                raise ValueError(
                    f"windows must be (b, 3, {size}, {size}), got {tuple(image.shape)}"
                )
        for labels in (animated_labels, target_labels):
            check_labels(labels, size)
        masks = make_masks(
            animated_labels, target_labels, self.config.paint_radius, valid_t=target_valid
        )
        of_a, of_t = self.features(animated, target)
        a = self._view(of_a, animated, animated_labels, masks.ring_a)
        t = self._view(of_t, target, target_labels, masks.ring_t)
        head, ring = exemplar_pair(self._transfer(a, t, target), a, masks, self.ring)
        image = self._paint(animated, target, head, ring, masks).to(target.dtype)
        return image, masks.painted

    def _own_masks(self, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Head and ring of a picture that gives colours."""
        masks = make_masks(labels, labels, self.config.paint_radius, valid_t=valid)
        return masks.head_t, masks.ring_t

    def _view(self, features: Tensor, image: Tensor, labels: Tensor, ring: Tensor) -> View:
        groups = group_map(labels, ring, self.config.labels)
        cells = to_cells(groups, self.ring + 1, self.config.feature_stride)
        return make_view(features, image, groups, cells)

    def _transfer(self, a: View, t: View, image: Tensor) -> Exemplar:
        still = functional.avg_pool2d(image, self.config.feature_stride)
        return transfer(
            a, t, self.fallbacks, self.config.warp, least=self.config.min_cells, still=still
        )

    def _paint(
        self, animated: Tensor, scene: Tensor, head: Tensor, ring: Tensor, masks: Masks
    ) -> Tensor:
        background = scene * (1 - masks.painted)
        lightness = gray(animated) * masks.head_a
        parts = (
            head, ring, masks.head_a, background, masks.ring_a, lightness,
        )  # fmt: skip
        image: Tensor = self.unet(torch.cat(parts, dim=1))
        return image


def gray(images: Tensor) -> Tensor:
    """(b, 3, h, w) in [-1, 1] to luma (b, 1, h, w) in [-1, 1]."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


def compose(blended: Tensor, target: Tensor, painted: Tensor, feather: int) -> Tensor:
    """Blended where painted, target elsewhere, exactly; between them a ramp of ``feather`` pixels outside the region.

    Args:
        blended: (b, 3, S, S).
        target: (b, 3, S, S).
        painted: (b, 1, S, S) 0 or 1.
        feather: width of the ramp; a region that is empty gives the target itself.
    """
    alpha = feathered(painted, feather)
    return torch.where(alpha > 0, torch.lerp(target, blended, alpha), target)


def feathered(painted: Tensor, feather: int) -> Tensor:
    """A region (b, 1, S, S) of 0 and 1 with a ramp of ``feather`` pixels outside it; 0 beyond."""
    alpha, grown = painted, painted
    for step in range(feather, 0, -1):
        grown = dilate(grown, 1)
        alpha = torch.maximum(alpha, grown * step / (feather + 1))
    return alpha
