"""Published dataset + bundles → scores of people the networks were not trained on. One process on one device; no Ray.

Aligner: a person re-enacts their own frame, which is known, and another person's, which nobody knows, from K = 1, 4, 8 and 32
pictures (HeSer Fig. 2; protocol of latent pose reenactment). Blender: a head is put back where it was, in its own colours and
in others (GHOST 2.0, Table 4). Motion: a clip is made of its first frame (first order model's reconstruction).

LPIPS and FID need networks that come with no package: without their files they are left out, and that is told. All numbers of a line come from the same frames, and stand beside what nothing at all would get: the real frame's own
identity similarity, the source that did not move, the head before it was painted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from models import metrics
from models.aligner.augment import AugmentConfig
from models.aligner.batch import AlignerBatch
from models.aligner.network import Aligner
from models.blender.batch import BlenderBatch
from models.blender.network import Blended, Blender
from models.blender.pairs import PairConfig
from models.frozen import arcface, weights
from models.frozen.arcface import IdentityName, IdentityNetwork, load_identity_network
from models.frozen.detector import DetectorName, load_detector
from models.frozen.landmarks import LandmarkerName, load_landmarker
from models.frozen.parsing import ParsingLabel
from models.frozen.perceptual import Inception, Lpips, frechet_distance
from models.frozen.weights import MissingWeightsError
from models.motion.batch import MotionBatch
from models.motion.network import Motion
from models.updates import Precision, autocast
from pipelines import provenance, shards
from pipelines.download import public_url
from pipelines.geometry import Floats, Image, box_sizes, warp
from pipelines.headpose import head_pose
from pipelines.output import ConfigError
from pipelines.samples import pictures
from pipelines.samples_aligner import AlignerSamples, AlignerSamplesConfig, face_matrix
from pipelines.samples_blender import BlenderSamples, BlenderSamplesConfig
from pipelines.samples_motion import MotionSamples, MotionSamplesConfig
from pipelines.shards import DatasetError
from pipelines.swap import load_network

SIDE = 256
"""Pixels of the pictures in which faces are looked for: the unit of ``akd``, as first order model's authors have it."""
MIN_FACE = SIDE / 5
SAY_SECONDS = 30.0
AS_IT_IS = AugmentConfig(max_photometric=0, scale=0.0, shift=0.0)
UNCHANGED = PairConfig(
    brightness=0, contrast=0, saturation=0, hue=0, p_mirror=1, p_other_frame=0, p_noise=0,
    p_reenacted=0, p_background=0, p_affine=0,
)  # fmt: skip
"""Of a head: put back where it was; its colours come from the mirrored frame."""
RECOLOURED = replace(PairConfig(), p_mirror=1, p_other_frame=0, p_noise=1, p_reenacted=0, p_background=0, p_affine=0)  # fmt: skip
"""In other colours, and where the painted region is enlarged at random."""
SKIN = (ParsingLabel.SKIN, ParsingLabel.NOSE)
HAIR = (ParsingLabel.HAIR,)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Bundles are scored on people of a split."""

    dataset: str
    """Published dataset: a folder or fsspec URI."""
    output: str
    """Folder or URI for scores, rows, pictures and the page."""
    aligner: str = ""
    """Bundle of an Aligner: a folder, fsspec URI or models:/NAME@alias; empty: none."""
    blender: str = ""
    """Bundle of a Blender."""
    motion: str = ""
    """Bundle of a motion model."""
    split: Literal["test", "val", "train"] = "test"
    """Whose people. With train the scores are of people who were trained on."""
    samples: int = 100
    """Of each line of the tables; people take turns."""
    shots: tuple[int, ...] = (1, 4, 8, 32)
    """Pictures of a person that the Aligner is given: a line for each K."""
    batch: int = 4
    """Samples at once."""
    identity: IdentityName = "dlib"
    """Says whether it is the same person. The papers take arcface. Better another one than the Aligner learned from."""
    detector: DetectorName = "dlib"
    """Finds faces, in real and generated pictures alike."""
    landmarker: LandmarkerName = "dlib"
    """Finds their points."""
    precision: Precision = "fp32"
    """Of convolutions."""
    grid: int = 6
    """People, or samples, in the pictures."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if min(self.samples, self.batch, self.grid) < 1:
            raise ValueError(
                f"samples, batch and grid must be at least 1, got {self.samples}, {self.batch} and {self.grid}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to {2**32 - 1}, got {self.seed}")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots must be numbers from 1, got {self.shots}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one generated picture."""

    study: str
    """``aligner``, ``blender`` or ``motion``."""
    setting: str
    """Line of the study's table."""
    key: str
    """Sample and frame that it is made from."""
    driver: str
    """Sample and frame that it follows."""
    values: dict[str, float]
    """By name; NaN where there is nothing to score, such as the pose of a picture without a face."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A picture to look at."""

    study: str
    title: str
    image: Image


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A score of all pictures of a line together."""

    study: str
    setting: str
    name: str
    value: float
    pictures: int
    """Generated ones; the real ones beside them are as many."""


Found = Row | Sheet | Whole
Say = Callable[[str], None]
N = TypeVar("N", Lpips, Inception)


class Judge:
    """Networks that none of the models is made of: where a face is, whose, and what pictures look like."""

    def __init__(
        self,
        config: EvaluateConfig,
        device: torch.device,
        lpips: Lpips | None = None,
        inception: Inception | None = None,
    ) -> None:
        """Load detector and landmarks, the identity network when it is first needed. Raises ``WeightsError``."""
        self.identity = config.identity
        self.device = device
        self._lpips = lpips.to(device) if lpips else None
        self._inception = inception.to(device) if inception else None
        self._detector = load_detector(config.detector, MIN_FACE)
        self._landmarker = load_landmarker(config.landmarker)
        self._name = config.identity

    @cached_property
    def _network(self) -> IdentityNetwork:
        return load_identity_network(self._name).to(self.device)

    def points(self, image: Image) -> Floats | None:
        """(68, 2) pixels of ``SIDE`` of the largest face of a square picture, found without a hint; None without one."""
        resized = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        square = np.asarray(resized, np.uint8)
        boxes = self._detector.detect(square)[:, :4]
        if not len(boxes):
            return None
        largest = boxes[int(np.prod(box_sizes(boxes), axis=1).argmax())]
        return self._landmarker.locate(square, largest[None])[0].astype(np.float64)

    def vector(self, image: Image, points: Floats) -> Tensor:
        """Identity vector (d) of a face with these points in pixels of ``SIDE``."""
        matrix = face_matrix(points * (image.shape[0] / SIDE), self.identity)
        height, width = self._network.size
        face = pictures([warp(image, matrix, (width, height))]).to(self.device)
        return F.normalize(self._network.embedding(face)[0].float(), dim=0).cpu()

    def vector_of(self, image: Image) -> Tensor | None:
        """Identity vector (d) of the largest face; None without one."""
        points = self.points(image)
        return None if points is None else self.vector(image, points)

    @torch.inference_mode()
    def likeness(self, made: Sequence[Image], real: Sequence[Image]) -> list[dict[str, float]]:
        """LPIPS of each pair by its name; nothing without its network."""
        if self._lpips is None:
            return [{} for _ in made]
        pairs = (pictures(images).to(self.device) for images in (made, real))
        return [{"lpips": distance} for distance in self._lpips(*pairs).tolist()]

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> Tensor | None:
        """Inception's (n, 2048), on the CPU, of at least one picture; None without the network."""
        if self._inception is None:
            return None
        levels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        features: Tensor = self._inception(levels.to(self.device)).cpu()
        return features


@dataclass
class Crowd:
    """Inception features (n, 2048) of the pictures of a line, and of the real ones that they follow."""

    made: list[Tensor] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)

    def add(self, made: Tensor | None, real: Tensor | None) -> None:
        """Some of each; nothing without the network."""
        if made is not None and real is not None:
            self.made.append(made)
            self.real.append(real)

    def distance(self, study: str, setting: str) -> Iterator[Whole]:
        """FID, of at least two pictures."""
        count = sum(map(len, self.made))
        if count > 1:
            value = frechet_distance(torch.cat(self.made), torch.cat(self.real))
            yield Whole(study=study, setting=setting, name="fid", value=value, pictures=count)


# --- Aligner ----------------------------------------------------------------------------------------------------


def reenactment(
    config: EvaluateConfig, aligner: Aligner, judge: Judge, say: Say
) -> Iterator[Found]:
    """Self and cross re-enactment for every K that the dataset has frames for: the same targets for all, from the first K of the same pictures.

    ``say`` is told what is left out.

    Raises:
        DatasetError: for no K are there enough.
    """
    samples, shots = aligner_samples(config, aligner, say)
    people = len(samples.reader.identities)
    if people < 2 or config.samples < 2:
        say(f"{people} person and {config.samples} samples: nobody is driven by somebody else")
    if aligner.config.has_mask and not samples.reader.has_labels:
        say(
            "no labels in this split: what is not the person cannot be left out, so there is no PSNR, SSIM, LPIPS and FID"
        )
    identity = load_identity_network(aligner.config.identity).to(judge.device)
    most = shots[-1]
    crowds = {count: Crowd() for count in shots}
    for numbers in numbered(config):
        following = (numbers[-1] + 1) % config.samples  # drives the last one
        batch = samples.batch([(number, most) for number in [*numbers, following]])
        shown = Shown(
            batch,
            judge,
            [number % people for number in [*numbers, following]],
            masked=aligner.config.has_mask,
            has_labels=samples.reader.has_labels,
        )
        for count, crowd in crowds.items():
            yield from _reenacted(aligner, identity, judge, shown, count, config.precision, crowd)
    for count, crowd in crowds.items():
        yield from crowd.distance("aligner", f"cross, K = {count}")
    batch = samples.batch([(number, most) for number in range(min(config.grid, people))])
    image = crossed(aligner, identity, batch.to(judge.device), config.precision)
    title = f"Everyone (rows, K = {most}) as everyone moves (columns)"
    yield Sheet(study="aligner", title=title, image=image)


def aligner_samples(
    config: EvaluateConfig, aligner: Aligner, say: Say
) -> tuple[AlignerSamples, list[int]]:
    """People in turn, as they are, with as many sources as the largest K that all have; and every K up to it.

    Raises:
        DatasetError: there is none.
    """
    own, shots = aligner.config, sorted(set(config.shots))
    while True:
        wanted = AlignerSamplesConfig(
            batch_size=config.batch, seed=config.seed, min_sources=shots[-1], max_sources=shots[-1], output_size=own.size,
            encoder_size=own.encoder_size, identity=own.identity, flip=0.0, augment=AS_IT_IS,
        )  # fmt: skip
        try:
            return AlignerSamples(wanted, config.dataset, config.split, rotate=True), shots
        except DatasetError as error:
            if len(shots) == 1:
                raise
            say(f"K = {shots.pop()} is left out: {error}")


def numbered(config: EvaluateConfig) -> Iterator[list[int]]:
    """Numbers of the samples, a batch at a time."""
    for first in range(0, config.samples, config.batch):
        yield list(range(first, min(first + config.batch, config.samples)))


class Shown:
    """Samples with what is known of their real pictures; the last of them only drives the one before it."""

    def __init__(
        self,
        batch: AlignerBatch,
        judge: Judge,
        people: Sequence[int],
        *,
        masked: bool,
        has_labels: bool,
    ) -> None:
        self.batch = batch
        self.crossing = [i for i in range(len(people) - 1) if people[i] != people[i + 1]]
        """Places whose next one is somebody else."""
        self.is_whole = has_labels or not masked
        """Whether the target can be made black where the network makes it so."""
        self.real = to_images(batch.target)
        self.wanted = to_images(shown_of(batch, batch.target, masked=masked))
        """What the network is to make."""
        self.points = [judge.points(image) for image in self.real]
        self._sources = [
            [judge.vector_of(image) for image in to_images(sources)]
            for sources in batch.sources[:-1]
        ]
        self.features: Tensor | None = None
        """Inception's, of those who drive somebody else, as the network is to make them."""
        if self.is_whole and self.crossing:
            self.features = judge.features([self.wanted[i + 1] for i in self.crossing])

    def person(self, index: int, count: int) -> Tensor | None:
        """Mean identity vector of the first ``count`` sources; None where no face is found in any."""
        found = [vector for vector in self._sources[index][:count] if vector is not None]
        return torch.stack(found).mean(dim=0) if found else None


@torch.inference_mode()
def generate(
    aligner: Aligner, identity: IdentityNetwork, people: AlignerBatch, drivers: AlignerBatch, precision: Precision
) -> Tensor:  # fmt: skip
    """Pictures (b, 3, S, S) in [-1, 1] of each person, moved by the driver of the same place; batches on one device."""
    faces = people.source_faces
    vectors = identity.embedding(faces.flatten(0, 1)).unflatten(0, faces.shape[:2])
    with autocast(faces.device, precision):
        portrait = aligner(people.sources, vectors, drivers.driving, drivers.driving_face)
    image: Tensor = portrait.image.float()
    return image


def part(batch: AlignerBatch, places: slice, count: int | None = None) -> AlignerBatch:
    """Some samples, with their first ``count`` sources."""
    tensors = {
        item.name: getattr(batch, item.name)[places]
        for item in fields(AlignerBatch)
        if item.name != "keys"
    }
    tensors |= {name: tensors[name][:, :count] for name in ("sources", "source_faces")}
    return AlignerBatch(keys=batch.keys[places], **tensors)


def _reenacted(
    aligner: Aligner,
    identity: IdentityNetwork,
    judge: Judge,
    shown: Shown,
    count: int,
    precision: Precision,
    crowd: Crowd,
) -> Iterator[Row]:
    there = shown.batch.to(judge.device)
    people, drivers = part(there, slice(0, -1), count), part(there, slice(1, None))
    here, next_here = part(shown.batch, slice(0, -1)), part(shown.batch, slice(1, None))
    own = to_images(generate(aligner, identity, people, people, precision))
    portraits = to_images(shown_of(here, pictures(own), masked=False))
    likeness = judge.likeness(portraits, shown.wanted[:-1])
    for i, key in enumerate(here.keys):
        values = followed(judge, own[i], shown.real[i], shown.points[i], shown.person(i, count))
        known = {
            "psnr": decibels(portraits[i], shown.wanted[i]),
            "ssim": similarity(portraits[i], shown.wanted[i]),
        } | likeness[i]
        values |= known if shown.is_whole else dict.fromkeys(known, float("nan"))
        yield Row(study="aligner", setting=f"self, K = {count}", key=key, driver=key, values=values)
    cross = to_images(generate(aligner, identity, people, drivers, precision))
    if shown.features is not None:
        portraits = to_images(shown_of(next_here, pictures(cross), masked=False))
        crowd.add(judge.features([portraits[i] for i in shown.crossing]), shown.features)
    for i in shown.crossing:
        driver, points = shown.real[i + 1], shown.points[i + 1]
        values = followed(judge, cross[i], driver, points, shown.person(i, count))
        values["leakage"] = values.pop("csim_driver") - values["csim"]
        yield Row(
            study="aligner", setting=f"cross, K = {count}", key=here.keys[i], driver=drivers.keys[i], values=values
        )  # fmt: skip


def shown_of(batch: AlignerBatch, images: Tensor, *, masked: bool) -> Tensor:
    """Pictures (b, 3, S, S) black outside the frame, and outside the person if ``masked``."""
    keep = batch.target_valid
    if masked:
        keep = keep * batch.target_foreground
    return keep * (images + 1) - 1


def followed(
    judge: Judge, made: Image, driver: Image, driver_points: Floats | None, person: Tensor | None
) -> dict[str, float]:
    """How well a picture shows a person in a driver's pose.

    Args:
        judge: of faces.
        made: generated picture.
        driver: real one whose pose is wanted.
        driver_points: its landmarks, pixels of ``SIDE``.
        person: mean identity vector of whom it should show.
    """
    nothing = float("nan")
    points = judge.points(made)
    values = {
        "csim": nothing, "csim_of_driver": nothing, "csim_driver": nothing, "pose": nothing, "pose_fitted": nothing, "head_pose": nothing,
        "found": float(points is not None),
    }  # fmt: skip
    if driver_points is None:
        return values | {"found": nothing}
    # where none is found, the face is taken to be where the driver's is (latent pose reenactment's fixed box)
    vector = judge.vector(made, driver_points if points is None else points)
    real = judge.vector(driver, driver_points)
    if person is not None:
        values["csim"] = float(metrics.csim(vector[None], person[None]))
        values["csim_of_driver"] = float(metrics.csim(real[None], person[None]))
        values["csim_driver"] = float(metrics.csim(vector[None], real[None]))
    if points is not None:
        both = torch.from_numpy(np.stack([points, driver_points]))
        for name, fitted in (("pose", False), ("pose_fitted", True)):
            distance = metrics.landmark_distance(both[:1], both[1:], fitted=fitted)
            values[name] = float(distance)
        values["head_pose"] = float(np.abs(head_pose(points) - head_pose(driver_points)).mean())
    return values


@torch.inference_mode()
def crossed(
    aligner: Aligner, identity: IdentityNetwork, batch: AlignerBatch, precision: Precision
) -> Image:
    """Rows of people, columns of drivers: (n + 1) x (n + 1) pictures."""
    size = batch.target.shape[-1]
    source = F.interpolate(batch.sources[:, 0], (size, size), mode="bilinear", antialias=True)
    blank = torch.ones_like(batch.target[0])
    n = len(batch)
    lines = [torch.cat([blank, *batch.target], dim=2)]
    for i in range(n):
        people = part(batch, slice(i, i + 1))
        line = [generate(aligner, identity, people, part(batch, slice(j, j + 1)), precision)[0] for j in range(n)]  # fmt: skip
        lines.append(torch.cat([source[i], *line], dim=2))
    (image,) = to_images(torch.cat(lines, dim=1)[None])
    return image


# --- Blender ----------------------------------------------------------------------------------------------------


def blending(config: EvaluateConfig, blender: Blender, judge: Judge) -> Iterator[Found]:
    """A head put back where it was. Raises :class:`DatasetError`."""
    for setting, pairs in (("own colours", UNCHANGED), ("other colours", RECOLOURED)):
        wanted = BlenderSamplesConfig(
            batch_size=config.batch, seed=config.seed, output_size=blender.config.size, pairs=pairs
        )
        samples = BlenderSamples(wanted, config.dataset, config.split, rotate=True)
        for numbers in numbered(config):
            batch = samples.batch(numbers)
            with torch.inference_mode(), autocast(judge.device, config.precision):
                blended = blender(batch.to(judge.device))
            yield from _blended(judge, batch, blended, setting)
        batch = samples.batch(list(range(min(config.grid, len(samples.reader.identities)))))
        with torch.inference_mode(), autocast(judge.device, config.precision):
            blended = blender(batch.to(judge.device))
        columns = (
            batch.target, batch.animated, blended.head_exemplar, blended.ring_exemplar, composed(batch, blended),
            batch.truth,
        )  # fmt: skip
        rows = torch.cat([column.float().cpu().clamp(-1, 1) for column in columns], dim=3)
        title = (
            f"{setting}: scene, head, colours for the head, for its surroundings, blended, truth"
        )
        (image,) = to_images(torch.cat(list(rows), dim=1)[None])
        yield Sheet(study="blender", title=title, image=image)


def composed(batch: BlenderBatch, blended: Blended) -> Tensor:
    """(b, 3, S, S) what was painted over the truth, on the CPU."""
    painted = blended.masks.painted.cpu()
    return torch.where(painted > 0, blended.image.float().cpu(), batch.truth)


def _blended(judge: Judge, batch: BlenderBatch, blended: Blended, setting: str) -> Iterator[Row]:
    made, truth = to_images(composed(batch, blended)), to_images(batch.truth)
    before, labels = to_images(batch.animated), batch.animated_labels[:, 0].numpy()
    valid = batch.truth_valid[:, 0].numpy() > 0
    regions = {
        "psnr": blended.masks.painted, "psnr_head": blended.masks.head_a, "psnr_inpainted": blended.masks.ring_a,
    }  # fmt: skip
    masks = {name: mask.cpu()[:, 0].numpy() > 0 for name, mask in regions.items()}
    likeness = judge.likeness(made, truth)
    for i, key in enumerate(batch.keys):
        values = {
            name: decibels(made[i], truth[i], mask[i] & valid[i]) for name, mask in masks.items()
        }
        values |= {"ssim": similarity(made[i], truth[i])} | likeness[i]
        for name, group in (("skin", SKIN), ("hair", HAIR)):
            where = np.isin(labels[i], group) & valid[i]
            values[f"{name}_delta_e"] = colour_distance(made[i], truth[i], where)
            values[f"{name}_delta_e_before"] = colour_distance(before[i], truth[i], where)
        yield Row(study="blender", setting=setting, key=key, driver=key, values=values)


# --- motion -----------------------------------------------------------------------------------------------------


def following(config: EvaluateConfig, model: Motion, judge: Judge) -> Iterator[Found]:
    """Frames of a clip made from its first one, never the first itself. Raises :class:`DatasetError`."""
    wanted = MotionSamplesConfig(
        batch_size=config.batch, seed=config.seed, size=model.config.size, jitter=0.0,
        num_landmarks=68 if model.config.num_landmarks == 68 else 70,
    )  # fmt: skip
    samples = MotionSamples(wanted, config.dataset, config.split, held_out=True)
    crowd = Crowd()
    for numbers in numbered(config):
        batch = samples.batch(numbers)
        made = imitate(model, batch, judge.device, config.precision)
        yield from _imitated(judge, batch, made, crowd)
    yield from crowd.distance("motion", "same person")
    batch = samples.batch(list(range(min(config.grid, samples.units))))
    made = imitate(model, batch, judge.device, config.precision)
    rows = torch.cat([batch.source, batch.driving, made], dim=3)
    (image,) = to_images(torch.cat(list(rows), dim=1)[None])
    yield Sheet(study="motion", title="first frame, driving frame, generated", image=image)


@torch.inference_mode()
def imitate(
    model: Motion, batch: MotionBatch, device: torch.device, precision: Precision
) -> Tensor:
    """Pictures (b, 3, S, S) in [-1, 1], on the CPU."""
    there = batch.to(device)
    with autocast(device, precision):
        made, _ = model(there.source, there.source_landmarks, there.driving_landmarks)
    picture: Tensor = made.float().cpu()
    return picture


def _imitated(judge: Judge, batch: MotionBatch, made: Tensor, crowd: Crowd) -> Iterator[Row]:
    sources, drivings, images = (to_images(x) for x in (batch.source, batch.driving, made))
    likeness = judge.likeness(images, drivings)
    crowd.add(judge.features(images), judge.features(drivings))
    shown = zip(sources, drivings, images, strict=True)
    for i, (source, driving, generated) in enumerate(shown):
        values = {
            "l1": float((made[i] - batch.driving[i]).abs().mean()) / 2,
            "l1_source": float((batch.source[i] - batch.driving[i]).abs().mean()) / 2,
            "psnr": decibels(generated, driving),
            "ssim": similarity(generated, driving),
        }
        values |= likeness[i] | imitated(judge, source, driving, generated)
        key, _, frame = batch.keys[i].rpartition(".")
        driver = f"{key.rpartition('.')[0]}.{frame}"
        yield Row(study="motion", setting="same person", key=key, driver=driver, values=values)


def imitated(judge: Judge, source: Image, driving: Image, made: Image) -> dict[str, float]:
    """Landmark distances in pixels of ``SIDE`` (mean absolute difference of a coordinate) and the identity's, of pictures with faces."""
    nothing = float("nan")
    wanted, first, own = (judge.points(image) for image in (driving, source, made))
    values = {"akd": nothing, "akd_source": nothing, "aed": nothing, "found": nothing}
    if wanted is None:
        return values
    values["found"] = float(own is not None)
    if first is not None:
        values["akd_source"] = float(np.abs(first - wanted).mean())
    if own is not None:
        values["akd"] = float(np.abs(own - wanted).mean())
        difference = judge.vector(made, own) - judge.vector(driving, wanted)
        values["aed"] = float(difference.square().sum())
    return values


# --- scores of pictures -----------------------------------------------------------------------------------------


def to_images(tensors: Tensor) -> list[Image]:
    """(n, 3, h, w) in [-1, 1] to n RGB pictures."""
    levels = ((tensors.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return list(levels.permute(0, 2, 3, 1).cpu().contiguous().numpy())


def decibels(made: Image, real: Image, mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio of pictures (h, w, 3) where the mask (h, w) is true, at most 100; NaN where it never is."""
    squared = (made.astype(np.float64) - real) ** 2
    chosen = squared if mask is None else squared[mask]
    if not chosen.size:
        return float("nan")
    return float(10 * np.log10(255**2 / max(float(chosen.mean()), 255**2 * 1e-10)))


def similarity(made: Image, real: Image) -> float:
    """Structural similarity of pictures (h, w, 3), the channels' mean (Wang et al. 2004, scikit-image's windows of 7)."""
    return float(structural_similarity(made, real, channel_axis=2, data_range=255))


def colour_distance(made: Image, real: Image, mask: NDArray[np.bool_]) -> float:
    """CIEDE2000 between the mean CIELAB colours of two pictures where the mask (h, w) is true; NaN where it never is."""
    if not mask.any():
        return float("nan")
    one, other = (rgb2lab(image)[mask].mean(axis=0) for image in (made, real))
    return float(deltaE_ciede2000(one, other))


def load_networks(config: EvaluateConfig, window: int) -> dict[str, tuple[Any, str]]:
    """The network of each bundle and where it is, fit for windows of ``window`` pixels. Raises :class:`ConfigError`."""
    networks: dict[str, tuple[Any, str]] = {}
    network: Any
    for name, kind in (("aligner", Aligner), ("blender", Blender), ("motion", Motion)):
        uri = getattr(config, name)
        if not uri:
            continue
        network, place = load_network(name, uri, kind)
        networks[name] = network, place
        size = int(network.config.size)
        if size > window:
            raise ConfigError(
                f"--{name} {uri} makes pictures of {size} px, the windows of {config.dataset} are {window} px"
            )
        if isinstance(network, Aligner) and network.source_code is not None:
            raise ConfigError(
                f"--aligner {uri}: was fine-tuned to one person; give the one it was made from"
            )
        if isinstance(network, Aligner) and network.config.size % network.config.encoder_size:
            raise ConfigError(
                f"--aligner {uri}: {network.config.size} px are no multiple of its encoders' {network.config.encoder_size} px"
            )
    if not networks:
        raise ConfigError("nothing to evaluate: give --aligner, --blender or --motion")
    return networks


@dataclass(frozen=True)
class Ready:
    """Everything that scoring needs, found to be there."""

    manifest: dict[str, Any]
    networks: dict[str, tuple[Any, str]]
    """By study: the network, and the folder or URI of its bundle."""
    judge: Judge
    left_out: list[str]
    """A line for each score that cannot be had: why, and the cure."""


def prepare(config: EvaluateConfig) -> Ready:
    """Load everything, before anything is written. A score whose network cannot be had is left out.

    Raises:
        ConfigError: a bundle cannot be used.
        DatasetError: the dataset cannot be, or has no such split.
        WeightsError: a file of the networks that judge is wrong, or one of faces is missing.
    """
    manifest = shards.read_manifest(config.dataset)
    splits = sorted(manifest["splits"])
    if config.split not in splits:
        raise DatasetError(
            f"--split {config.split}: {config.dataset} has {', '.join(splits)} only; give one of these"
        )
    networks = load_networks(config, int(manifest["members"]["size"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_people = "aligner" in networks or "motion" in networks
    identities = {config.identity} if of_people else set()
    if "aligner" in networks:
        identities.add(networks["aligner"][0].config.identity)
    for file in (file for name in identities for file in arcface.WEIGHTS[name]):
        weights.find(file)
    left_out: list[str] = []
    lpips = _unless_missing(Lpips, "LPIPS", left_out)
    inception = _unless_missing(Inception, "FID", left_out) if of_people else None
    return Ready(manifest, networks, Judge(config, device, lpips, inception), left_out)


def _unless_missing(network: Callable[[], N], score: str, left_out: list[str]) -> N | None:
    """The network of a score, or None and a line in ``left_out``. Raises ``WeightsError`` for a wrong file."""
    try:
        return network()
    except MissingWeightsError as error:
        left_out.append(f"{score} is left out: {error}")
        return None


def evaluate(
    config: EvaluateConfig, ready: Ready, keep: Callable[[Found], None], say: Say
) -> dict[str, Any]:
    """Score every bundle that is given.

    Args:
        config: what and how; places absolute.
        ready: of :func:`prepare`.
        keep: takes each row and picture as it is found.
        say: told of progress and of what is left out.

    Returns:
        what was scored: dataset, bundles, networks that judged, what was left out.

    Raises:
        DatasetError: the dataset is damaged, or has not what a network needs: frames, labels, pupils.
    """
    judge = ready.judge
    left_out: list[str] = []

    def leave_out(line: str) -> None:
        say(line)
        left_out.append(line)

    for line in ready.left_out:
        leave_out(line)
    studies: dict[str, Callable[[Any], Iterator[Found]]] = {
        "aligner": lambda network: reenactment(config, network, judge, leave_out),
        "blender": lambda network: blending(config, network, judge),
        "motion": lambda network: following(config, network, judge),
    }
    most = {"aligner": 2 * len(set(config.shots)), "blender": 2, "motion": 1}
    for name, (network, _) in ready.networks.items():
        began = time.perf_counter()
        for count, found in enumerate(studies[name](network.to(judge.device).eval()), 1):
            keep(found)
            if time.perf_counter() - began > SAY_SECONDS:
                began = time.perf_counter()
                say(f"{name}: {count:,} of at most {most[name] * config.samples:,} pictures scored")
    version = ready.manifest["dataset_version"]
    return {
        "dataset": f"{public_url(config.dataset)}, version {version}, split {config.split}",
        "judged_by": {"identity": config.identity, "detector": config.detector, "landmarks": config.landmarker},
    } | {name: provenance.describe_bundle(place) for name, (_, place) in ready.networks.items()} | {"left_out": left_out}  # fmt: skip
