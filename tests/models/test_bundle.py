"""Bundles: what comes back is what was saved, or a line that says why not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from models import bundle
from models.bundle import BundleError


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A dataclass inside a dataclass."""

    widths: tuple[int, ...] = (2, 3)


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """Every kind of field that the networks' configurations have."""

    width: int = 3
    part: PartConfig = PartConfig()
    pairs: tuple[tuple[int, float], ...] = ((1, 0.5),)
    limit: int | None = None
    mode: str = "split"


class Small(nn.Module):
    """Parameters, a buffer, and a half-precision one."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Conv2d(3, config.width, 1)
        self.norm = nn.BatchNorm2d(config.width)
        self.register_buffer("scale", torch.tensor([0.5], dtype=torch.bfloat16))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundle.NETWORKS, "small", (Small, SmallConfig))


CONFIG = SmallConfig(
    width=4, part=PartConfig(widths=(7,)), pairs=((2, 0.25), (3, 0.5)), limit=9, mode="single"
)
PREVIEW = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def saved(uri: str) -> Small:
    torch.manual_seed(0)
    network = Small(CONFIG)
    network.norm.running_mean.uniform_()
    bundle.save(network, uri, {"samples_seen": 5}, PREVIEW)
    return network


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_what_comes_back_is_what_was_saved(place: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "bundle") if place == "folder" else f"memory://{tmp_path.name}/bundle"
    network = saved(uri)
    again = bundle.load(uri)
    assert isinstance(again, Small)
    assert again.config == CONFIG
    assert not any(module.training for module in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    wanted, got = network.state_dict(), again.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name
    assert bundle.read_card(uri) == {"samples_seen": 5}
    with fsspec.open(f"{uri}/preview.png") as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (image == PREVIEW).all()


def test_equal_tensors_have_one_digest(tmp_path: Path) -> None:
    network = saved(str(tmp_path / "a"))
    digests = [bundle.save(network, str(tmp_path / name), {}, PREVIEW) for name in ("b", "c")]
    assert digests[0] == digests[1]
    with torch.no_grad():
        network.layer.bias[0] += 1
    assert bundle.save(network, str(tmp_path / "d"), {}, PREVIEW) != digests[0]


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    saved(str(tmp_path / "bundle"))
    (tmp_path / "bundle" / "stray").touch()
    saved(str(tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        "model.safetensors",
        "config.json",
        "card.json",
        "preview.png",
    }


def rewrite(folder: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / bundle.MODEL)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / bundle.MODEL)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    saved(str(folder))
    rewrite(folder, lambda tensors: tensors.pop("layer.bias"))
    with pytest.raises(BundleError, match=r"layer\.bias is missing"):
        bundle.load(str(folder))
    rewrite(
        folder, lambda tensors: tensors.update({"layer.bias": torch.zeros(4), "x": torch.ones(1)})
    )
    with pytest.raises(BundleError, match="x is unknown"):
        bundle.load(str(folder))
    rewrite(
        folder, lambda tensors: (tensors.pop("x"), tensors.update({"layer.bias": torch.zeros(5)}))
    )
    with pytest.raises(BundleError, match=r"layer\.bias is \(5,\), not \(4,\)"):
        bundle.load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, this code reads 1"),
        ({"format": "other"}, "not a bundle"),
        ({"class": "os.system"}, "class 'os.system' is none of"),
        ({"config": {"widht": 3}}, "SmallConfig has no widht"),
        ({"config": {"part": {"depth": 3}}}, "PartConfig has no depth"),
    ],
)
def test_configuration_that_is_not_ours_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        bundle.load(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_that_is_damaged_or_gone_is_named(name: str, tmp_path: Path) -> None:
    saved(str(tmp_path))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        bundle.load(str(tmp_path))
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        bundle.load(str(tmp_path))


def test_network_that_bundles_do_not_know_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear is no network"):
        bundle.save(nn.Linear(1, 1), str(tmp_path / "bundle"), {}, PREVIEW)
    assert not (tmp_path / "bundle").exists()
