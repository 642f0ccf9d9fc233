"""On a GPU everything meets everything else on one device, and comes out as on a CPU: see ``tests/elsewhere.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor, nn

from models import bundle
from models.aligner.learner import AlignerLearner, Frozen
from models.aligner.network import Aligner
from models.aligner.subject import of_person, subject_learner
from models.blender.learner import BlenderLearner
from models.blender.network import Blender
from models.blender.warp import Backend
from models.frozen import identity, landmarks, parsing
from models.frozen.identity import ArcFaceEmbedder
from models.frozen.landmarks import FanConfig, FanLandmarker
from models.frozen.parsing import load_parser
from models.motion.learner import MotionLearner
from models.reenactment import Reenactor
from pipelines import evaluation
from pipelines.animate import AnimateConfig, generate
from pipelines.evaluation import EvaluateConfig, Found, Judge, Row, Sheet, evaluate, prepare
from pipelines.geometry import heser_window
from pipelines.repaint import Shot, Swapper
from pipelines.training import Meter
from tests import aligners, elsewhere, likeness
from tests.datasets import made_video, make_dataset
from tests.faces import FACE_68
from tests.models.blender import scenes
from tests.models.blender.test_learner import CONFIG as BLENDER
from tests.models.motion import pairs
from tests.models.motion.tiny import awake, tiny
from tests.models.test_reenactment import with_views
from tests.swaps import SIZE, FlatParser, toy_bundles

Results = Mapping[str, Any]
WHERE: dict[str, Callable[[], AbstractContextManager[torch.device]]] = {
    "cpu": lambda: nullcontext(torch.device("cpu")),
    "gpu": elsewhere.gpu,
}


def same_on_both(work: Callable[[torch.device], Results]) -> None:
    """What is made on the GPU is there, and is what is made on the CPU, to the last bit."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, where in WHERE.items():
        torch.manual_seed(0)
        with where() as device:
            out = work(device)
            for key, value in out.items():
                assert not isinstance(value, Tensor) or value.device == device, key
            found[name] = {
                key: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.array(value)
                for key, value in out.items()
            }
    assert found["cpu"]
    assert list(found["cpu"]) == list(found["gpu"])
    for key, value in found["cpu"].items():
        np.testing.assert_array_equal(found["gpu"][key], value, err_msg=key)


def two_steps(learner: Any, batch: Any, device: torch.device) -> Results:
    """All that a run does with a learner: steps and their mean, an evaluation, a preview, the exported weights."""
    meter, there = Meter(torch.device("cpu"), 1), batch.to(device, non_blocking=True)
    meter.device = device  # the counter of its memory is the driver's
    for step in range(2):
        meter.add(learner.train_step(there, step))
    evaluated, preview = learner.eval_step(there), learner.preview(there)
    exported = {f"weights/{name}": x for name, x in learner.export().state_dict().items()}
    return {**meter.means(), **evaluated, "preview": preview, **exported}


def with_small_identity(learner: AlignerLearner) -> AlignerLearner:
    """The learner with an identity network that takes milliseconds."""
    identity = aligners.SmallIdentity().eval().requires_grad_(False)
    learner.frozen = Frozen(identity.to(learner.device), learner.frozen.vgg)
    return learner


def bare(network: nn.Module) -> nn.Module:
    """Wraps nothing."""
    return network


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return toy_bundles(tmp_path_factory.mktemp("bundles"))


def test_what_a_gpu_would_refuse_is_refused() -> None:
    with elsewhere.gpu() as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert there.device == torch.device("cuda", 0)
        for wrong in (
            lambda: there + here,
            lambda: torch.where(here > 0, there, there),
            lambda: torch.cat([there, here]),
            lambda: nn.Linear(3, 3)(there),
            lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        # what it would not: numbers, indices, copies
        picked = (2 * there + torch.tensor(1.0))[torch.tensor([1])]
        assert picked.device == device
        assert picked.tolist() == [[3.0, 3.0, 3.0]]
        here.copy_(picked[0])
        assert here.sum() == 18


@pytest.mark.slow
def test_an_aligner_learns_where_it_is_told_to() -> None:
    def work(device: torch.device) -> Results:
        config = replace(aligners.LEARNER, accumulate=2)
        learner = AlignerLearner(config, wrap=bare, device=device)
        return two_steps(with_small_identity(learner), aligners.drawn_batch(), device)

    same_on_both(work)


@pytest.mark.slow
def test_a_person_is_learned_where_told_to() -> None:
    def work(device: torch.device) -> Results:
        aligner = Aligner(replace(aligners.NETWORK, identity="dlib"))
        code = torch.randn(1, aligner.config.source_dim)
        config = replace(aligners.LEARNER, vgg="none", random_init=False)
        learner = subject_learner(config, of_person(aligner, code), device)
        return two_steps(with_small_identity(learner), aligners.drawn_batch(), device)

    same_on_both(work)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "blocks", "chunked"])
def test_a_blender_learns_where_it_is_told_to(backend: Backend) -> None:
    network = replace(BLENDER.network, warp=replace(BLENDER.network.warp, backend=backend))

    def work(device: torch.device) -> Results:
        reenact = None
        if backend == "chunked":  # with an Aligner's heads
            aligner = Aligner(replace(aligners.NETWORK, identity="dlib")).eval()
            reenact = Reenactor(aligner)
            reenact.identity = aligners.SmallIdentity().eval()
            reenact.to(device)
        config = replace(BLENDER, network=network)
        learner = BlenderLearner(config, wrap=bare, device=device, reenact=reenact)
        return two_steps(learner, with_views() if reenact else scenes.drawn_batch(2), device)

    same_on_both(work)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_motion_model_learns_where_it_is_told_to(stage: int) -> None:
    config = replace(pairs.CONFIG, stage=stage)

    def work(device: torch.device) -> Results:
        return two_steps(MotionLearner(config, wrap=bare, device=device), pairs.pairs(), device)

    same_on_both(work)


def test_a_face_is_animated_there() -> None:
    window = cv2.resize(data.astronaut()[:256, 96:352], (32, 32))
    source = (FACE_68 + 1) * 16
    driving = np.stack([source + t for t in range(3)])
    config = AnimateConfig(motion="", source="", driving="", output="", batch=2)

    def work(device: torch.device) -> Results:
        model = awake(tiny(num_landmarks=68)).eval().to(device)
        return {"frames": list(generate(model, window, source, driving, config))}

    same_on_both(work)


@pytest.mark.slow
def test_a_head_is_swapped_there(bundles: tuple[str, str]) -> None:
    frame = data.astronaut()
    points = FACE_68 * 70 + (225, 120)
    shots = [Shot(t, frame, heser_window(points + t, SIZE), points + t) for t in range(3)]

    def work(device: torch.device) -> Results:
        networks = [bundle.load(uri).to(device) for uri in bundles]
        aligner, blender = networks
        assert isinstance(aligner, Aligner)
        assert isinstance(blender, Blender)
        code = torch.randn(1, aligner.config.source_dim).to(device)
        swapper = Swapper(aligner, blender, FlatParser(), code, batch=2)
        swapped = list(swapper.swap(shots))
        assert all(each.drawn is not None for each in swapped)
        return {
            "frames": [each.image for each in swapped],
            "heads": torch.stack([each.drawn.animated for each in swapped if each.drawn]),
        }

    same_on_both(work)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["bisenet", "arcface", "fan", "fan, mirrored"])
def test_frozen_networks_answer_from_there(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (
        parsing.BATCH,
        landmarks.FAN_BATCH,
    ):  # as many on both: sums of others differ in their last bits
        for device in list(batch):
            monkeypatch.setitem(batch, device, 1)
    monkeypatch.setattr(identity, "BATCH", 2)
    picture = np.ascontiguousarray(data.astronaut())
    windows, points = [picture] * 2, np.stack([FACE_68 * 70 + (225, 120)] * 2)

    def work(_: torch.device) -> Results:
        if network == "bisenet":
            inside = [np.ones(picture.shape[:2], bool)] * 2
            parser = load_parser("bisenet", random_init=True)
            return {"labels": parser.parse(windows, points, inside)}
        if network == "arcface":
            embedder = ArcFaceEmbedder(random_init=True)
            return {"vectors": embedder.embed(windows, points)}
        landmarker = FanLandmarker(FanConfig(flip="mirrored" in network), random_init=True)
        return {"points": landmarker.locate(picture, np.array([[150.0, 40, 300, 220]]))}

    same_on_both(work)


@pytest.mark.slow
def test_scores_come_from_there(
    bundles: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the faces are is said: finding them is no work for a GPU here, and drawn ones take the detector seconds."""
    monkeypatch.setattr(Judge, "points", lambda *_: FACE_68 * 60 + 128)
    # of the features, eigenvalues on the CPU take seconds and prove nothing here
    monkeypatch.setattr(evaluation, "frechet_distance", lambda *both: float(torch.dist(*both)))
    likeness.accept(likeness.write_inception(likeness.write_alexnet(tmp_path)), monkeypatch)
    dataset, motion = str(tmp_path / "people"), str(tmp_path / "motion")
    make_dataset(dataset, [made_video(f"id0{n}", "v0", split="test", tracks=1) for n in (1, 2)])
    model = tiny(size=64, patch=16, num_landmarks=68).eval()
    bundle.save(model, motion, {}, np.zeros((4, 4, 3), np.uint8))
    config = EvaluateConfig(
        dataset=dataset, output="", aligner=bundles[0], blender=bundles[1], motion=motion, samples=2, batch=2, shots=(1,), grid=2
    )  # fmt: skip

    def work(_: torch.device) -> Results:
        found: list[Found] = []
        evaluate(config, prepare(config), found.append, print)
        told: dict[str, Any] = {}
        for number, each in enumerate(found):
            match each:
                case Row():
                    told[f"{number}"] = list(each.values.values())
                    assert ("lpips" in each.values) != each.setting.startswith("cross")
                case Sheet():
                    told[f"{number}"] = each.image
                case _:
                    told[f"{number} {each.name}"] = [each.value]
        assert sum("fid" in name for name in told) == 2
        return told

    same_on_both(work)
