"""The Head2Head Aligner of HeSer (Shu et al. 2022): K pictures of one person and another's motion to a picture of the person.

Four encoders describe who (portrait, identity) and how (pose, expression); a perceptron turns the description into the parameters of
adaptive instance norms, which style the generator of latent pose reenactment (LPD, Burkov et al. 2020), grown by one block to 512.

| paper | here |
| --- | --- |
| E_por, E_id, E_pose, E_exp | ``portrait``, ``identities`` (given: its network is frozen and not part of this one), ``pose``, ``expression`` |
| G, the perceptron | ``generator``, its ``hidden`` and ``affine`` |
| I_S, I_T, I_A | ``sources``, ``driving`` and ``driving_face`` (two views of the target), ``Portrait.image`` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, log2, sqrt
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2
from torchvision.models.resnet import Bottleneck, ResNet

from models.frozen.arcface import DIMENSIONS, IdentityName
from models.frozen.vgg import IMAGENET_MEAN, IMAGENET_STD
from models.frozen.weights import find
from models.layers import LPD_EPS, spectral

CONSTANT_SIDE = 4
"""Of the learned constant that the generator starts from, in cells."""
GROUPS, LEAST_GROUP = 32, 8
"""Of GroupNorm: how many (Wu and He 2018), and of how many channels at least: of one channel at 1 x 1 nothing would be left."""
WEIGHTS = {"scratch": (), "imagenet": ("resnext50", "mobilenet_v2")}
"""Entries of ``models.frozen.weights`` that each ``encoder_init`` loads."""

Affine = tuple[Tensor, Tensor]
"""β and γ of one adaptive norm, (b, c) each."""


@dataclass(frozen=True, kw_only=True)
class AlignerConfig:
    """Shape of the Aligner. All dimensions follow from it; saved with the weights."""

    size: int = 512
    """Side of what is generated, pixels: a power of two (512: supplement §3.2)."""
    schedule: Literal["append64", "lpd"] = "append64"
    """``append64``: LPD's generator for half the size, and one up-sampling block after it (supplement §3.2). ``lpd``: LPD's formula for
    the size itself: its own 256 px network, or at 512 the heavier one of HeSer's re-implementations (``lpd256``, ``lpd512``)."""
    base: int = 64
    """Channels of the last block of LPD's schedule; each coarser block has twice as many (LPD)."""
    limit: int = 512
    """Most channels of a block, and those of the constant (LPD)."""
    flat_blocks: int = 2
    """Residual blocks at 4 x 4 before the first up-sampling (LPD)."""
    predict_mask: bool = True
    """A fourth output channel: where the person is; the rest becomes black (LPD)."""
    paper_strict: bool = False
    """The supplement's letter: no mask head, whatever ``predict_mask`` says, and spectral norm on the encoders too."""
    portrait_dim: int = 512
    """d1 (supplement §3.2)."""
    identity: IdentityName = "arcface"
    """The frozen network that ``identities`` come from; d2 is the length of its vector, 512 for ``arcface`` (supplement §3.2)."""
    pose_dim: int = 256
    """d3 (supplement §3.2); with ``motion_encoder: single`` the length of the only motion code."""
    expression_dim: int = 256
    """d4 (supplement §3.2)."""
    hidden: int = 768
    """Width between the perceptron's two layers (supplement §3.2)."""
    motion_encoder: Literal["split", "single"] = "split"
    """``split``: pose from the window and expression from the face (paper). ``single``: one code from the window, which leaked less
    of the target's identity for GHOST 2.0 (table 5)."""
    encoder_size: int = 256
    """Side of the pictures the encoders see, pixels (LPD)."""
    norm: Literal["sync", "frozen", "group"] = "sync"
    """Normalisation of the encoders. ``sync``: batch statistics over all GPUs. ``frozen``: batch norms that keep the statistics they
    start with, for encoders that bring some (``encoder_init: imagenet``, or weights trained before). ``group``: GroupNorm, for fewer than 4 samples per step in all."""
    encoder_init: Literal["scratch", "imagenet"] = "scratch"
    """``imagenet``: training starts from torchvision's weights, and pictures are normalised as those expect."""
    portrait_blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottlenecks in the portrait encoder's four stages: ResNeXt-50 (supplement §3.2)."""
    portrait_groups: int = 32
    """Groups of its convolutions, 4 channels wide each: 32x4d (LPD)."""
    motion_width: float = 1.0
    """Channels of the pose and expression encoders in those of MobileNetV2."""
    is_subject: bool = False
    """The code that says who is trained, too, and part of the weights: a network of one person (fine-tuning; LPD)."""

    def __post_init__(self) -> None:
        least = CONSTANT_SIDE * (4 if self.schedule == "append64" else 2)
        if self.size < least or not log2(self.size).is_integer():
            raise ValueError(f"size must be a power of two from {least} on, got {self.size}")
        if self.encoder_init == "imagenet":
            is_whole = self.portrait_blocks == (3, 4, 6, 3) and self.portrait_groups == 32
            if not is_whole or self.motion_width != 1 or self.norm == "group" or self.paper_strict:
                raise ValueError(
                    "encoder_init imagenet needs whole encoders with batch norm and without spectral norm, got "
                    f"portrait_blocks {self.portrait_blocks}, portrait_groups {self.portrait_groups}, "
                    f"motion_width {self.motion_width}, norm {self.norm}, paper_strict {self.paper_strict}"
                )

    @property
    def has_mask(self) -> bool:
        """Whether there is a mask head."""
        return self.predict_mask and not self.paper_strict

    @property
    def source_dim(self) -> int:
        """Length of the code that says who: d1 + d2."""
        return self.portrait_dim + DIMENSIONS[self.identity]

    @property
    def motion_dim(self) -> int:
        """Length of the code that says how: d3 + d4, or d3."""
        return self.pose_dim + (self.expression_dim if self.motion_encoder == "split" else 0)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at 4 x 4, and those that each up-sampling block makes up to the size."""
        side = self.size // 2 if self.schedule == "append64" else self.size
        count = int(log2(side // CONSTANT_SIDE))
        widths = tuple(min(self.base * 2**i, self.limit) for i in reversed(range(count + 1)))
        return (*widths, widths[-1]) if self.schedule == "append64" else widths


class Portrait(NamedTuple):
    """What the Aligner makes."""

    image: Tensor
    """(b, 3, S, S) RGB in [-1, 1]; with a mask, black where there is nobody."""
    mask: Tensor | None
    """(b, 1, S, S) in (0, 1): the person; None without a mask head."""


# ------------------------------------------------------------------------------------------------- encoders


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm that keeps its statistics; scale and shift are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm:  # noqa: ARG002 - stays in evaluation mode
        """Do nothing."""
        return super().train(False)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with as many of ``GROUPS`` as the channels allow; one group where they are no multiple of ``LEAST_GROUP``."""
    is_divisible = channels % LEAST_GROUP == 0
    return nn.GroupNorm(gcd(GROUPS, channels // LEAST_GROUP) if is_divisible else 1, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "sync": nn.BatchNorm2d,  # the learner makes it SyncBatchNorm, which exists on CUDA only
    "frozen": FrozenBatchNorm,
    "group": group_norm,
}


class Encoder(nn.Module):
    """A picture to one vector, by a network of torchvision."""

    def __init__(self, network: nn.Module, *, is_imagenet: bool, is_spectral: bool) -> None:
        super().__init__()
        self.network = network
        if is_spectral:
            for module in list(network.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    spectral(module)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if is_imagenet else ((0.5,) * 3, (0.5,) * 3)
        shape = (1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """RGB (b, 3, E, E) in [-1, 1] to (b, dim)."""
        vectors: Tensor = self.network(((images + 1) / 2 - self.mean) / self.std)
        return vectors


def portrait_encoder(config: AlignerConfig) -> Encoder:
    """ResNeXt with a linear head."""
    network = ResNet(
        Bottleneck,
        list(config.portrait_blocks),
        num_classes=config.portrait_dim,
        groups=config.portrait_groups,
        width_per_group=4,
        norm_layer=NORMS[config.norm],
    )
    return _encoder(network, config)


def motion_encoder(config: AlignerConfig, dim: int) -> Encoder:
    """MobileNetV2 with a linear head; without dropout, which would make a still head tremble."""
    network = MobileNetV2(
        num_classes=dim, width_mult=config.motion_width, norm_layer=NORMS[config.norm], dropout=0.0
    )
    return _encoder(network, config)


def _encoder(network: nn.Module, config: AlignerConfig) -> Encoder:
    is_imagenet = config.encoder_init == "imagenet"
    return Encoder(network, is_imagenet=is_imagenet, is_spectral=config.paper_strict)


# ------------------------------------------------------------------------------------------------ generator


def adaptive_norm(x: Tensor, affine: Affine) -> Tensor:
    """γ · instance norm(x) + β, for x (b, c, h, w)."""
    shift, scale = affine
    return F.instance_norm(x, eps=LPD_EPS) * scale[..., None, None] + shift[..., None, None]


class GeneratorBlock(nn.Module):
    """Two styled 3x3 convolutions beside a 1x1, which is left out where nothing changes (LPD)."""

    def __init__(self, inputs: int, outputs: int, *, is_up: bool) -> None:
        super().__init__()
        self.widths = (inputs, outputs)
        self.is_up = is_up
        self.first = spectral(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        self.second = spectral(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
        is_identity = inputs == outputs and not is_up
        self.skip = nn.Identity() if is_identity else spectral(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor, first: Affine, second: Affine) -> Tensor:
        """(b, inputs, h, w) to (b, outputs, h, w), or twice the size."""
        y = self._resize(torch.relu(adaptive_norm(x, first)))
        y = self.second(torch.relu(adaptive_norm(self.first(y), second)))
        skipped: Tensor = self.skip(self._resize(x))
        return y + skipped

    def _resize(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else x


class Generator(nn.Module):
    """A code to a picture: a perceptron writes the parameters of every adaptive norm, and they style a learned constant."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.has_mask = config.has_mask
        inputs, *widths = config.widths
        self.constant = nn.Parameter(torch.ones(1, inputs, CONSTANT_SIDE, CONSTANT_SIDE))
        self.blocks = nn.ModuleList(
            GeneratorBlock(inputs, inputs, is_up=False) for _ in range(config.flat_blocks)
        )
        for outputs in widths:
            self.blocks.append(GeneratorBlock(inputs, outputs, is_up=True))
            inputs = outputs
        self.to_image = spectral(nn.Conv2d(inputs, 4 if self.has_mask else 3, 3, padding=1))
        code = config.source_dim + config.motion_dim
        self.hidden = spectral(nn.Linear(code, config.hidden))
        self.affine = spectral(nn.Linear(config.hidden, 2 * sum(self.norm_widths)))
        # The norm bounds the matrix only: at first every γ is about 1 and every β about 0, instead of both about 0
        shifts_and_scales = [
            part for c in self.norm_widths for part in (torch.zeros(c), torch.ones(c))
        ]
        with torch.no_grad():
            self.affine.bias.copy_(torch.cat(shifts_and_scales))

    @property
    def norm_widths(self) -> list[int]:
        """Channels of the adaptive norms in the order in which they are used."""
        widths = [width for block in self._blocks() for width in block.widths]
        return [*widths, self.to_image.in_channels]

    def forward(self, code: Tensor, fade: float = 1.0) -> Portrait:
        """Codes (b, code) to pictures.

        Args:
            code: source code and motion code.
            fade: below 1, the last block is blended with the enlarged picture that was made before it.
        """
        *affines, last = self._affines(code)
        x = before = self.constant.expand(len(code), -1, -1, -1)  # (b, limit, 4, 4)
        pairs = zip(affines[::2], affines[1::2], strict=True)
        for block, (first, second) in zip(self._blocks(), pairs, strict=True):
            before = x
            x = block(x, first, second)
        portrait = self._head(x, last)
        if fade == 1:
            return portrait
        if before.shape[1] != x.shape[1]:
            raise ValueError(
                f"fading needs schedule append64, not {before.shape[1]} to {x.shape[1]} channels"
            )
        coarse = self._head(before, last)
        image = torch.lerp(enlarged(coarse.image), portrait.image, fade)
        if portrait.mask is None or coarse.mask is None:
            return Portrait(image, None)
        return Portrait(image, torch.lerp(enlarged(coarse.mask), portrait.mask, fade))

    def _head(self, x: Tensor, affine: Affine) -> Portrait:
        y = torch.tanh(self.to_image(torch.relu(adaptive_norm(x, affine))))
        if not self.has_mask:
            return Portrait(y, None)
        mask = 0.5 * y[:, 3:] + 0.5
        return Portrait(mask * (y[:, :3] + 1) - 1, mask)

    def _affines(self, code: Tensor) -> list[Affine]:
        """(b, code) to β and γ of every norm."""
        widths = [part for width in self.norm_widths for part in (width, width)]
        parts = self.affine(torch.relu(self.hidden(code))).split(widths, dim=1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _blocks(self) -> Iterator[GeneratorBlock]:
        return (cast(GeneratorBlock, block) for block in self.blocks)


def enlarged(images: Tensor) -> Tensor:
    """(b, c, h, w) to (b, c, 2h, 2w), bilinear."""
    return F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)


# -------------------------------------------------------------------------------------------------- aligner


class Aligner(nn.Module):
    """Sources and motion to a portrait. Codes of sources are means, so their order and their repetition do not matter."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.portrait = portrait_encoder(config)
        self.pose = motion_encoder(config, config.pose_dim)
        is_split = config.motion_encoder == "split"
        self.expression = motion_encoder(config, config.expression_dim) if is_split else None
        self.generator = Generator(config)
        code = nn.Parameter(torch.zeros(1, config.source_dim)) if config.is_subject else None
        self.source_code: nn.Parameter | None
        self.register_parameter("source_code", code)

    def forward(
        self,
        sources: Tensor,
        identities: Tensor,
        driving: Tensor,
        driving_face: Tensor,
        fade: float = 1.0,
    ) -> Portrait:
        """Make the sources' person move like the driving picture.

        Args:
            sources: (b, k, 3, E, E) in [-1, 1], whole windows of one person.
            identities: (b, k, d2) raw vectors of the identity network for the same pictures.
            driving: (b, 3, E, E) in [-1, 1], whole window of whoever moves.
            driving_face: (b, 3, E, E) in [-1, 1], its face; not looked at by a single motion encoder.
            fade: see :class:`Generator`.
        """
        source_code = self.encode_sources(sources, identities)
        return self.generate(source_code, self.encode_motion(driving, driving_face), fade)

    def encode_sources(self, sources: Tensor, identities: Tensor) -> Tensor:
        """Who: (b, k, 3, E, E) and (b, k, d2) to (b, d1 + d2). Wanted once per person.

        A network of one person says who it is itself and looks at no picture.
        """
        if self.source_code is not None:
            return self.source_code.expand(len(sources), -1)
        k = sources.shape[1]
        portrait = self.portrait(sources.flatten(0, 1)).unflatten(0, (-1, k)).mean(dim=1)  # (b, d1)
        identity = F.normalize(identities.mean(dim=1), dim=1) * sqrt(identities.shape[2])  # (b, d2)
        return torch.cat([portrait, identity.to(portrait.dtype)], dim=1)

    def encode_motion(self, driving: Tensor, driving_face: Tensor) -> Tensor:
        """How: two views (b, 3, E, E) to (b, d3 + d4)."""
        pose: Tensor = self.pose(driving)
        if self.expression is None:
            return pose
        return torch.cat([pose, self.expression(driving_face)], dim=1)

    def generate(self, source_code: Tensor, motion_code: Tensor, fade: float = 1.0) -> Portrait:
        """Codes (b, d1 + d2) and (b, d3 + d4) to pictures."""
        portrait: Portrait = self.generator(torch.cat([source_code, motion_code], dim=1), fade)
        return portrait


# ------------------------------------------------------------------------------- weights from other networks


def load_imagenet(aligner: Aligner) -> None:
    """Start the encoders from torchvision's ImageNet weights; their heads stay as they are.

    Raises:
        WeightsError: a file is missing or wrong.
    """
    motion = [encoder for encoder in (aligner.pose, aligner.expression) if encoder is not None]
    pairs = [(aligner.portrait, "resnext50", "fc.")]
    pairs += [(encoder, "mobilenet_v2", "classifier.") for encoder in motion]
    for encoder, name, head in pairs:
        state = torch.load(find(name), map_location="cpu", weights_only=True)
        kept = {key: value for key, value in state.items() if not key.startswith(head)}
        kept |= {
            key: value
            for key, value in encoder.network.state_dict().items()
            if key.startswith(head)
        }
        encoder.network.load_state_dict(kept)


def grow(aligner: Aligner) -> Aligner:
    """The same network for twice the size: one more block, whose effect is faded in (``fade`` from 0 to 1).

    At ``fade`` 0 it makes the smaller network's pictures, enlarged. Raises ``ValueError`` unless the schedule is ``lpd``.
    """
    if aligner.config.schedule != "lpd":
        raise ValueError(f"only a network of schedule lpd can grow, not {aligner.config.schedule}")
    config = replace(aligner.config, schedule="append64", size=2 * aligner.config.size)
    grown = Aligner(config)
    state = grown.state_dict()
    block = f"generator.blocks.{len(aligner.generator.blocks)}."
    for name, value in aligner.state_dict().items():
        state[name] = _with_rows_for_a_block(name, value, config)
    fresh = {name for name in state if name.startswith(block)}
    assert set(state) - fresh == set(aligner.state_dict())
    grown.load_state_dict(state)
    return grown.train(aligner.training)


def _with_rows_for_a_block(name: str, value: Tensor, config: AlignerConfig) -> Tensor:
    """The last layer of the perceptron with parameters for the new block's norms, γ 1 and β 0; anything else as it is.

    Rows of zeros leave its largest singular value, by which all rows are divided, as it was.
    """
    layer = "generator.affine."
    if not name.startswith(layer) or name.endswith("._v"):
        return value
    width = config.widths[-1]
    rows = value.new_zeros(4 * width, *value.shape[1:])
    if name == f"{layer}bias":
        rows = torch.cat([value.new_zeros(width), value.new_ones(width)]).repeat(2)
    return torch.cat([value[: -2 * width], rows, value[-2 * width :]])


LPD_SUFFIXES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
    "bias": "bias",
}
LPD_IDENTITY = 512
"""Length of LPD's identity embedding, the first columns of its perceptron; its pose embedding follows."""


def import_lpd(
    aligner: Aligner, state: Mapping[str, Tensor], identity_columns: int = LPD_IDENTITY
) -> None:
    """Take over the generator of latent pose reenactment, all of it.

    LPD's identity embedding stands in for the portrait code, its pose embedding for the pose code; what it has no counterpart of gets
    columns of zeros. LPD writes 0.75 tanh + 0.5 in [0, 1] where this network writes tanh in [-1, 1], so its first pictures have
    two thirds of the contrast.

    Args:
        aligner: schedule ``lpd`` of LPD's size, or ``append64`` of twice that, which keeps a fresh last block.
        state: the state dictionary of LPD's generator (``generator`` in its checkpoints), not fine-tuned.
        identity_columns: length of its identity embedding.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; nothing was changed.
    """
    config = aligner.config
    generator = aligner.generator
    own = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    count = len(generator.blocks) - (config.schedule == "append64")
    names = lpd_names(config.flat_blocks, count, generator.has_mask)
    unknown, missing = sorted(set(state) - set(names)), sorted(set(names) - set(state))
    if unknown or missing:
        raise ValueError(f"not LPD's generator for {config}: missing {missing}, unknown {unknown}")
    for name, target in names.items():
        value = state[name]
        if target == "generator.hidden.parametrizations.weight.original":
            value = _spread_columns(value, config, identity_columns)
        elif target == "generator.hidden.parametrizations.weight.0._v":
            value = _spread_columns(value[None], config, identity_columns)[0]
        if config.schedule == "append64":
            value = _with_rows_for_a_block(target, value, config)
        if value.shape != own[target].shape:
            raise ValueError(
                f"{name} becomes {tuple(value.shape)}, {target} is {tuple(own[target].shape)}"
            )
        own[target] = value
    generator.load_state_dict({name.removeprefix("generator."): v for name, v in own.items()})


def lpd_names(flat_blocks: int, blocks: int, has_mask: bool) -> dict[str, str]:
    """Names in LPD's generator → names in the Aligner, for a generator of so many blocks.

    Raises ``ValueError`` without a mask head: LPD always has one.
    """
    if not has_mask:
        raise ValueError("LPD's generator predicts a mask: import it with predict_mask")
    layers = {"affine_params_projector.0": "hidden", "affine_params_projector.2": "affine"}
    layers[f"decoder_blocks.{blocks + 2}"] = "to_image"
    styled = []
    for i in range(blocks):
        first, second = (3, 7) if i < flat_blocks else (4, 8)
        inner = {f"decoder_blocks.{i}.block.{first}": f"blocks.{i}.first"}
        inner[f"decoder_blocks.{i}.block.{second}"] = f"blocks.{i}.second"
        layers |= inner
        styled += list(inner)
        if i >= flat_blocks:
            layers[f"decoder_blocks.{i}.skip.1"] = f"blocks.{i}.skip"
    names = {"constant.constant": "generator.constant"}
    for theirs, ours in layers.items():
        for suffix, own in LPD_SUFFIXES.items():
            if suffix != "bias" or theirs not in styled:  # convolutions between norms have no bias
                names[f"{theirs}.{suffix}"] = f"generator.{ours}.{own}"
    return names


def _spread_columns(weight: Tensor, config: AlignerConfig, identity_columns: int) -> Tensor:
    """(rows, LPD's identity + pose) to (rows, all codes of the Aligner), zeros for codes that LPD has not."""
    spread = weight.new_zeros(len(weight), config.source_dim + config.motion_dim)
    pose_columns = weight.shape[1] - identity_columns
    if identity_columns > config.portrait_dim or pose_columns > config.pose_dim:
        raise ValueError(
            f"codes of {identity_columns} and {pose_columns} do not fit into {config.portrait_dim} and {config.pose_dim}"
        )
    spread[:, :identity_columns] = weight[:, :identity_columns]
    start = config.source_dim
    spread[:, start : start + pose_columns] = weight[:, identity_columns:]
    return spread
