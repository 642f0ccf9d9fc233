"""How the motion model learns: reconstruct one frame of a clip from another and two sets of landmarks.

Zhao, Wu and Guo 2021, supplement section 2: Adam, 140 epochs without an adversarial loss, then as many with it and a
discriminator that learns a hundred times slower; the rate drops after epochs 60 and 80. The paper's loss section is not
known to us: these are first order model's losses less those that train its keypoint detector, and a prior that keeps the
mask from covering what stands still. In the toy that made it a mask of the foreground.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.optim import Adam, Optimizer
from torchvision.utils import flow_to_image

from models.discriminators import PatchDiscriminator
from models.ema import Ema
from models.frozen.vgg import Vgg19Features
from models.losses import feature_matching, l1
from models.motion.batch import MotionBatch
from models.motion.flow import identity_grid
from models.motion.losses import (
    least_squares_discriminator,
    least_squares_generator,
    perceptual,
    pyramid_l1,
    total_variation,
)
from models.motion.network import Motion, MotionConfig, MotionFields
from models.updates import Precision, accumulate, add, autocast, micro_batches, step

PERCEPTUAL_LAYERS = {
    "vgg19": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    "vgg_normalised_conv3_1": ("relu1_1", "relu2_1", "relu3_1"),
}
Network = TypeVar("Network", bound=nn.Module)
COLUMNS = ("source", "driving", "generated", "flow", "mask", "occlusion")


def samples_in_epoch(count: int, repeats: int = 75) -> int:
    """Pairs in an epoch: every video is drawn ``repeats`` times (supplement).

    Args:
        count: what the supplement calls videos. For VoxCeleb1 only identities fit its hours of training (424: 795 steps of
            40 pairs, 0.8 s each; with the 19,550 clips a step would take 18 ms); for FaceForensics it is files.
        repeats: draws of each.
    """
    return count * repeats


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the rates drop. Counted in samples, so that it is the same whatever the batch."""

    epoch_samples: int = samples_in_epoch(424)
    """Pairs in an epoch; the default is VoxCeleb1's 424 training identities."""
    epochs: int = 140
    """Length of a stage (supplement: 140 for VoxCeleb1, 80 for FaceForensics)."""
    drop_epochs: tuple[int, ...] = (60, 80)
    """Epochs after which the rates drop (supplement)."""
    drop_factor: float = 0.1
    """What is left of the rates after a drop (first order model; the supplement does not say)."""

    def __post_init__(self) -> None:
        if self.epoch_samples < 1 or self.epochs < 1 or not 0 < self.drop_factor <= 1:
            raise ValueError(
                f"epoch_samples {self.epoch_samples} and epochs {self.epochs} must be >= 1, "
                f"drop_factor {self.drop_factor} in (0, 1]"
            )
        if (
            list(self.drop_epochs) != sorted(self.drop_epochs)
            or min(self.drop_epochs, default=1) < 1
        ):
            raise ValueError(f"drop_epochs {self.drop_epochs} must increase from 1 or later")

    @property
    def samples(self) -> int:
        """Pairs in a whole stage."""
        return self.epochs * self.epoch_samples

    def steps_in_epoch(self, batch: int) -> int:
        """Whole steps of ``batch`` pairs in an epoch."""
        return self.epoch_samples // batch

    def factor(self, samples_seen: int) -> float:
        """Of the initial rates, once ``samples_seen`` pairs have been used."""
        passed = sum(samples_seen >= epoch * self.epoch_samples for epoch in self.drop_epochs)
        return float(self.drop_factor**passed)


@dataclass(frozen=True, kw_only=True)
class MotionLearnerConfig:
    """Losses, rates, precision."""

    network: MotionConfig = field(default_factory=MotionConfig)
    stage: Literal[1, 2] = 1
    """1 without, 2 with the adversarial losses. Stage 2 starts from the weights of stage 1 with fresh optimizers."""
    schedule: Schedule = field(default_factory=Schedule)
    """Of this stage, counted from its own first sample."""
    lr: float = 2e-4
    """Of motion networks and generator (supplement)."""
    lr_discriminator: float = 2e-6
    """(supplement); with equal rates the discriminator wins."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Of Adam (first order model)."""
    clip: float = 10.0
    """Largest norm of the gradients."""
    features: Literal["vgg19", "vgg_normalised_conv3_1", "none"] = "vgg19"
    """What reconstruction is measured with; ``none`` takes an L1 over the same pyramid and needs no weights."""
    reconstruction: float = 10.0
    """Weight of the features' or the pixels' differences, per scale and layer (first order model)."""
    adversarial: float = 1.0
    """Weight (first order model)."""
    feature_matching: float = 10.0
    """Weight, per block of the discriminator (first order model)."""
    mask_prior: float = 2.0
    """Weight of the mask's mean: 2 against a perceptual loss of about 80: in the toy a prior of 8 % of the loss separated best.
    The loss of ``features="none"`` is a tenth of that, and on few real clips 1 closed the mask before there was a flow worth
    blending in; 0.02 did not (docs/log.md)."""
    total_variation: float = 0.0
    """Weight of differences between neighbours in the global displacement."""
    local_magnitude: float = 0.0
    """Weight of the mean absolute local displacement."""
    discriminator_widths: tuple[int, ...] = (128, 256, 512, 1024)
    """(supplement)"""
    discriminator_norm: Literal["batch", "instance"] = "batch"
    """(supplement: batch; first order model: instance)"""
    discriminator_activation: Literal["relu", "leaky_relu"] = "relu"
    """(supplement: relu; first order model: leaky)"""
    discriminator_padding: int = 0
    """Of its convolutions, pixels (first order model)."""
    discriminator_condition: Literal["none", "landmarks"] = "none"
    """Whether the discriminator also sees the driving landmarks, as one channel of blurred points."""
    ema: float = 0.0
    """Decay of the weight average that is exported; 0 exports the weights themselves, as the paper does."""
    precision: Precision = "fp32"
    """Of convolutions; coordinates, flows and losses are always float32."""
    accumulate: int = 1
    """Micro-batches in a step."""
    random_init: bool = False
    """Features without their weights. For tests of shape and speed."""

    def __post_init__(self) -> None:
        if self.mask_prior and self.network.compose == "fomm":
            raise ValueError(f"mask_prior {self.mask_prior} without a mask: compose is fomm")
        if self.discriminator_condition != "none" and self.stage == 1:
            raise ValueError("discriminator_condition has no effect in stage 1")
        if self.accumulate < 1 or not 0 <= self.ema < 1 or self.clip <= 0:
            raise ValueError(
                f"accumulate {self.accumulate} must be >= 1, ema {self.ema} in [0, 1), clip {self.clip} > 0"
            )


class RealAndFake(nn.Module):
    """The discriminator on real and generated pictures, each normalised by its own batch, in one forward pass.

    One pass, because a ``DistributedDataParallel`` sends its buffers round before each, and torch has refused the backward
    pass through the first after a second (pytorch#22095, #175024).
    """

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (b, c, h, w) twice to their scores."""
        return self.discriminator(real)[0], self.discriminator(fake)[0]


class MotionLearner:
    """Losses, updates and previews of one stage."""

    def __init__(
        self,
        config: MotionLearnerConfig,
        *,
        wrap: Callable[[nn.Module], nn.Module],
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.motion = self._ready(Motion(config.network))
        self._wrapped = wrap(self.motion)
        self.ema = Ema(self.motion, config.ema) if config.ema else None
        self._optimizers: dict[str, Optimizer] = {
            "motion": Adam(self.motion.parameters(), config.lr, config.betas)
        }
        self.discriminator: PatchDiscriminator | None = None
        if config.stage == 2:
            self.discriminator = self._ready(
                PatchDiscriminator(
                    3 + (config.discriminator_condition == "landmarks"),
                    config.discriminator_widths,
                    norm=config.discriminator_norm,
                    activation=config.discriminator_activation,
                    padding=config.discriminator_padding,
                )
            )
            self._real_and_fake = wrap(RealAndFake(self.discriminator))
            self._optimizers["discriminator"] = Adam(
                self.discriminator.parameters(), config.lr_discriminator, config.betas
            )
        self._features: Vgg19Features | None = None
        if config.features != "none":
            layers = PERCEPTUAL_LAYERS[config.features]
            vgg = Vgg19Features(layers, config.features, random_init=config.random_init)
            self._features = vgg.to(device)

    @property
    def networks(self) -> nn.ModuleDict:
        """Trained networks and the average, by name, without wrappers: what a checkpoint holds."""
        named = {"motion": self.motion, "ema": self.ema, "discriminator": self.discriminator}
        return nn.ModuleDict({name: net for name, net in named.items() if net is not None})

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """By the name of the network that each updates."""
        return self._optimizers

    @property
    def preview_columns(self) -> tuple[str, ...]:
        """What :meth:`preview` shows, from left to right."""
        return COLUMNS

    def train_step(self, batch: MotionBatch, samples_seen: int) -> dict[str, Tensor]:
        """One update of every network from one batch, after ``samples_seen`` pairs of this stage.

        Raises:
            NonFiniteLossError: before any weight of the network in question is changed.
        """
        self._set_rates(samples_seen)
        self._train(True)
        metrics: dict[str, Tensor] = {}
        generated: list[Tensor] = []
        for part, share in micro_batches(batch, self.config.accumulate, [self._wrapped]):
            with autocast(self.device, self.config.precision):
                picture, fields = self._wrapped(
                    part.source, part.source_landmarks, part.driving_landmarks
                )
            losses = self._losses(part, picture, fields)
            accumulate(self._weighted(losses), part.keys, share)
            add(metrics, _named(losses) | describe(fields), share)
            generated.append(picture.detach())
        metrics["norm/motion"] = step(
            self._optimizers["motion"], self.motion.parameters(), self.config.clip
        )
        if self.discriminator is not None:
            self._update_discriminator(batch, generated, metrics)
        if self.ema is not None:
            self.ema.update(self.motion)
        return metrics

    @torch.no_grad()
    def eval_step(self, batch: MotionBatch) -> dict[str, Tensor]:
        """Losses and descriptions of a batch, without learning from it.

        ``metric/l1`` has pictures in [0, 1]; ``metric/l1_source`` is what the source itself would get, had nothing moved.
        """
        picture, fields = self._generate(batch)
        losses = {"reconstruction": self._reconstruction(picture, batch.driving)}
        metrics = {
            "metric/l1": l1(picture, batch.driving) / 2,
            "metric/l1_source": l1(batch.source, batch.driving) / 2,
        }
        return _named(losses) | describe(fields) | metrics

    @torch.no_grad()
    def preview(self, batch: MotionBatch) -> Tensor:
        """(b, 3, h, 6 w) in [-1, 1]: :attr:`preview_columns` side by side."""
        picture, fields = self._generate(batch)
        displacement = fields.deformation - identity_grid(picture.shape[-1], picture.device)
        colours = flow_to_image(displacement.permute(0, 3, 1, 2).float().contiguous())
        occlusion = fields.occlusion
        mask = torch.ones_like(occlusion) if fields.mask is None else fields.mask
        grey = [(plane * 2 - 1).expand_as(picture) for plane in (mask, occlusion)]
        shown = [batch.source, batch.driving, picture, colours.float() / 127.5 - 1, *grey]
        return torch.cat(shown, dim=-1)

    def export(self) -> nn.Module:
        """A copy of the network as it is to be used, in evaluation mode."""
        chosen = self.motion if self.ema is None else self.ema.network
        return deepcopy(chosen).eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------- the parts of a step

    def _losses(
        self, batch: MotionBatch, picture: Tensor, fields: MotionFields
    ) -> dict[str, Tensor]:
        """By name, unweighted: of the motion networks and the generator."""
        config = self.config
        losses = {"reconstruction": self._reconstruction(picture, batch.driving)}
        if fields.mask is not None:
            losses["mask_prior"] = fields.mask.mean()
        if config.total_variation:
            losses["total_variation"] = total_variation(fields.global_displacement)
        if config.local_magnitude:
            local = [moved.abs().mean() for moved in fields.local_displacements.values()]
            losses["local_magnitude"] = torch.stack(local).mean()
        if self.discriminator is not None:
            # bare: its weights get no gradients here, so there is nothing for a wrapper to reduce
            self.discriminator.requires_grad_(False)
            with autocast(self.device, config.precision):
                scores, found = self.discriminator(self._seen(picture, batch))
                with torch.no_grad():
                    _, wanted = self.discriminator(self._seen(batch.driving, batch))
            losses["adversarial"] = least_squares_generator(scores)
            losses["feature_matching"] = feature_matching(found, wanted, [1.0] * len(found))
            self.discriminator.requires_grad_(True)
        return losses

    def _weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self.config, name) * loss for name, loss in losses.items()}

    def _reconstruction(self, picture: Tensor, real: Tensor) -> Tensor:
        if self._features is None:
            return pyramid_l1(picture, real)
        return perceptual(picture, real, self._features)

    def _update_discriminator(
        self, batch: MotionBatch, generated: list[Tensor], metrics: dict[str, Tensor]
    ) -> None:
        config = self.config
        assert self.discriminator is not None
        parts = micro_batches(batch, config.accumulate, [self._real_and_fake])
        for (part, share), picture in zip(parts, generated, strict=True):
            with autocast(self.device, config.precision):
                real, fake = self._real_and_fake(
                    self._seen(part.driving, part), self._seen(picture, part)
                )
            losses = {"discriminator": least_squares_discriminator(real, fake)}
            accumulate(losses, part.keys, share)
            scores = {"score/real": real.mean(), "score/generated": fake.mean()}
            add(metrics, _named(losses) | scores, share)
        metrics["norm/discriminator"] = step(
            self._optimizers["discriminator"], self.discriminator.parameters(), config.clip
        )

    def _seen(self, picture: Tensor, batch: MotionBatch) -> Tensor:
        """What the discriminator is shown."""
        if self.config.discriminator_condition == "none":
            return picture
        points = draw_points(batch.driving_landmarks, picture.shape[-1])
        return torch.cat([picture, points], dim=1)

    def _generate(self, batch: MotionBatch) -> tuple[Tensor, MotionFields]:
        """With the weights that :meth:`export` would give."""
        network = self.motion.eval() if self.ema is None else self.ema.network
        with autocast(self.device, self.config.precision):
            picture, fields = network(batch.source, batch.source_landmarks, batch.driving_landmarks)
        self._train(True)
        return picture, fields

    def _train(self, mode: bool) -> None:
        self.motion.train(mode)
        if self.discriminator is not None:
            self.discriminator.train(mode)

    def _set_rates(self, samples_seen: int) -> None:
        factor = self.config.schedule.factor(samples_seen)
        rates = {"motion": self.config.lr, "discriminator": self.config.lr_discriminator}
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def _ready(self, network: Network) -> Network:
        """On the device, with batch statistics over all workers where torch has them (CUDA only)."""
        if self.device.type == "cuda" and distributed.is_initialized():
            network = cast(Network, nn.SyncBatchNorm.convert_sync_batchnorm(network))
        return network.to(self.device)


def describe(fields: MotionFields) -> dict[str, Tensor]:
    """Means that show at once what a network has given up: a dead local network moves nothing, a dead mask is flat."""
    means = {
        "mean/occlusion": fields.occlusion.mean(),
        "mean/global_displacement": fields.global_displacement.abs().mean(),
    }
    if fields.mask is not None:
        means["mean/mask"] = fields.mask.mean()
    for name, moved in fields.local_displacements.items():
        means[f"mean/{name}_displacement"] = moved.abs().mean()
    return {name: mean.detach() for name, mean in means.items()}


def draw_points(landmarks: Tensor, size: int, sigma: float = 0.02) -> Tensor:
    """Points (b, K, 2) in [-1, 1] as blurred dots on one channel (b, 1, size, size), at most 1."""
    axis = identity_grid(size, landmarks.device)[0, :, 0]
    dots = torch.exp(-((landmarks[..., None] - axis) ** 2) / (2 * sigma**2))  # (b, K, 2, size)
    return torch.einsum("bkx,bky->byx", dots[:, :, 0], dots[:, :, 1])[:, None].clamp(max=1)


def _named(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"loss/{name}": loss.detach() for name, loss in losses.items()}
