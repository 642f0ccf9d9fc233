"""How the Aligner learns (HeSer, supplement §1 and §3.2): one person's picture is made again from others of the same person.

A step makes the picture once, updates everything that made it, then the discriminator on the same picture (LPD's order).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from models import losses
from models.aligner.batch import AlignerBatch
from models.aligner.network import Aligner, AlignerConfig, Portrait, load_imagenet
from models.discriminators import ResidualDiscriminator
from models.ema import Ema
from models.frozen.arcface import IdentityNetwork, crop_faces, load_identity_network
from models.frozen.vgg import Vgg19Features
from models.layers import bare, held_power_iteration
from models.metrics import csim
from models.updates import Precision, accumulate, add, autocast, micro_batches, step

logger = logging.getLogger(__name__)

Wrap = Callable[[nn.Module], nn.Module]
VGG_LAYERS = tuple(
    f"relu{block}_{i}"
    for block, depth in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 1))
    for i in range(1, depth + 1)
)
"""The 13 layers of LPD."""


@dataclass(frozen=True, kw_only=True)
class AlignerLearnerConfig:
    """Losses and optimisation. Weights of losses are not in the paper: those here are explained in spec-head-swap §2.7."""

    network: AlignerConfig = field(default_factory=AlignerConfig)
    """Shape of what is trained."""
    discriminator_base: int = 64
    """Channels of the discriminator's first stage (LPD)."""
    discriminator_limit: int = 512
    """Most channels of a stage (LPD)."""
    discriminator_stages: int = 7
    """Stages, each with one feature to match (LPD)."""
    l1: float = 30.0
    """λ of equation (1) (GHOST 2.0)."""
    vgg: Literal["none", "vgg19", "vgg_normalised_conv3_1"] = "vgg19"
    """Network of equation (2)'s first sum; ``none`` leaves it out."""
    vgg_layers: tuple[str, ...] = VGG_LAYERS
    """Layers that are compared (LPD)."""
    vgg_weights: tuple[float, ...] = ()
    """λ_l of these layers as :func:`calibrated` found them; empty: one each, divided by their number."""
    vgg_features: float = 1.0
    """Multiplies the whole sum over VGG's layers."""
    identity_weights: tuple[float, ...] = ()
    """λ_l of the identity network's four stages as :func:`calibrated` found them; empty: a quarter each."""
    identity_features: float = 1.0
    """Multiplies the whole sum over the identity network's stages."""
    discriminator_features: float = 10.0
    """Multiplies the mean over the discriminator's stages (LPD)."""
    identity: float = 2.0
    """λ of equation (3)."""
    adversarial: float = 1.0
    """Multiplies equation (5) (LPD)."""
    dice: float = 1.0
    """Multiplies the mask's loss; without a mask head there is none (LPD)."""
    lr: float = 1e-4
    """Adam's learning rate for encoders and generator (supplement §3.2)."""
    discriminator_lr: float = 4e-4
    """For the discriminator (supplement §3.2)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's (supplement §3.2)."""
    clip: float = 10.0
    """Largest norm of the gradients of either side (GHOST 2.0)."""
    precision: Precision = "fp32"
    """``bf16``: networks run in bfloat16 where autocast allows it; losses and frozen networks stay in float32."""
    accumulate: int = 1
    """Micro-batches into which a rank's batch is divided; must divide it."""
    ema_decay: float = 0.999
    """Of the average of the weights, per step (LPD)."""
    fade_samples: int = 0
    """Samples over which the last block of a grown network is faded in; 0: it is there from the start."""
    random_init: bool = False
    """Frozen networks without their weights. For tests of shape and speed."""

    def __post_init__(self) -> None:
        counts = {"vgg_weights": len(self.vgg_layers), "identity_weights": 4}
        for name, count in counts.items():
            found = len(getattr(self, name))
            if found not in (0, count):
                raise ValueError(f"{name} has {found} numbers for {count} layers")
        if self.fade_samples and self.network.schedule != "append64":
            raise ValueError(f"fade_samples is for schedule append64, not {self.network.schedule}")


class Frozen(NamedTuple):
    """The networks that measure and are never trained."""

    identity: IdentityNetwork
    vgg: Vgg19Features | None


def load_frozen(config: AlignerLearnerConfig, device: torch.device) -> Frozen:
    """Load what the losses are measured with. Raises ``WeightsError`` when a file is missing or wrong."""
    random = config.random_init
    identity = load_identity_network(config.network.identity, random_init=random)
    vgg = None
    if config.vgg != "none":
        vgg = Vgg19Features(config.vgg_layers, config.vgg, random_init=random)
        vgg = vgg.to(device)
    return Frozen(identity.to(device), vgg)


class AlignerLearner:
    """Networks, optimizers and the step. Satisfies ``pipelines.training.Learner``."""

    def __init__(self, config: AlignerLearnerConfig, *, wrap: Wrap, device: torch.device) -> None:
        self.config = config
        self.device = device
        aligner = Aligner(config.network)
        if config.network.encoder_init == "imagenet":
            load_imagenet(aligner)
        if config.network.norm == "sync" and device.type == "cuda" and distributed.is_initialized():
            aligner = cast(Aligner, nn.SyncBatchNorm.convert_sync_batchnorm(aligner))
        discriminator = ResidualDiscriminator(
            3,
            config.network.size,
            config.discriminator_base,
            config.discriminator_limit,
            config.discriminator_stages,
        )
        self.ema = Ema(aligner, config.ema_decay).to(device)
        self.aligner = wrap(aligner.to(device))
        self.discriminator = wrap(discriminator.to(device))
        self.frozen = load_frozen(config, device)
        self._optimizers: dict[str, Optimizer] = {
            "aligner": Adam(self.aligner.parameters(), lr=config.lr, betas=config.betas),
            "discriminator": Adam(
                self.discriminator.parameters(), lr=config.discriminator_lr, betas=config.betas
            ),
        }
        for term, reason in self.terms_off.items():
            logger.info("the Aligner trains without %s: %s", term, reason)

    @property
    def networks(self) -> nn.ModuleDict:
        """What a checkpoint holds, unwrapped: ``aligner``, ``discriminator``, ``ema``."""
        return nn.ModuleDict(
            {
                "aligner": bare(self.aligner),
                "discriminator": bare(self.discriminator),
                "ema": self.ema,
            }
        )

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """One per side of the game; fine-tuning puts others in their place."""
        return self._optimizers

    @property
    def terms_off(self) -> dict[str, str]:
        """Losses that are left out, and why; for the summary."""
        off = {}
        if self.frozen.vgg is None:
            off["VGG's feature matching"] = "vgg is none"
        if not self.frozen.identity.has_gradient:
            off["identity and its feature matching"] = (
                f"{self.config.network.identity} has no gradient"
            )
        if not self.config.network.has_mask:
            off["the mask"] = "there is no mask head"
        return off

    @property
    def preview_columns(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`preview`."""
        mask = ("mask",) if self.config.network.has_mask else ()
        return ("source", "target", "generated", *mask, "averaged")

    # -------------------------------------------------------------------------------------------- training

    def train_step(self, batch: AlignerBatch, samples_seen: int) -> dict[str, Tensor]:
        """One update of the Aligner, one of the discriminator, one of the average; what was minimised, unweighted.

        Raises:
            NonFiniteLossError: on every rank, before any weight of that side changed.
        """
        config = self.config
        fade = min(1.0, samples_seen / config.fade_samples) if config.fade_samples else 1.0
        metrics: dict[str, Tensor] = {}
        made: list[tuple[Tensor, Tensor]] = []

        self.discriminator.requires_grad_(False)
        both = (self.aligner, self.discriminator)
        for part, share in micro_batches(batch, config.accumulate, both):
            with torch.no_grad():
                identities = self.identities(part.source_faces)
            with autocast(self.device, config.precision):
                portrait: Portrait = self.aligner(
                    part.sources, identities, part.driving, part.driving_face, fade
                )
            portrait = exact(portrait)
            generated = self.compared(portrait.image, part, is_generated=True)
            real = self.compared(part.target, part)
            raw = self.generator_losses(portrait, generated, real, part)
            weighted = {name: self.loss_weights[name] * loss for name, loss in raw.items()}
            accumulate(weighted, part.keys, share)
            add(metrics, {f"loss/{name}": loss for name, loss in raw.items()}, share)
            made.append((generated.detach(), real))
        metrics["norm/aligner"] = step(
            self._optimizers["aligner"], self.aligner.parameters(), config.clip
        )

        self.discriminator.requires_grad_(True)
        parts = micro_batches(batch, config.accumulate, (self.discriminator,))
        for (part, share), (generated, real) in zip(parts, made, strict=True):
            with autocast(self.device, config.precision):
                # one pass over both: a wrapped network must see one forward per backward
                scores, _ = self.discriminator(torch.cat([real, generated]))
            real_scores, fake_scores = scores.chunk(2)
            loss = losses.hinge_discriminator(real_scores, fake_scores)
            accumulate({"discriminator": loss}, part.keys, share)
            seen = {
                "loss/discriminator": loss,
                "score/real": real_scores.mean(),
                "score/generated": fake_scores.mean(),
            }
            add(metrics, seen, share)
        metrics["norm/discriminator"] = step(
            self._optimizers["discriminator"], self.discriminator.parameters(), config.clip
        )

        self.ema.update(bare(self.aligner))
        return metrics

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each of :meth:`generator_losses` is multiplied with."""
        config = self.config
        return {
            "l1": config.l1,
            "vgg_features": config.vgg_features,
            "identity_features": config.identity_features,
            "discriminator_features": config.discriminator_features,
            "identity": config.identity,
            "adversarial": config.adversarial,
            "dice": config.dice,
        }

    def generator_losses(
        self, portrait: Portrait, generated: Tensor, real: Tensor, part: AlignerBatch
    ) -> dict[str, Tensor]:
        """Equations (1), (2), (3), (5) and the mask's, unweighted.

        Args:
            portrait: what the network made.
            generated: its image as :meth:`compared`.
            real: the target, the same way.
            part: the micro-batch.
        """
        config = self.config
        raw = {"l1": losses.l1(generated, real, part.target_valid)}
        if self.frozen.vgg is not None:
            with torch.no_grad():
                reference = self.frozen.vgg(real)
            weights = config.vgg_weights or even(len(config.vgg_layers))
            raw["vgg_features"] = losses.feature_matching(
                self.frozen.vgg(generated), reference, weights
            )
        if self.frozen.identity.has_gradient:
            with torch.no_grad():
                real_vector, reference = self.look_at_faces(real, part)
            vector, features = self.look_at_faces(generated, part)
            weights = config.identity_weights or even(len(features))
            raw["identity_features"] = losses.feature_matching(features, reference, weights)
            raw["identity"] = losses.identity(vector, real_vector)
        # Not the wrapped network: its weights get no gradient here, for which a wrapper would wait
        discriminator = bare(self.discriminator)
        with autocast(self.device, config.precision):
            scores, features = discriminator(generated)
            with torch.no_grad(), held_power_iteration(discriminator):
                _, reference = discriminator(real)
        raw["discriminator_features"] = losses.feature_matching(
            features, reference, even(len(features))
        )
        raw["adversarial"] = losses.hinge_generator(scores)
        if portrait.mask is not None:
            valid = part.target_valid
            raw["dice"] = losses.dice(portrait.mask * valid, part.target_foreground * valid)
        return raw

    def compared(
        self, images: Tensor, batch: AlignerBatch, *, is_generated: bool = False
    ) -> Tensor:
        """Pictures (b, 3, S, S) as losses see them: black outside the frame, and the target black outside the person if there is a mask head."""
        keep = batch.target_valid
        if self.config.network.has_mask and not is_generated:
            keep = keep * batch.target_foreground
        return keep * (images + 1) - 1

    def identities(self, faces: Tensor) -> Tensor:
        """Faces (b, k, 3, fh, fw) to raw vectors (b, k, d2)."""
        return self.frozen.identity.embedding(faces.flatten(0, 1)).unflatten(0, faces.shape[:2])

    def look_at_faces(self, images: Tensor, batch: AlignerBatch) -> tuple[Tensor, list[Tensor]]:
        """Pictures (b, 3, S, S) in the targets' pose to identity vectors (b, d2) and features of their faces."""
        network = self.frozen.identity
        vectors, features = network(crop_faces(images, batch.target_face_matrix, network.size))
        return vectors, features

    # ------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def eval_step(self, batch: AlignerBatch) -> dict[str, Tensor]:
        """How well the average of the weights does.

        ``loss/l1`` and ``health/csim_self`` are of the persons' own motion, which also rewards a network that copies the driver.
        So, of batches of two and more, every sample is driven by the next one's target, too: ``health/csim_cross`` is the cosine
        with its own sources, ``health/leakage`` the cosine with the driver minus that. A leakage that rises towards 0 says that
        the motion encoders tell who drives (GHOST 2.0, §4). Batches should hold different persons.
        """
        identities = self.identities(batch.source_faces)
        portrait = self.average(batch, identities, shift=0)
        generated = self.compared(portrait.image, batch, is_generated=True)
        real = self.compared(batch.target, batch)
        target_vectors, _ = self.look_at_faces(real, batch)
        metrics = {
            "loss/l1": losses.l1(generated, real, batch.target_valid),
            "health/csim_self": csim(
                self.look_at_faces(generated, batch)[0], target_vectors
            ).mean(),
        }
        if portrait.mask is not None:
            valid = batch.target_valid
            metrics["loss/dice"] = losses.dice(
                portrait.mask * valid, batch.target_foreground * valid
            )
        if len(batch) > 1:
            crossed = self.average(batch, identities, shift=-1).image
            driver = replace(batch, target_face_matrix=batch.target_face_matrix.roll(-1, 0))
            vectors, _ = self.look_at_faces(crossed, driver)
            own = csim(vectors, identities).mean()
            metrics["health/csim_cross"] = own
            metrics["health/leakage"] = csim(vectors, target_vectors.roll(-1, 0)).mean() - own
        return metrics

    def average(self, batch: AlignerBatch, identities: Tensor, *, shift: int) -> Portrait:
        """Portraits by the averaged weights; each sample is driven by the one ``-shift`` places on."""
        driving, face = batch.driving.roll(shift, 0), batch.driving_face.roll(shift, 0)
        with autocast(self.device, self.config.precision):
            portrait = self.ema.network(batch.sources, identities, driving, face)
        return exact(portrait)

    @torch.no_grad()
    def preview(self, batch: AlignerBatch) -> Tensor:
        """(b, 3, S, S x columns) in [-1, 1]; see :attr:`preview_columns`."""
        identities = self.identities(batch.source_faces)
        inputs = (batch.sources, identities, batch.driving, batch.driving_face)
        current = bare(self.aligner)
        is_training = current.training
        current.eval()
        with autocast(self.device, self.config.precision):
            portrait = current(*inputs)
            averaged = self.ema.network(*inputs)
        current.train(is_training)
        size = batch.target.shape[-2:]
        source = F.interpolate(batch.sources[:, 0], size, mode="bilinear", antialias=True)
        columns = [source.clamp(-1, 1), self.compared(batch.target, batch), portrait.image]
        if portrait.mask is not None:
            columns.append(portrait.mask.expand(-1, 3, -1, -1) * 2 - 1)
        columns.append(averaged.image)
        return torch.cat([column.float() for column in columns], dim=3)

    def export(self) -> nn.Module:
        """The averaged Aligner in evaluation mode. While a block is being faded in, it is exported at full strength."""
        return self.ema.network


def exact(portrait: Portrait) -> Portrait:
    """The same portrait in float32 or better."""
    mask = None if portrait.mask is None else losses.exact(portrait.mask)
    return Portrait(losses.exact(portrait.image), mask)


def even(count: int) -> tuple[float, ...]:
    """Weights of a mean."""
    return (1 / count,) * count


@torch.no_grad()
def calibrated(
    config: AlignerLearnerConfig, batches: Iterable[AlignerBatch], device: torch.device
) -> AlignerLearnerConfig:
    """The config with λ_l of equation (2) measured on real targets, so that every layer of a network counts the same.

    256 targets are enough. The numbers are to be kept: they are part of the config of a run and of its checkpoints.
    """
    frozen = load_frozen(config, device)
    vgg: list[list[Tensor]] = []
    identity: list[list[Tensor]] = []
    for batch in batches:
        target = batch.target.to(device)
        if frozen.vgg is not None:
            vgg.append(magnitudes(frozen.vgg(target)))
        if frozen.identity.has_gradient:
            matrix = batch.target_face_matrix.to(device)
            faces = crop_faces(target, matrix, frozen.identity.size)
            identity.append(magnitudes(frozen.identity.features(faces)))
    if vgg:
        config = replace(config, vgg_weights=losses.calibrated_weights(vgg))
    if identity:
        config = replace(config, identity_weights=losses.calibrated_weights(identity))
    return config


def magnitudes(features: Iterable[Tensor]) -> list[Tensor]:
    """Mean absolute value of each picture's features, (b,) per layer: all that calibration wants, and small enough to keep."""
    return [losses.exact(feature).abs().flatten(1).mean(dim=1) for feature in features]
