"""Where every pixel comes from: the global and the three local networks of sparse-to-dense motion.

Zhao, Wu and Guo 2021, supplement section 1: encoders see the source image and the source landmarks only, so they run once;
decoders see the driving landmarks. Widths and the blocks that landmarks modulate are the supplement's. Its figure of the
Add Motion layer is lost, and how the local flows join the global one is not said: both are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import exact
from models.motion.flow import cut_patches, identity_grid, paste_patches
from models.motion.layout import Layout, PartName

AdaptiveNormKind = Literal["instance", "batch"]
AdaptivePosition = Literal["norm", "after_block"]
AddMotionKind = Literal["spatial", "broadcast", "concat", "none"]
SkipKind = Literal["none", "unet"]
LocalCompose = Literal["residual", "replace"]


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """How landmarks modulate a block: numbers that every conditioned block of a network shares."""

    vector: int
    """Numbers in the landmark vector, 2 K."""
    hidden: int
    """Width of the small network that turns it into scales and shifts."""
    norm: AdaptiveNormKind
    position: AdaptivePosition


class AdaptiveNorm(nn.Module):
    """Normalise, then scale and shift by what a vector says (AdaIN, Huang and Belongie 2017). Starts as the norm alone."""

    def __init__(self, channels: int, modulation: Modulation) -> None:
        super().__init__()
        norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}
        self.norm = norms[modulation.norm](channels, affine=False)
        last = nn.Linear(modulation.hidden, 2 * channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Linear(modulation.vector, modulation.hidden)
        self.project = nn.Sequential(first, nn.ReLU(inplace=True), last)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """(b, channels, h, w) and (b, 2K) to (b, channels, h, w)."""
        scale, shift = self.project(vector)[:, :, None, None].chunk(2, dim=1)  # (b, channels, 1, 1)
        y: Tensor = (1 + scale) * self.norm(x) + shift
        return y


class MotionBlock(nn.Module):
    """conv3x3, norm, ReLU, and a change of size: average pooling after it, or nearest upsampling before it.

    With a modulation, AdaIN takes the norm's place: instance norm after batch norm would undo it. The position
    ``after_block`` is the literal reading of the supplement, a norm and AdaIN at the block's end.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        direction: Literal["down", "up"],
        modulation: Modulation | None,
    ) -> None:
        super().__init__()
        self.direction = direction
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.adaptive = AdaptiveNorm(outputs, modulation) if modulation else None
        self.is_last = modulation is not None and modulation.position == "after_block"
        self.norm = nn.BatchNorm2d(outputs) if self.adaptive is None or self.is_last else None

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """(b, inputs, h, w) and (b, 2K) to (b, outputs, h/2, w/2) or (b, outputs, 2h, 2w)."""
        if self.direction == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        elif self.adaptive is not None:
            x = self.adaptive(x, vector)
        x = F.relu(x)
        if self.direction == "down":
            x = F.avg_pool2d(x, 2)
        if self.adaptive is not None and self.is_last:
            x = self.adaptive(x, vector)
        return x


class MotionEncoder(nn.Module):
    """Blocks that halve; the last ``num_adaptive`` see the source landmarks."""

    def __init__(self, widths: Sequence[int], num_adaptive: int, modulation: Modulation) -> None:
        super().__init__()
        first = len(widths) - num_adaptive
        self.blocks = nn.ModuleList(
            MotionBlock(inputs, outputs, "down", modulation if index >= first else None)
            for index, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False))
        )

    def forward(self, image: Tensor, vector: Tensor) -> list[Tensor]:
        """(b, 3, s, s) in [-1, 1] and (b, 2K) to the output of every block, (b, width, s / 2^i, s / 2^i)."""
        outputs = [image]
        for block in self.blocks:
            outputs.append(block(outputs[-1], vector))
        return outputs[1:]


class MotionDecoder(nn.Module):
    """Blocks that double; the first ``num_adaptive`` see the driving landmarks."""

    def __init__(
        self,
        encoder_widths: Sequence[int],
        widths: Sequence[int],
        num_adaptive: int,
        modulation: Modulation,
        skip: SkipKind,
    ) -> None:
        super().__init__()
        # The input of block i is as large as the output of encoder block n - 1 - i.
        skipped = [0, *reversed(encoder_widths[:-1])] if skip == "unet" else [0] * len(widths)
        inputs = [encoder_widths[-1], *widths]
        self.blocks = nn.ModuleList(
            MotionBlock(
                inputs[index] + skipped[index],
                outputs,
                "up",
                modulation if index < num_adaptive else None,
            )
            for index, outputs in enumerate(widths)
        )

    def forward(self, hidden: Tensor, skips: Sequence[Tensor], vector: Tensor) -> Tensor:
        """(b, c, s, s), the encoder's outputs to join (none, or deepest last) and (b, 2K) to (b, width, s 2^n, s 2^n)."""
        x = hidden
        for index, block in enumerate(self.blocks):
            if index and skips:
                x = torch.cat([x, skips[-index]], dim=1)
            x = block(x, vector)
        return x


class AddMotion(nn.Module):
    """Tells the hidden representation how far every landmark has moved.

    ``spatial`` adds W (d - s), one value per channel and place, without bias: a driving frame like the source adds exactly
    nothing. ``broadcast`` adds one value per channel, most of which the next instance norm removes: with replicated
    borders a relative change of 8e-7 is left, against 0.7 of ``spatial``. ``concat`` appends W (d - s) and mixes by 1x1.
    """

    def __init__(self, channels: int, side: int, vector: int, kind: AddMotionKind) -> None:
        super().__init__()
        self.kind = kind
        places = 1 if kind == "broadcast" else side
        self.shape = (channels, places, places)
        if kind != "none":
            self.project = nn.Linear(vector, channels * places * places, bias=False)
        if kind == "concat":
            self.mix = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, hidden: Tensor, motion: Tensor) -> Tensor:
        """(b, channels, side, side) and d - s as (b, 2K) to (b, channels, side, side)."""
        if self.kind == "none":
            return hidden
        moved = self.project(motion).unflatten(1, self.shape)
        if self.kind == "concat":
            mixed: Tensor = self.mix(torch.cat([hidden, moved], dim=1))
            return mixed
        return hidden + moved


class MotionTrunk(nn.Module):
    """Encoder, Add Motion, decoder: what the global and the local networks have in common."""

    def __init__(
        self,
        size: int,
        encoder_widths: Sequence[int],
        decoder_widths: Sequence[int],
        num_adaptive: int,
        modulation: Modulation,
        *,
        add_motion: AddMotionKind,
        skip: SkipKind,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.encoder = MotionEncoder(encoder_widths, num_adaptive, modulation)
        side = size >> len(encoder_widths)
        self.add_motion = AddMotion(encoder_widths[-1], side, modulation.vector, add_motion)
        self.decoder = MotionDecoder(encoder_widths, decoder_widths, num_adaptive, modulation, skip)

    def encode(self, image: Tensor, source: Tensor) -> list[Tensor]:
        """(b, 3, s, s) in [-1, 1] and the source's vector (b, 2K) to what :meth:`decode` needs; the last is the hidden."""
        outputs = self.encoder(image, source)
        return outputs if self.skip == "unet" else outputs[-1:]

    def decode(self, encoded: Sequence[Tensor], source: Tensor, driving: Tensor) -> Tensor:
        """The encoded source and both vectors (b, 2K) to (b, width, s, s)."""
        hidden = self.add_motion(encoded[-1], driving - source)
        features: Tensor = self.decoder(hidden, encoded[:-1], driving)
        return features


def zero_head(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that answers zero until it has learned something."""
    head = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.zeros_(head.weight)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    return head


class GlobalMotion(nn.Module):
    """The motion of the head, what is foreground, and what the source cannot show."""

    OCCLUSION_START = 2.0
    """Logit: at the start 88 % of every feature pass."""

    def __init__(self, trunk: MotionTrunk, width: int, *, has_mask: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.displacement = zero_head(width, 2)
        self.mask = zero_head(width, 1) if has_mask else None
        self.occlusion = nn.Conv2d(width, 1, 3, padding=1)
        assert self.occlusion.bias is not None
        nn.init.constant_(self.occlusion.bias, self.OCCLUSION_START)

    def decode(
        self, encoded: Sequence[Tensor], source: Tensor, driving: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Displacement (b, 2, s, s) in normalised units, unbounded; logits of mask (or None) and occlusion (b, 1, s, s)."""
        features = self.trunk.decode(encoded, source, driving)
        mask = None if self.mask is None else exact(self.mask(features))
        return exact(self.displacement(features)), mask, exact(self.occlusion(features))


class LocalMotion(nn.Module):
    """The motion of one part (lids and brow, lips) inside its patch, beyond what the global network says."""

    def __init__(self, trunk: MotionTrunk, width: int, *, has_occlusion: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = zero_head(width, 3 if has_occlusion else 2)

    def decode(self, encoded: Sequence[Tensor], source: Tensor, driving: Tensor) -> Tensor:
        """(b, 2 or 3, p, p): displacement in units of half the patch, and the occlusion's logit."""
        return exact(self.head(self.trunk.decode(encoded, source, driving)))


@dataclass(frozen=True)
class EncodedPart:
    """What a local network remembers of the source."""

    encoded: list[Tensor]
    centre: Tensor
    """(b, 2) of the part in the source, [-1, 1]."""
    vector: Tensor
    """(b, 2 points) about that centre, in half patches."""


@dataclass(frozen=True)
class EncodedSource:
    """What the motion networks remember of the source; independent of any driving frame."""

    encoded: list[Tensor]
    vector: Tensor
    """(b, 2K) landmarks in [-1, 1]."""
    parts: Mapping[PartName, EncodedPart]


@dataclass(frozen=True)
class MotionFields:
    """Everything the motion networks say about one driving frame. Full size, float32 whatever the precision of convolutions."""

    deformation: Tensor
    """(b, s, s, 2) where in the source each pixel comes from, [-1, 1] inside the picture."""
    mask: Tensor | None
    """(b, 1, s, s) in (0, 1): 1 where the warped source is shown, 0 where the source stays. None if nothing uses it."""
    occlusion: Tensor
    """(b, 1, s, s) in (0, 1): 0 where the source cannot show what is needed."""
    global_displacement: Tensor
    """(b, 2, s, s) in normalised units."""
    local_displacements: Mapping[PartName, Tensor]
    """(b, 2, p, p) in half patches."""


class DenseMotion(nn.Module):
    """Landmarks of source and driving frame to dense backward motion.

    The global network moves the head; a local network for each part corrects lids, gaze and lips inside a patch that is cut
    around the part in the source and pasted around the part in the driving frame, where backward flow lives.
    """

    def __init__(
        self,
        global_motion: GlobalMotion,
        local_motions: Mapping[PartName, LocalMotion],
        layout: Layout,
        *,
        size: int,
        patch: int,
        compose: LocalCompose,
    ) -> None:
        super().__init__()
        self.global_motion = global_motion
        self.local_motions = nn.ModuleDict(
            {str(name): part for name, part in local_motions.items()}
        )
        self.layout = layout
        self.size, self.patch = size, patch
        self.patch_half = patch / size
        self.compose = compose

    def encode(self, source: Tensor, landmarks: Tensor) -> EncodedSource:
        """The part that depends on the source only: (b, 3, s, s) in [-1, 1] and (b, K, 2) in [-1, 1]."""
        vector = landmarks.flatten(1)  # (b, 2K)
        parts: dict[PartName, EncodedPart] = {}
        for name in self.layout.parts:
            centre, local = self._locate(name, landmarks)
            patch = cut_patches(source, centre, self.patch_half, self.patch)
            encoded = self._local(name).trunk.encode(patch, local)
            parts[name] = EncodedPart(encoded, centre, local)
        return EncodedSource(self.global_motion.trunk.encode(source, vector), vector, parts)

    def decode(self, source: EncodedSource, landmarks: Tensor) -> MotionFields:
        """The part that is done for every driving frame: (b, K, 2) in [-1, 1] to its motion."""
        displacement, mask, occlusion = self.global_motion.decode(
            source.encoded, source.vector, landmarks.flatten(1)
        )
        grid = identity_grid(self.size, landmarks.device).permute(2, 0, 1)  # (2, s, s)
        deformation = grid + displacement
        local: dict[PartName, Tensor] = {}
        for name, part in source.parts.items():
            centre, vector = self._locate(name, landmarks)
            moved = self._local(name).decode(part.encoded, part.vector, vector)
            pasted, weight = paste_patches(moved, centre, self.patch_half, self.size)
            if self.compose == "residual":
                deformation = deformation + self.patch_half * weight * pasted[:, :2]
            else:
                # the patch itself carries the source's centre to the driving one
                shift = (part.centre - centre)[:, :, None, None]
                patch_deformation = grid + shift + self.patch_half * pasted[:, :2]
                deformation = deformation + weight * (patch_deformation - deformation)
            if moved.shape[1] == 3:
                occlusion = occlusion + weight * pasted[:, 2:]
            local[name] = moved[:, :2]
        return MotionFields(
            deformation=deformation.permute(0, 2, 3, 1),  # (b, s, s, 2)
            mask=None if mask is None else torch.sigmoid(mask),
            occlusion=torch.sigmoid(occlusion),
            global_displacement=displacement,
            local_displacements=local,
        )

    def _local(self, name: PartName) -> LocalMotion:
        network = self.local_motions[name]
        assert isinstance(network, LocalMotion)
        return network

    def _locate(self, name: PartName, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Centre (b, 2) of a part, and its points about it in half patches (b, 2 points)."""
        points = landmarks[:, list(self.layout.parts[name])]
        centre = points.mean(dim=1)
        return centre, ((points - centre[:, None]) / self.patch_half).flatten(1)
