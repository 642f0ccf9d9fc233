"""An Aligner small enough for tests, and batches of drawn people for it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.aligner.batch import AlignerBatch
from models.aligner.learner import AlignerLearner, AlignerLearnerConfig, Frozen
from models.aligner.network import AlignerConfig
from models.frozen.arcface import IdentityNetwork

SIZE = 32
NETWORK = AlignerConfig(
    size=SIZE,
    base=8,
    limit=32,
    portrait_dim=16,
    identity="mobilefacenet",
    pose_dim=8,
    expression_dim=8,
    hidden=32,
    encoder_size=SIZE,
    norm="group",
    portrait_blocks=(1, 1, 1, 1),
    portrait_groups=1,
    motion_width=0.1,
)
LEARNER = AlignerLearnerConfig(
    network=NETWORK,
    discriminator_base=4,
    discriminator_limit=16,
    vgg="vgg_normalised_conv3_1",
    vgg_layers=("relu1_1", "relu2_1"),
    random_init=True,
)


class SmallIdentity(IdentityNetwork):
    """A random network behind the identity networks' interface, twenty times as fast as MobileFaceNet."""

    dimension = 128
    size = (28, 24)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 8, 16, 16)
        self.stages = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
            for inputs, outputs in pairwise(widths)
        )
        self.vector = nn.Linear(16 * 2 * 2, self.dimension)

    def forward(self, faces: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        x = faces
        for stage in self.stages:
            x = torch.relu(stage(x))
            features.append(x)
        return self.vector(x.flatten(1)), features


def tiny_learner(config: AlignerLearnerConfig = LEARNER, seed: int = 0) -> AlignerLearner:
    """A learner with random networks; the identity network is small, too, unless the config wants the real ones."""
    torch.manual_seed(seed)
    learner = AlignerLearner(config, wrap=lambda network: network, device=torch.device("cpu"))
    if config.random_init:
        identity = SmallIdentity().eval().requires_grad_(False)
        learner.frozen = Frozen(identity, learner.frozen.vgg)
    return learner


def in_double(learner: AlignerLearner) -> AlignerLearner:
    """The same learner in float64, where sums in another order agree to 1e-10."""
    learner.networks.double()
    for network in learner.frozen:
        if network is not None:
            network.double()
    return learner


def person(seed: int) -> Tensor:
    """A smooth picture (3, 48, 48) in [-1, 1] that is one drawn person's."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(1, 3, 5, 5, generator=generator) * 2 - 1
    return F.interpolate(cells, (48, 48), mode="bicubic").clamp(-1, 1)[0]


def window(picture: Tensor, shift: tuple[int, int]) -> Tensor:
    """The part (3, 32, 32) of a person that is seen after a move."""
    x, y = shift
    return picture[:, 8 + y : 40 + y, 8 + x : 40 + x]


def doubled(batch: AlignerBatch) -> AlignerBatch:
    """The same batch in float64."""
    return batch.to(torch.float64)  # Tensor.to takes a dtype as well as a device


def drawn_batch(
    people: int = 2,
    moves: int = 2,
    k: int = 2,
    seed: int = 0,
    face_size: tuple[int, int] = SmallIdentity.size,
) -> AlignerBatch:
    """Every person in every move; sources are the person unmoved, the driving picture is without colour.

    The lowest rows of each target lie outside the frame, the leftmost columns are background.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = [
        tuple(pair) for pair in torch.randint(-8, 9, (moves, 2), generator=generator).tolist()
    ]
    targets, sources = [], []
    for i in range(people):
        picture = person(100 * seed + i)
        for shift in shifts:
            targets.append(window(picture, shift))
            sources.append(torch.stack([window(picture, (j, 0)) for j in range(k)]))
    valid = torch.ones(len(targets), 1, SIZE, SIZE)
    valid[:, :, -2:] = 0
    foreground = torch.ones_like(valid)
    foreground[..., :4] = 0
    target = valid * (torch.stack(targets) + 1) - 1
    height, width = face_size
    matrix = torch.tensor([[width / SIZE, 0, 0], [0, height / SIZE, 0]]).expand(len(target), 2, 3)
    grey = target.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    faces = F.interpolate(torch.stack(sources).flatten(0, 1), face_size, mode="bilinear")
    return AlignerBatch(
        keys=[f"person{i // moves}-video-{i % moves}.000000" for i in range(len(target))],
        sources=torch.stack(sources),
        source_faces=faces.unflatten(0, (-1, k)),
        target=target,
        target_valid=valid,
        target_foreground=foreground,
        target_face_matrix=matrix.clone(),
        driving=grey,
        driving_face=F.interpolate(grey[..., 8:24, 8:24], (SIZE, SIZE), mode="bilinear"),
        landmarks=torch.rand(len(target), 68, 2, generator=generator) * SIZE,
    )
