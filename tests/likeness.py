"""Files for the networks of LPIPS and FID: as the published ones, but for numbers that were drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from models.frozen import weights
from models.frozen.weights import REGISTRY

NAMES = ("alexnet", "inception")


def write_alexnet(folder: Path) -> Path:
    """What LPIPS uses of it, and a little of the rest, under the name of the file; 10 MB."""
    torch.manual_seed(0)
    features = torchvision.models.AlexNet().features
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state | {"classifier.1.bias": torch.zeros(1)}, folder / REGISTRY["alexnet"].file)
    return folder


def write_inception(folder: Path) -> Path:
    """The whole network under the name of the file; 96 MB."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Drawn(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any) -> None:
            """Keep what was drawn."""

    torch.manual_seed(0)
    nothing = folder / "nothing"
    torch.save({}, nothing)
    network = Drawn("", ["2048"], feature_extractor_weights_path=str(nothing))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # so that what goes in still shows after 50 layers
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / REGISTRY["inception"].file)
    return folder


def accept(folder: Path, patch: pytest.MonkeyPatch, names: Sequence[str] = NAMES) -> None:
    """Have the registry take the files of this folder for the published ones."""
    patch.setenv(weights.FOLDER_VARIABLE, str(folder))
    for name in names:
        content = (folder / REGISTRY[name].file).read_bytes()
        entry = replace(REGISTRY[name], sha256=hashlib.sha256(content).hexdigest())
        patch.setitem(REGISTRY, name, entry)


def hide(empty: Path, patch: pytest.MonkeyPatch, names: Sequence[str] = NAMES) -> None:
    """Have none of the files on this machine, and nobody who sends them."""
    patch.setenv("HOME", str(empty))
    patch.delenv(weights.FOLDER_VARIABLE, raising=False)
    for name in names:
        patch.setitem(REGISTRY, name, replace(REGISTRY[name], url="http://127.0.0.1:9/nobody"))
