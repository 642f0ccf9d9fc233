"""The motion model: a source image, its landmarks and a driving frame's landmarks make the driving frame.

Sparse to Dense Motion Transfer for Face Image Animation (Zhao, Wu and Guo 2021); the supplement gives every width, the
generator is that of first order model (Siarohin et al. 2019). Symbols: S is ``source``, s and d are the landmarks of source
and driving frame, T is ``deformation``, δ a ``displacement``, M ``mask``, O ``occlusion``, F the generator's features.

A mask that multiplies the flow cannot be told from the flow (in a toy it came out inverted); one that blends warped with
unwarped features becomes a mask of the foreground. So features are blended; the other ways are switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.losses import exact
from models.motion.dense import (
    AdaptiveNormKind,
    AdaptivePosition,
    AddMotionKind,
    DenseMotion,
    EncodedPart,
    EncodedSource,
    GlobalMotion,
    LocalCompose,
    LocalMotion,
    Modulation,
    MotionFields,
    MotionTrunk,
    SkipKind,
)
from models.motion.flow import Padding, identity_grid, shrink, warp
from models.motion.generator import Generator
from models.motion.layout import PartName, layout_of

Compose = Literal["feature_blend", "flow_product", "fomm"]


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Shape of the network; it is saved with the weights."""

    size: int = 256
    """Side of source and output, pixels (supplement, section 1)."""
    num_landmarks: Literal[68, 70] = 70
    """Points of a face: iBUG's 68, or these and two pupils, without which gaze cannot be driven."""
    global_encoder: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 1024)
    """Widths of the blocks that halve (supplement)."""
    global_decoder: tuple[int, ...] = (1024, 1024, 512, 256, 128, 64, 32)
    """Widths of the blocks that double (supplement)."""
    global_adaptive: int = 4
    """Blocks at the bottleneck's either side that landmarks modulate (supplement)."""
    local_encoder: tuple[int, ...] = (16, 32, 64, 128, 256)
    """The same for the networks of the parts (supplement)."""
    local_decoder: tuple[int, ...] = (256, 128, 64, 32, 16)
    """(supplement)"""
    local_adaptive: int = 3
    """(supplement)"""
    patch: int = 64
    """Side of a part's patch, pixels of the source (supplement)."""
    local_compose: LocalCompose = "residual"
    """Local motion corrects the global one, or takes its place inside the patch."""
    local_add_motion: bool = True
    """Whether local networks have an Add Motion layer; the supplement does not say."""
    local_occlusion: bool = False
    """Whether local networks may also occlude, for mouth interiors."""
    adain_norm: AdaptiveNormKind = "instance"
    """What AdaIN normalises over. In the toy ``batch`` ended a little better and began slower."""
    adain_pos: AdaptivePosition = "norm"
    """AdaIN in the norm's place, or after the whole block."""
    adain_hidden: int = 256
    """Width between landmarks and AdaIN's scales and shifts."""
    add_motion: AddMotionKind = "spatial"
    """How the bottleneck learns of d - s."""
    skip: SkipKind = "none"
    """Encoder features lie as the source does, decoder features as the driving frame: joining them is for ablation."""
    compose: Compose = "feature_blend"
    """``feature_blend``: O (M warp(F) + (1 - M) F). ``flow_product``: T = z + M δ. ``fomm``: O warp(F), no mask."""
    warp_padding: Padding = "border"
    """What lies outside the source; first order model takes zeros, which darken edges."""
    generator_base: int = 64
    """Width of the first block (first order model, vox-256)."""
    generator_limit: int = 512
    """Most channels of any block (first order model)."""
    generator_down: int = 2
    """Halvings (supplement)."""
    generator_residuals: int = 6
    """(supplement)"""

    def __post_init__(self) -> None:
        layout_of(self.num_landmarks)
        for name, side, encoder, decoder, adaptive in (
            ("global", self.size, self.global_encoder, self.global_decoder, self.global_adaptive),
            ("local", self.patch, self.local_encoder, self.local_decoder, self.local_adaptive),
        ):
            depth = len(encoder)
            if len(decoder) != depth or not 0 <= adaptive <= depth:
                raise ValueError(
                    f"{name}: {depth} encoder blocks, {len(decoder)} decoder blocks, {adaptive} of them adaptive"
                )
            # instance norm needs more than one value: the last conv of the encoder sees twice the bottleneck's side
            least = 2 if self.adain_pos == "after_block" else 1
            if side % (1 << depth) or side >> depth < least:
                raise ValueError(
                    f"{name}: {side} px halved {depth} times is {side / (1 << depth):g}, "
                    f"not a whole number >= {least}"
                )
        if self.size % (1 << self.generator_down):
            raise ValueError(f"size {self.size} cannot be halved {self.generator_down} times")
        if self.patch > self.size:
            raise ValueError(f"patch {self.patch} is larger than size {self.size}")


@dataclass(frozen=True)
class MotionCache:
    """Everything that depends on the source alone: what :meth:`Motion.prepare` computed once."""

    motion: EncodedSource
    features: Tensor
    """(b, c, s / 2^down, s / 2^down) of the generator."""

    def expand(self, count: int) -> MotionCache:
        """The cache of one source for ``count`` driving frames, without copies."""
        if len(self.features) == count:
            return self
        if len(self.features) != 1:
            raise ValueError(f"{len(self.features)} sources cannot serve {count} driving frames")

        def spread(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.expand(count, *tensor.shape[1:]) for tensor in tensors]

        parts: dict[PartName, EncodedPart] = {
            name: EncodedPart(spread(part.encoded), *spread([part.centre, part.vector]))
            for name, part in self.motion.parts.items()
        }
        motion = EncodedSource(spread(self.motion.encoded), spread([self.motion.vector])[0], parts)
        return MotionCache(motion, spread([self.features])[0])


class Motion(nn.Module):
    """Animates one face by landmarks. ``forward`` is ``drive(prepare(...))``."""

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = build_dense(config)
        self.generator = Generator(
            config.generator_base,
            config.generator_limit,
            config.generator_down,
            config.generator_residuals,
        )

    def forward(
        self, source: Tensor, source_landmarks: Tensor, driving_landmarks: Tensor
    ) -> tuple[Tensor, MotionFields]:
        """The driving frame, and the motion that made it.

        Args:
            source: (b, 3, s, s) in [-1, 1].
            source_landmarks: (b, K, 2) in [-1, 1] where inside the picture.
            driving_landmarks: (b, K, 2), likewise.

        Returns:
            (b, 3, s, s) in (-1, 1), and the fields at full size.
        """
        return self.drive(self.prepare(source, source_landmarks), driving_landmarks)

    def prepare(self, source: Tensor, landmarks: Tensor) -> MotionCache:
        """Everything that no driving frame changes: (b, 3, s, s) in [-1, 1] and (b, K, 2) to a cache.

        Raises:
            ValueError: another size or number of landmarks than the network's.
        """
        side, count = self.config.size, self.config.num_landmarks
        if source.shape[1:] != (3, side, side):
            raise ValueError(f"source of shape {tuple(source.shape)}, not (b, 3, {side}, {side})")
        self._check(landmarks, count, "source")
        return MotionCache(self.dense.encode(source, landmarks), self.generator.encode(source))

    def drive(self, cache: MotionCache, landmarks: Tensor) -> tuple[Tensor, MotionFields]:
        """One source, or as many as there are driving frames: (b, K, 2) to (b, 3, s, s) in (-1, 1) and the motion.

        Raises:
            ValueError: another number of landmarks than the network's, or of sources than driving frames.
        """
        self._check(landmarks, self.config.num_landmarks, "driving")
        cache = cache.expand(len(landmarks))
        fields = self.dense.decode(cache.motion, landmarks)
        if self.config.compose == "flow_product":
            fields = self._multiply(fields)
        features = self._compose(cache.features, fields)
        return self.generator.decode(features), fields

    @staticmethod
    def _check(landmarks: Tensor, count: int, whose: str) -> None:
        if landmarks.shape[1:] != (count, 2):
            raise ValueError(
                f"{whose} landmarks of shape {tuple(landmarks.shape)}, not (b, {count}, 2)"
            )

    def _multiply(self, fields: MotionFields) -> MotionFields:
        assert fields.mask is not None
        grid = identity_grid(self.config.size, fields.deformation.device)
        moved = grid + fields.mask.permute(0, 2, 3, 1) * (fields.deformation - grid)
        return MotionFields(
            moved,
            fields.mask,
            fields.occlusion,
            fields.global_displacement,
            fields.local_displacements,
        )

    def _compose(self, features: Tensor, fields: MotionFields) -> Tensor:
        factor = 1 << self.config.generator_down
        deformation = shrink(fields.deformation.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
        occlusion = shrink(fields.occlusion, factor)
        warped = warp(features, deformation, self.config.warp_padding)
        if self.config.compose != "feature_blend":
            return occlusion * warped
        assert fields.mask is not None
        return occlusion * blend(warped, features, shrink(fields.mask, factor))


def blend(warped: Tensor, still: Tensor, mask: Tensor) -> Tensor:
    """What moved where the mask is 1, what stood still where it is 0: (b, c, h, w) twice and (b, 1, h, w)."""
    return mask * warped + (1 - mask) * exact(still)


def build_dense(config: MotionConfig) -> DenseMotion:
    """The motion networks of a configuration."""
    layout = layout_of(config.num_landmarks)

    def modulation(points: int) -> Modulation:
        return Modulation(
            vector=2 * points,
            hidden=config.adain_hidden,
            norm=config.adain_norm,
            position=config.adain_pos,
        )

    whole = MotionTrunk(
        config.size,
        config.global_encoder,
        config.global_decoder,
        config.global_adaptive,
        modulation(layout.count),
        add_motion=config.add_motion,
        skip=config.skip,
    )
    local: dict[PartName, LocalMotion] = {}
    for name, points in layout.parts.items():
        trunk = MotionTrunk(
            config.patch,
            config.local_encoder,
            config.local_decoder,
            config.local_adaptive,
            modulation(len(points)),
            add_motion=config.add_motion if config.local_add_motion else "none",
            skip=config.skip,
        )
        local[name] = LocalMotion(
            trunk, config.local_decoder[-1], has_occlusion=config.local_occlusion
        )
    return DenseMotion(
        GlobalMotion(whole, config.global_decoder[-1], has_mask=config.compose != "fomm"),
        local,
        layout,
        size=config.size,
        patch=config.patch,
        compose=config.local_compose,
    )
