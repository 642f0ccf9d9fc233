"""One training step of each model: learners with random frozen weights, batches of noise, speed-ups, time and memory.

What ``train_step.py`` and ``gpu.py`` share. It imports models and nothing of pipelines or jobs, so that it runs where only torch is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.exemplar import drawn_maps
from benchmarks.peak import PeakBytes
from models.aligner.batch import AlignerBatch
from models.aligner.network import AlignerConfig
from models.blender.batch import BlenderBatch
from models.blender.learner import PERCEPTUAL_LAYERS, BlenderLearnerConfig
from models.blender.network import BlenderConfig
from models.blender.warp import Backend, WarpConfig
from models.motion.batch import MotionBatch
from models.motion.network import MotionConfig

Variant = Literal["fp32", "bf16", "channels_last", "fused", "compile"]
VARIANTS: tuple[Variant, ...] = ("fp32", "bf16", "channels_last", "fused", "compile")
"""Each is added to those before it."""


class Steps(Protocol):
    """Of a learner what is measured."""

    @property
    def networks(self) -> nn.ModuleDict:
        """All, by name."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """All, by name."""
        ...

    def train_step(self, batch: Any, samples_seen: int) -> Mapping[str, Tensor]:
        """One update."""
        ...


S = TypeVar("S", bound=Steps)


def build(
    learner: Callable[..., S], config: Any, variants: Sequence[Variant], device: torch.device
) -> S:
    """A learner of a configuration with the speed-ups of ``variants``."""
    precision = "bf16" if "bf16" in variants else "fp32"
    built = learner(
        replace(config, precision=precision), wrap=lambda network: network, device=device
    )
    trained = [network for name, network in built.networks.items() if name != "ema"]
    if "channels_last" in variants:
        for network in trained:
            network.to(memory_format=torch.channels_last)
    if "fused" in variants:
        for optimizer in built.optimizers.values():
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    if "compile" in variants:
        for network in trained:
            network.compile()
    return built


def pictures(*shape: int) -> Tensor:
    """Noise in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1


def aligner_noise(
    network: AlignerConfig, count: int, sources: int, face: tuple[int, int]
) -> AlignerBatch:
    """``count`` samples of K = ``sources``; ``face`` is (height, width) of the identity network's pictures."""
    torch.manual_seed(0)
    s, e = network.size, network.encoder_size
    matrix = torch.tensor([[face[1] / s, 0.0, 0.0], [0.0, face[0] / s, 0.0]])
    return AlignerBatch(
        keys=[f"noise.{i}" for i in range(count)],
        sources=pictures(count, sources, 3, e, e),
        source_faces=pictures(count, sources, 3, *face),
        target=pictures(count, 3, s, s),
        target_valid=torch.ones(count, 1, s, s),
        target_foreground=torch.ones(count, 1, s, s),
        target_face_matrix=matrix.expand(count, 2, 3).contiguous(),
        driving=pictures(count, 3, e, e),
        driving_face=pictures(count, 3, e, e),
        landmarks=torch.rand(count, 68, 2) * s,
    )


def head_maps(size: int) -> list[Tensor]:
    """Label maps (1, size, size) of a drawn head in three places."""
    maps = [torch.from_numpy(drawn) for drawn in drawn_maps()]
    step = maps[0].shape[0] // size
    return [drawn[None, ::step, ::step].contiguous() for drawn in maps]


def blender_noise(size: int, count: int) -> BlenderBatch:
    """``count`` samples: noise behind label maps of drawn heads."""
    torch.manual_seed(0)
    a, t, other = (drawn.expand(count, 1, size, size) for drawn in head_maps(size))
    ones = torch.ones(count, 1, size, size)
    return BlenderBatch(
        keys=[f"noise.{i}" for i in range(count)],
        animated=pictures(count, 3, size, size), animated_labels=a,
        target=pictures(count, 3, size, size), target_labels=t, target_valid=ones,
        truth=pictures(count, 3, size, size), truth_valid=ones, noise=torch.zeros_like(ones),
        other=pictures(count, 3, size, size), other_labels=other, other_valid=ones,
        colours=torch.tensor([1.0, 1, 1, 0]).expand(count, 4), turn=torch.zeros(count, 2),
        wants_aligner=torch.zeros(count, dtype=torch.bool),
    )  # fmt: skip


def paper_blender(backend: Backend = "chunked") -> BlenderLearnerConfig:
    """The Blender at the paper's size with random frozen weights, every layer of VGG-19 counting the same."""
    layers = len(PERCEPTUAL_LAYERS["vgg19"])
    return BlenderLearnerConfig(
        random_init=True,
        perceptual_weights=(1 / layers,) * layers,
        network=BlenderConfig(warp=WarpConfig(backend=backend)),
    )


def motion_noise(network: MotionConfig, count: int) -> MotionBatch:
    """``count`` pairs."""
    torch.manual_seed(0)
    faces = [torch.rand(count, network.num_landmarks, 2) - 0.5 for _ in range(2)]
    return MotionBatch(
        keys=[f"noise.{i}" for i in range(count)],
        source=pictures(count, 3, network.size, network.size),
        driving=pictures(count, 3, network.size, network.size),
        source_landmarks=faces[0],
        driving_landmarks=faces[1],
    )


@dataclass(frozen=True)
class Measured:
    """Of one variant."""

    seconds: float
    """A step."""
    waited: float
    """Share of the time spent waiting for batches."""
    peak_mib: float
    """Memory that tensors took, the networks' included."""


def measure(learner: Steps, stream: Iterator[Any], steps: int, device: torch.device) -> Measured:
    """Time ``steps`` steps after a warm-up."""
    cuda = device.type == "cuda"

    def one() -> float:
        began = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - began
        learner.train_step(batch.to(device, non_blocking=True), 0)
        return waited

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            one()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.synchronize()
    else:
        held = sum(t.nbytes for n in learner.networks.values() for t in n.state_dict().values())
        with PeakBytes() as counter:  # the warm-up: counting costs time
            one()
        peak = counter.peak + held
    began = time.perf_counter()
    waits = [one() for _ in range(steps)]
    if cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    return Measured(elapsed / steps, sum(waits) / elapsed, peak / 2**20)
