"""Scores of networks whose scores are known: one that gives the real picture back, one that never moves, one that shows its driver."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from models.aligner.network import Portrait
from models.blender.batch import BlenderBatch
from models.blender.masks import make_masks
from models.blender.network import Blended, BlenderConfig
from models.frozen.landmarks import load_landmarker
from models.frozen.perceptual import Lpips
from models.frozen.weights import MissingWeightsError
from pipelines import evaluation, scores
from pipelines.evaluation import EvaluateConfig, Found, Judge, Row, Sheet, Whole
from pipelines.output import ConfigError
from pipelines.scores import Line, Mean, Scores
from pipelines.shards import DatasetError
from tests import datasets, likeness
from tests.datasets import made_video, make_dataset
from tests.swaps import toy_bundles

SIZE = 128
CPU = torch.device("cpu")
NAN = float("nan")


@cache
def portrait(size: int, turn: float, hue: int) -> NDArray[np.uint8]:
    """The astronaut moved by ``turn`` of the window, tinted by ``hue``: another "person", whom a detector finds."""
    square = np.ascontiguousarray(data.astronaut()[:320, 64:384])
    matrix = np.array([[size / 320, 0, turn * size], [0, size / 320, 0]])
    image = cv2.warpAffine(square, matrix, (size, size), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
    tint = np.array([1.0, 0.8 + 0.02 * (hue % 10), 0.75 + 0.025 * (hue % 7)])
    return np.asarray((image * tint).round(), np.uint8)


def portrait_jpeg(size: int, turn: float, hue: int) -> bytes:
    coded = cv2.imencode(".jpg", portrait(size, turn, hue)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])  # fmt: skip
    return bytes(coded[1].tobytes())


@cache
def portrait_points(size: int, turn: float = 0.0) -> NDArray[np.float32]:
    box = np.array([[0.36, 0.22, 0.66, 0.56]]) * size + [[turn * size, 0, turn * size, 0]]
    return load_landmarker("dlib").locate(portrait(size, turn, 0), box)[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three people to be tested on, two to train."""
    output = str(tmp_path_factory.mktemp("people") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "face_jpeg", portrait_jpeg)
        patch.setattr(datasets, "face_points", portrait_points)
        made = [made_video(f"id-{n}", "v0", split="test", tracks=1) for n in range(1, 4)]
        made += [made_video(f"id1{n}", "v0", tracks=1) for n in range(1, 3)]
        make_dataset(output, made)
    return output


class Pooled(nn.Module):
    """In place of Inception: the colours of 2 x 2 fields."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """With an AlexNet whose numbers were drawn."""
    folder = likeness.write_alexnet(tmp_path_factory.mktemp("alexnet"))
    with pytest.MonkeyPatch.context() as patch:
        likeness.accept(folder, patch, ["alexnet"])
        lpips = Lpips()
    return Judge(EvaluateConfig(dataset="", output=""), CPU, lpips, cast(Any, Pooled()))


def settings(dataset: str, **rest: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"dataset": dataset, "output": "", "samples": 3, "batch": 3, "shots": (1, 2), "grid": 3} | rest)  # fmt: skip


class Copier:
    """An "Aligner" that shows its driver, or else its first source."""

    source_code = None

    def __init__(self, *, shows_driver: bool, has_mask: bool = False) -> None:
        self.config = SimpleNamespace(
            size=SIZE, encoder_size=SIZE, identity="dlib", has_mask=has_mask
        )
        self.shows_driver = shows_driver

    def __call__(self, sources: Tensor, _: Tensor, driving: Tensor, __: Tensor) -> Portrait:
        return Portrait(driving if self.shows_driver else sources[:, 0], None)


def sorted_out(found: Iterator[Found]) -> tuple[dict[str, list[Row]], list[Sheet], dict[str, Whole]]:  # fmt: skip
    """Rows by setting, pictures, and what is told of whole lines."""
    rows: dict[str, list[Row]] = {}
    sheets, wholes = [], {}
    for each in found:
        match each:
            case Row():
                assert set(each.values) <= set(scores.MEANINGS)
                rows.setdefault(each.setting, []).append(each)
            case Sheet():
                sheets.append(each)
            case Whole():
                assert each.name == "fid"
                wholes[each.setting] = each
    return rows, sheets, wholes


def rows_of(found: Iterator[Found]) -> tuple[dict[str, list[Row]], list[Sheet]]:
    """Rows by setting, and pictures."""
    return sorted_out(found)[:2]


@pytest.mark.slow
def test_who_shows_the_driver_scores_as_the_driver(dataset: str, judge: Judge) -> None:
    config = settings(dataset)
    network = cast(Any, Copier(shows_driver=True))
    rows, (sheet,), wholes = sorted_out(evaluation.reenactment(config, network, judge, print))
    # it shows the very frames that FID compares with
    assert {name: whole.pictures for name, whole in wholes.items()} == {"cross, K = 1": 3, "cross, K = 2": 3}  # fmt: skip
    assert all(whole.value == pytest.approx(0, abs=0.01) for whole in wholes.values())
    assert set(rows) == {"self, K = 1", "cross, K = 1", "self, K = 2", "cross, K = 2"}
    assert all(len(line) == 3 for line in rows.values())
    for row in rows["self, K = 2"]:
        assert row.key == row.driver
        assert row.values["psnr"] == 100
        assert row.values["ssim"] == pytest.approx(1)
        assert row.values["lpips"] == 0
        assert row.values["csim"] == pytest.approx(row.values["csim_of_driver"], abs=1e-6)
        assert row.values["csim_driver"] == pytest.approx(1, abs=1e-5)
        assert 0.9 < row.values["csim"] < 1  # other frames of the same person
    for row in rows["cross, K = 2"]:
        assert row.key.split("-v0")[0] != row.driver.split("-v0")[0]
        assert row.values["pose"] == row.values["pose_fitted"] == row.values["head_pose"] == 0
        assert row.values["leakage"] == pytest.approx(1 - row.values["csim"], abs=1e-5)
        assert row.values["leakage"] > 0
        assert not {"psnr", "lpips"} & set(row.values)  # nobody knows the truth
    keys = [row.key for row in rows["self, K = 1"]]
    assert [key.split("-v0")[0] for key in keys] == [
        "id-1",
        "id-2",
        "id-3",
    ]  # a dash is part of a name
    assert all([row.key for row in line] == keys for line in rows.values())
    drivers = [row.driver for row in rows["cross, K = 1"]]
    assert drivers == [*keys[1:], keys[0]]
    # batches are how, not what
    alone, _ = rows_of(evaluation.reenactment(settings(dataset, batch=1), network, judge, print))
    assert [row.driver for row in alone["cross, K = 1"]] == drivers
    assert [row.values for row in alone["cross, K = 2"]] == [row.values for row in rows["cross, K = 2"]]  # fmt: skip
    # rows of people, columns of drivers: here each column is one picture
    assert sheet.image.shape == (4 * SIZE, 4 * SIZE, 3)
    cells = sheet.image.reshape(4, SIZE, 4, SIZE, 3).swapaxes(1, 2)
    assert all(np.array_equal(cells[i, j], cells[0, j]) for i in (1, 2, 3) for j in (1, 2, 3))


@pytest.mark.slow
def test_who_never_moves_has_the_person_and_not_the_pose(dataset: str, judge: Judge) -> None:
    network = cast(Any, Copier(shows_driver=False))
    config = settings(dataset, shots=(1,))
    rows, _, wholes = sorted_out(evaluation.reenactment(config, network, judge, print))
    assert wholes["cross, K = 1"].value > 1
    for row in rows["self, K = 1"]:
        assert row.values["csim"] == pytest.approx(1, abs=1e-5)  # its only picture
        assert row.values["lpips"] > 1e-4
        assert row.values["psnr"] < 40
        assert row.values["pose"] > 0.02
        assert row.values["pose_fitted"] < row.values["pose"]
    assert all(row.values["leakage"] < 0 for row in rows["cross, K = 1"])


@pytest.mark.slow
def test_shots_that_the_videos_do_not_have_are_left_out_and_said(
    dataset: str, judge: Judge
) -> None:
    told: list[str] = []
    network = cast(Any, Copier(shows_driver=True))
    config = settings(dataset, shots=(1, 8), samples=1, batch=1)
    rows, _ = rows_of(evaluation.reenactment(config, network, judge, told.append))
    assert set(rows) == {"self, K = 1"}
    assert len(told) == 2
    assert "K = 8 is left out" in told[0]
    assert "at most 4 sources" in told[0]
    assert "nobody is driven by somebody else" in told[1]
    with pytest.raises(DatasetError, match="at most 4 sources"):
        list(evaluation.reenactment(settings(dataset, shots=(8,)), network, judge, print))


@pytest.mark.slow
def test_a_person_before_black_needs_labels(
    dataset: str, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = cast(Any, Copier(shows_driver=True, has_mask=True))
    config = settings(dataset, shots=(1,), samples=2)
    rows, _, wholes = sorted_out(evaluation.reenactment(config, network, judge, print))
    assert (
        5 < rows["self, K = 1"][0].values["psnr"] < 20
    )  # the target is black outside the drawn labels
    assert wholes["cross, K = 1"].value > 100  # and so are the frames of FID
    opened = evaluation.AlignerSamples

    def without_labels(*arguments: Any, **named: Any) -> Any:
        samples = opened(*arguments, **named)
        samples.reader.has_labels = False
        return samples

    monkeypatch.setattr(evaluation, "AlignerSamples", without_labels)
    told: list[str] = []
    rows, _, wholes = sorted_out(evaluation.reenactment(config, network, judge, told.append))
    assert all(np.isnan(rows["self, K = 1"][0].values[name]) for name in ("psnr", "ssim", "lpips"))
    assert wholes == {}
    assert any("no labels" in line for line in told)


class TrueBlender:
    """A "Blender" that knows the truth, or leaves the head as it is."""

    def __init__(self, *, knows: bool) -> None:
        self.config = BlenderConfig(size=SIZE, trunk="small")
        self.knows = knows

    def __call__(self, batch: BlenderBatch) -> Blended:
        masks = make_masks(batch.animated_labels, batch.target_labels, 4, valid_t=batch.target_valid)  # fmt: skip
        image = batch.truth if self.knows else batch.animated
        nothing = torch.zeros_like(image)
        return Blended(image, nothing, nothing, masks, torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize("knows", [True, False])
def test_a_blender_is_judged_by_what_it_painted(dataset: str, judge: Judge, knows: bool) -> None:
    network = cast(Any, TrueBlender(knows=knows))
    rows, sheets = rows_of(evaluation.blending(settings(dataset), network, judge))
    assert {name: len(line) for name, line in rows.items()} == {"own colours": 3, "other colours": 3}  # fmt: skip
    assert len(sheets) == 2
    for row in rows["own colours"]:
        assert row.values["skin_delta_e_before"] == row.values["skin_delta_e"] == 0
        assert row.values["psnr_head"] == 100
    others = [row.values for row in rows["other colours"]]
    assert np.mean([values["skin_delta_e_before"] for values in others]) > 3
    for values in others:
        if knows:
            assert values["psnr"] == values["psnr_head"] == values["psnr_inpainted"] == 100
            assert values["skin_delta_e"] == values["hair_delta_e"] == 0
            assert values["ssim"] == pytest.approx(1)
            assert values["lpips"] == 0
        else:
            assert values["lpips"] > 1e-4
            for group in ("skin", "hair"):
                painted = values[f"{group}_delta_e"]
                assert painted == pytest.approx(values[f"{group}_delta_e_before"], abs=0.05)


def test_a_clip_that_stands_still_gets_what_its_source_gets(dataset: str, judge: Judge) -> None:
    class Still:
        config = SimpleNamespace(size=SIZE, num_landmarks=68)

        def __call__(self, source: Tensor, *_: Tensor) -> tuple[Tensor, None]:
            return source, None

    rows, (sheet,), wholes = sorted_out(
        evaluation.following(settings(dataset), cast(Any, Still()), judge)
    )
    assert wholes["same person"].value > 0
    assert wholes["same person"].pictures == 3
    assert len(rows["same person"]) == 3
    for row in rows["same person"]:
        assert row.key.endswith(".000010")
        assert row.driver != row.key
        assert row.values["l1"] == row.values["l1_source"] > 0
        assert row.values["lpips"] > 1e-4
        assert row.values["akd"] == row.values["akd_source"] > 0.5
        assert 0 < row.values["aed"] < 0.3
        assert row.values["found"] == 1
    assert sheet.image.shape == (3 * SIZE, 3 * SIZE, 3)


@pytest.mark.slow
def test_a_picture_without_a_face_has_no_pose_and_is_counted(judge: Judge) -> None:
    real = portrait(SIZE, 0.0, 0)
    points = judge.points(real)
    assert points is not None
    person = judge.vector_of(real)
    values = evaluation.followed(judge, np.full_like(real, 90), real, points, person)
    assert values["found"] == 0
    assert np.isnan([values["pose"], values["pose_fitted"], values["head_pose"]]).all()
    assert values["csim"] < values["csim_of_driver"] - 0.05  # of the place where the face should be
    assert np.isnan(evaluation.followed(judge, real, real, None, person)["found"])
    assert judge.vector_of(np.full_like(real, 90)) is None


def test_scores_of_pictures_that_are_known() -> None:
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 51, np.uint8)
    assert evaluation.decibels(grey, black) == pytest.approx(20 * np.log10(5))
    assert evaluation.decibels(black, black) == 100
    half = np.arange(64).reshape(8, 8) < 32
    mixed = np.where(half[..., None], grey, black)
    assert evaluation.decibels(mixed, black, half) == pytest.approx(20 * np.log10(5))
    assert evaluation.decibels(mixed, black, ~half) == 100
    assert np.isnan(evaluation.decibels(mixed, black, half & ~half))
    assert evaluation.colour_distance(mixed, black, ~half) == 0
    assert evaluation.colour_distance(mixed, black, half) > 10
    assert np.isnan(evaluation.colour_distance(mixed, black, half & ~half))
    noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert evaluation.similarity(noisy, noisy) == pytest.approx(1)
    assert abs(evaluation.similarity(noisy, noisy[::-1])) < 0.2


# --- tables -----------------------------------------------------------------------------------------------------


def some_scores() -> Scores:
    found = Scores()
    for shots, values in ((1, (0.5, 0.7)), (8, (0.8, NAN))):
        for number, value in enumerate(values):
            found.add(Row(study="aligner", setting=f"self, K = {shots}", key=f"<b>{number}", driver="d", values={"csim": value, "pose_fitted": NAN}))  # fmt: skip
    found.add(Whole(study="aligner", setting="self, K = 8", name="fid", value=35.335, pictures=2))
    found.add(Sheet(study="aligner", title="<i>people", image=np.zeros((4, 3000, 3), np.uint8)))
    return found


def test_means_are_of_what_is_there() -> None:
    (first, second) = some_scores().tables()["aligner"]
    assert first == Line("self, K = 1", 2, {"csim": Mean(0.6, pytest.approx(0.1), 2), "pose_fitted": first.means["pose_fitted"]})  # fmt: skip
    assert first.means["pose_fitted"].count == 0
    assert (second.means["csim"].value, second.means["csim"].count, second.pictures) == (0.8, 1, 2)
    assert some_scores().flat() == {
        "aligner/self_K1/csim": pytest.approx(0.6),
        "aligner/self_K8/csim": 0.8,
        "aligner/self_K8/fid": 35.335,
    }


def test_files_hold_every_picture_and_the_page_nothing_foreign(tmp_path: Path) -> None:
    scores.write(str(tmp_path), some_scores(), {"dataset": "<script>", "aligner": {"sha256": "ab", "of": {"uri": "<u>"}}})  # fmt: skip
    rows = list(csv.DictReader(io.StringIO((tmp_path / scores.ROWS).read_text())))
    assert [row["csim"] for row in rows] == ["0.5", "0.7", "0.8", ""]
    told = json.loads((tmp_path / scores.SCORES).read_text())
    assert told["scores"]["aligner"]["self, K = 8"] == {
        "csim": {"value": 0.8, "deviation": 0.0, "count": 1},
        "fid": {"value": 35.335, "deviation": None, "count": 2},
    }
    assert "fid" not in rows[0]  # no single picture has it
    assert cv2.imread(str(tmp_path / "aligner-0.png")).shape == (4, 3000, 3)
    page = (tmp_path / scores.PAGE).read_text()
    assert "&lt;script&gt;" in page
    assert '35.34 <span class="faint">n = 2</span>' in page
    assert "&lt;i&gt;people" in page
    assert not {"<script", "<i>", "<u>", "http://", "https://"} & {part for part in ("<script", "<i>", "<u>", "http://", "https://") if part in page}  # fmt: skip


def test_curves_rise_with_the_score() -> None:
    (curve,) = scores.curves(some_scores().tables()["aligner"])  # the other score has no number
    (first, second) = curve.lines["self"]
    assert first[0] < second[0]
    assert first[1] > second[1]  # y goes down
    assert [told for _, told in curve.ticks] == ["1", "8"]
    assert (curve.low, curve.high) == (pytest.approx(0.6), 0.8)
    assert scores.curves(some_scores().tables()["aligner"][:1]) == []


# --- inputs -----------------------------------------------------------------------------------------------------


def test_inputs_that_cannot_be_used(dataset: str, tmp_path: Path) -> None:
    aligner, blender = toy_bundles(tmp_path)
    for change, told in (
        ({}, "nothing to evaluate"),
        ({"aligner": blender}, "a bundle of Blender, not of Aligner"),
        ({"aligner": str(tmp_path / "none")}, "--aligner"),
        ({"dataset": str(tmp_path), "aligner": aligner}, "dataset.json"),
        ({"split": "val", "aligner": aligner}, "val"),
        (
            {"aligner": toy_bundles(tmp_path / "large", 256)[0]},
            "256 px, the windows of .* are 128 px",
        ),
    ):
        with pytest.raises((ConfigError, DatasetError), match=told):
            evaluation.prepare(settings(**{"dataset": dataset} | change))
    # before anything is scored, not when a face is first looked at
    with pytest.MonkeyPatch.context() as patch:
        likeness.hide(tmp_path, patch, ["ir_se50"])
        with pytest.raises(MissingWeightsError, match="weights ir_se50"):
            evaluation.prepare(settings(dataset, aligner=aligner, identity="arcface"))
    for wrong in ({"samples": 0}, {"batch": 0}, {"shots": ()}, {"shots": (0,)}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"at least 1|from 1|seed must be 0"):
            settings(dataset, **wrong)
