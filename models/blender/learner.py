"""How the Blender is trained: losses (6) to (11) of HeSer's supplement, two optimisers, one joint step.

Exemplar warping and UNet are trained together ("expecting the sequential two jobs to facilitate each other", §2). The cycles
are part of that step; HeSer.Pytorch takes a step of their own for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from models import losses
from models.blender.batch import BlenderBatch
from models.blender.network import Blended, Blender, BlenderConfig, gray
from models.blender.pairs import put_heads
from models.discriminators import ResidualDiscriminator
from models.ema import Ema
from models.frozen.vgg import Vgg19Features
from models.layers import bare, held_power_iteration
from models.updates import Precision, accumulate, add, autocast, micro_batches, step

PerceptualName = Literal["vgg19", "vgg_normalised_conv3_1", "none"]
PERCEPTUAL_LAYERS: dict[PerceptualName, tuple[str, ...]] = {
    "vgg19": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    "vgg_normalised_conv3_1": ("relu1_1", "relu2_1", "relu3_1"),
    "none": (),
}
"""Layers of equation (6), which names none: the first of each block, as in perceptual losses since pix2pixHD. The Aligner's 13 are LPD's."""
Reenact = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""An Aligner: sources (n, k, 3, E, E), their faces, driving picture and its face → pictures (n, 3, S, S) in [-1, 1]."""
PREVIEW_COLUMNS = (
    "target", "aligned head", "colour exemplar", "inpainting exemplar", "blended", "truth",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BlenderLearnerConfig:
    """Losses' weights and optimisers. The supplement gives no weights; sources are named."""

    network: BlenderConfig = field(default_factory=BlenderConfig)
    """Shape of the Blender."""
    perceptual: PerceptualName = "vgg19"
    """Network of equation (6); ``none`` switches the term off, where no weights can be had."""
    perceptual_weights: tuple[float, ...] = ()
    """λ_l of equation (6), one a layer, as :func:`calibrate` measures them once: 1 in all."""
    l1: float = 10.0
    """λ_1 of equation (7)."""
    cycle: float = 1.0
    """λ_c of equation (8)."""
    cycle_other: float = 1.0
    """λ_c' of equation (9)."""
    adversarial: float = 1.0
    """Weight of equation (11) after the first samples."""
    adversarial_early: float = 0.2
    """The same before. HeSer.Pytorch's weight."""
    adversarial_after: int = 20_000
    """Samples after which the adversarial weight rises: 10,000 steps of a batch of 2."""
    lightness: float = 0.0
    """λ_reg: luma of I^H against that of A on the head. GHOST 2.0 only; off."""
    discriminator_base: int = 64
    """Channels of the discriminator's first stage."""
    discriminator_limit: int = 512
    """Most channels of it."""
    lr: float = 1e-4
    """Of the Blender. Supplement §3.2."""
    discriminator_lr: float = 4e-4
    """Supplement §3.2."""
    clip: float = 10.0
    """Largest norm of a gradient. GHOST 2.0."""
    ema: float = 0.999
    """Share of the average that stays at each step."""
    precision: Precision = "fp32"
    """``fp32`` or ``bf16``; the correspondence and the losses are float32 always."""
    accumulate: int = 1
    """Micro-batches a step."""
    random_init: bool = False
    """Trunk and perceptual network without their weights. For networks whose weights come from elsewhere, and tests of shape and
    speed."""

    def __post_init__(self) -> None:
        if min(self.lr, self.discriminator_lr, self.clip) <= 0:
            raise ValueError(
                f"lr, discriminator_lr and clip must be positive, got {self.lr}, {self.discriminator_lr}, {self.clip}"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.perceptual == "none" and self.perceptual_weights:
            raise ValueError("perceptual_weights have no effect while perceptual is none")


@torch.no_grad()
def calibrate(
    config: BlenderLearnerConfig,
    images: Iterable[Tensor],
    device: torch.device | str = "cpu",
) -> BlenderLearnerConfig:
    """The config with λ_l measured, on ``device``, on batches (b, 3, S, S) in [-1, 1] of real pictures, 256 in all or so.

    Raises:
        WeightsError: the perceptual network's weights are missing or wrong.
    """
    if config.perceptual == "none":
        return config
    vgg = Vgg19Features(PERCEPTUAL_LAYERS[config.perceptual], config.perceptual).to(device)
    weights = losses.calibrated_weights(vgg(batch.to(device)) for batch in images)
    return replace(config, perceptual_weights=weights)


class BlenderLearner:
    """See ``Learner`` in ``pipelines/training.py``."""

    preview_columns = PREVIEW_COLUMNS

    def __init__(
        self,
        config: BlenderLearnerConfig,
        *,
        wrap: Callable[[nn.Module], nn.Module],
        device: torch.device,
        reenact: Reenact | None = None,
    ) -> None:
        """Build networks and optimisers on ``device``.

        Args:
            config: of the learner.
            wrap: goes around each trained network.
            device: where they are.
            reenact: makes the heads of the samples that want an Aligner's; without it they stay recoloured frames.

        Raises:
            WeightsError: weights of the trunk or the perceptual network are missing or wrong.
            ValueError: ``perceptual_weights`` were not calibrated.
        """
        layers = PERCEPTUAL_LAYERS[config.perceptual]
        if len(config.perceptual_weights) != len(layers):
            raise ValueError(
                f"perceptual {config.perceptual} has {len(layers)} layers, perceptual_weights has "
                f"{len(config.perceptual_weights)} values: measure them with calibrate()"
            )
        self.config = config
        self.device = device
        self._reenact = reenact
        blender = Blender(config.network)
        if not config.random_init:
            blender.features.load_trunk()
        discriminator = ResidualDiscriminator(
            5, config.network.size, config.discriminator_base, config.discriminator_limit
        )
        self._blender = wrap(blender.to(device))
        self._discriminator = wrap(discriminator.to(device))
        self._ema = Ema(bare(self._blender), config.ema)
        self._vgg: Vgg19Features | None = None
        if config.perceptual != "none":
            vgg = Vgg19Features(layers, config.perceptual, random_init=config.random_init)
            self._vgg = vgg.to(device)
        self._trained = [p for p in self._blender.parameters() if p.requires_grad]
        self._optimizers = {
            "blender": Adam(self._trained, lr=config.lr, betas=(0.9, 0.999)),
            "discriminator": Adam(
                self._discriminator.parameters(), lr=config.discriminator_lr, betas=(0.9, 0.999)
            ),
        }

    @property
    def networks(self) -> nn.ModuleDict:
        """Blender, discriminator and the average, unwrapped."""
        return nn.ModuleDict(
            {
                "blender": bare(self._blender),
                "discriminator": bare(self._discriminator),
                "ema": self._ema,
            }
        )

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """By the name of what they train."""
        return self._optimizers

    def train_step(self, batch: BlenderBatch, samples_seen: int) -> dict[str, Tensor]:
        """Blender, then discriminator, on the same pictures.

        Raises:
            NonFiniteLossError: before any weight is changed.
        """
        self._blender.train()
        self._discriminator.train()
        batch = self.with_heads(batch)
        weights = self._weights(samples_seen)
        metrics: dict[str, Tensor] = {}
        networks = [self._blender, self._discriminator]
        for part, share in micro_batches(batch, self.config.accumulate, networks):
            with autocast(self.device, self.config.precision):
                blended: Blended = self._blender(part)
            raw = self._losses(part, blended)
            weighted = {name: weights[name] * loss for name, loss in raw.items()}
            accumulate(weighted, part.keys, share)
            loss = self._discriminator_loss(part, blended)
            accumulate({"discriminator": loss}, part.keys, share)
            add(metrics, {f"loss/{name}": x for name, x in raw.items()}, share)
            add(metrics, {"loss/discriminator": loss}, share)
        clip = self.config.clip
        metrics["norm/blender"] = step(self._optimizers["blender"], self._trained, clip)
        metrics["norm/discriminator"] = step(
            self._optimizers["discriminator"], self._discriminator.parameters(), clip
        )
        self._ema.update(bare(self._blender))
        return metrics

    @torch.no_grad()
    def eval_step(self, batch: BlenderBatch) -> dict[str, Tensor]:
        """Losses and PSNR of the averaged network; PSNR on what was painted, on the head and on the rest of it."""
        batch = self.with_heads(batch)
        blended: Blended = self._ema.network(batch)
        masks = blended.masks
        return {
            "loss/l1": losses.l1(blended.image, batch.truth, batch.truth_valid),
            "loss/cycle": blended.cycle,
            "loss/cycle_other": blended.cycle_other,
            "score/psnr_painted": psnr(blended.image, batch.truth, masks.painted * batch.truth_valid),
            "score/psnr_head": psnr(blended.image, batch.truth, masks.head_a * batch.truth_valid),
            "score/psnr_inpainted": psnr(blended.image, batch.truth, masks.ring_a * batch.truth_valid),
        }  # fmt: skip

    @torch.no_grad()
    def preview(self, batch: BlenderBatch) -> Tensor:
        """(b, 3, S, 6 S) in [-1, 1]: the pictures that ``preview_columns`` names, of the averaged network."""
        batch = self.with_heads(batch)
        blended: Blended = self._ema.network(batch)
        head = batch.animated * blended.masks.head_a
        columns = (
            batch.target, head, blended.head_exemplar, blended.ring_exemplar, blended.image,
            batch.truth,
        )  # fmt: skip
        return torch.cat([column.float() for column in columns], dim=3).clamp(-1, 1)

    def export(self) -> nn.Module:
        """The averaged Blender, in evaluation mode."""
        return self._ema.network.eval()

    @torch.no_grad()
    def with_heads(self, batch: BlenderBatch) -> BlenderBatch:
        """The batch with the Aligner's heads in the samples that want one, if there is an Aligner."""
        inputs = (batch.sources, batch.source_faces, batch.driving, batch.driving_face)
        rows = batch.wants_aligner.nonzero().flatten()
        if self._reenact is None or not len(rows):
            return batch
        wanted = [x[rows] for x in inputs if x is not None]
        with autocast(self.device, self.config.precision):
            heads = self._reenact(*wanted)
        return put_heads(batch, losses.exact(heads).to(batch.animated.dtype))

    def _weights(self, samples_seen: int) -> dict[str, float]:
        config = self.config
        is_early = samples_seen < config.adversarial_after
        return {
            "l1": config.l1,
            "perceptual": 1.0,
            "cycle": config.cycle,
            "cycle_other": config.cycle_other,
            "adversarial": config.adversarial_early if is_early else config.adversarial,
            "lightness": config.lightness,
        }

    def _losses(self, batch: BlenderBatch, blended: Blended) -> dict[str, Tensor]:
        """Unweighted, by name; only those that are switched on."""
        config, masks = self.config, blended.masks
        image = losses.exact(blended.image)
        found = {
            "l1": losses.l1(image, batch.truth, batch.truth_valid),
            "cycle": blended.cycle,
            "cycle_other": blended.cycle_other,
        }
        if self._vgg is not None:
            # the black border is the same in both pictures: it is not to be imitated
            inside = batch.truth_valid
            generated = self._vgg(image * inside)
            real = self._vgg(batch.truth * inside)
            found["perceptual"] = losses.feature_matching(
                generated, real, config.perceptual_weights
            )
        if config.lightness:
            found["lightness"] = losses.l1(
                gray(blended.head_exemplar) * masks.head_a, gray(batch.animated) * masks.head_a
            )
        found["adversarial"] = self._adversarial_loss(image, blended)
        return found

    def _adversarial_loss(self, image: Tensor, blended: Blended) -> Tensor:
        """Equation (11). No gradient to the discriminator."""
        discriminator = bare(self._discriminator)
        discriminator.requires_grad_(False)
        with autocast(self.device, self.config.precision):
            scores, _ = discriminator(conditioned(image, blended))
        discriminator.requires_grad_(True)
        return losses.hinge_generator(scores)

    def _discriminator_loss(self, batch: BlenderBatch, blended: Blended) -> Tensor:
        """Equation (10); real and generated pass together. The power iteration of this step was that of (11)."""
        pictures = torch.cat(
            [
                conditioned(batch.truth, blended),
                conditioned(losses.exact(blended.image).detach(), blended),
            ]
        )
        with (
            held_power_iteration(self._discriminator),
            autocast(self.device, self.config.precision),
        ):
            scores, _ = self._discriminator(pictures)
        real, fake = scores.chunk(2)
        return losses.hinge_discriminator(real, fake)


def conditioned(image: Tensor, blended: Blended) -> Tensor:
    """``image ⊙ M_A^H ⊙ M_A^I``, ⊙ being concatenation: (b, 5, S, S)."""
    return torch.cat([image, blended.masks.head_a, blended.masks.ring_a], dim=1)


def psnr(generated: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1] where the mask (b, 1, h, w) is 1, at most 100.

    The mean over the pictures of which something is masked, so that shares of workers add up to the batch.
    """
    squared = ((losses.exact(generated) - real).square() * mask).flatten(1).sum(dim=1)
    pixels = mask.flatten(1).sum(dim=1)
    mean = squared / (3 * pixels).clamp(min=1)
    decibels = 10 * torch.log10(4 / mean.clamp(min=4e-10))  # (b)
    return (decibels * (pixels > 0)).sum() / (pixels > 0).sum().clamp(min=1)
