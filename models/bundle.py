"""The form in which a trained network is handed on: a folder of four files, without a pickle.

    model.safetensors   the tensors
    config.json         {"format", "schema_version", "class", "config"}: rebuilds the network
    card.json           where it comes from: dataset and its version, samples seen, scores, commit
    preview.png         what it makes of pictures it was not trained on

A folder, or an fsspec URI. ``config.json`` names the class by a word of :data:`NETWORKS`, not by an import path: a bundle
cannot make its reader run code. A checkpoint, which continues a training, is another thing (pipelines/checkpoints.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import safetensors.torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import nn

from models.aligner.network import Aligner, AlignerConfig
from models.blender.network import Blender, BlenderConfig
from models.frozen.weights import WeightsError
from models.motion.network import Motion, MotionConfig

MODEL, CONFIG, CARD, PREVIEW = "model.safetensors", "config.json", "card.json", "preview.png"
SCHEMA_VERSION = 1

NETWORKS: dict[str, tuple[Callable[[Any], nn.Module], type]] = {
    "aligner": (Aligner, AlignerConfig),
    "blender": (Blender, BlenderConfig),
    "motion": (Motion, MotionConfig),
}
"""Word in ``config.json`` → the network, built from its frozen dataclass of a configuration."""


class BundleError(WeightsError):
    """The bundle is not there, damaged, or of another version: one line for the user."""


def save(network: nn.Module, uri: str, card: Mapping[str, Any], preview: NDArray[np.uint8]) -> str:
    """Write a bundle; it appears whole or not at all, in place of one that was there.

    Args:
        network: built from ``network.config``, one of :data:`NETWORKS`.
        uri: folder or fsspec URI.
        card: JSON: dataset and version, samples seen, scores, commit.
        preview: (h, w, 3) uint8 RGB.

    Returns:
        the sha256 of ``model.safetensors``: equal tensors and names give equal ones.

    Raises:
        ValueError: the network is not one of :data:`NETWORKS`.
    """
    told = {
        "format": "headray-bundle",
        "schema_version": SCHEMA_VERSION,
        "class": _word(network),
        "config": dataclasses.asdict(network.config),  # type: ignore[call-overload]
    }
    with tempfile.TemporaryDirectory(prefix="headray-") as made:
        folder = Path(made)
        tensors = {
            name: value.detach().contiguous() for name, value in network.state_dict().items()
        }
        content = safetensors.torch.save(tensors)
        (folder / MODEL).write_bytes(content)
        (folder / CARD).write_text(json.dumps(dict(card), indent=1, sort_keys=True))
        if not cv2.imwrite(str(folder / PREVIEW), np.ascontiguousarray(preview[:, :, ::-1])):
            raise ValueError(f"preview of shape {preview.shape} cannot be written as PNG")
        (folder / CONFIG).write_text(json.dumps(told, indent=1, sort_keys=True))
        _put(folder, uri)
    return hashlib.sha256(content).hexdigest()


def load(uri: str) -> nn.Module:
    """The network of a bundle, on the CPU, in eval mode.

    Args:
        uri: folder or fsspec URI; ``models:/NAME@alias`` goes through pipelines.tracking.find_bundle first.

    Raises:
        BundleError: something is missing, damaged, unknown, or does not fit.
    """
    told = _read_json(uri, CONFIG)
    if told.get("format") != "headray-bundle":
        raise BundleError(f"{uri}/{CONFIG}: not a bundle of HeadRay")
    if told.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{uri}: schema_version {told.get('schema_version')}, this code reads {SCHEMA_VERSION}"
        )
    if told.get("class") not in NETWORKS:
        raise BundleError(f"{uri}: class {told.get('class')!r} is none of {sorted(NETWORKS)}")
    make, config_class = NETWORKS[told["class"]]
    try:
        network = make(rebuild(config_class, told["config"]))
    except (TypeError, ValueError, KeyError) as error:
        raise BundleError(f"{uri}/{CONFIG}: {error}") from error
    try:
        tensors = safetensors.torch.load(_read(uri, MODEL))
    except safetensors.SafetensorError as error:
        raise BundleError(f"{uri}/{MODEL}: {error}") from None
    wanted = network.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BundleError(f"{uri}/{MODEL}: {', '.join(wrong[:5])}{more}")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def read_card(uri: str) -> dict[str, Any]:
    """``card.json``. Raises :class:`BundleError`."""
    return _read_json(uri, CARD)


def rebuild(config_class: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON: lists become tuples, mappings the dataclasses of their fields.

    Raises:
        ValueError: a field is unknown, or one without a default is missing.
    """
    hints = typing.get_type_hints(config_class)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{config_class.__name__} has no {', '.join(unknown)}")
    return config_class(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return rebuild(typing.cast(type, hint), value)
    if isinstance(value, list):
        inner = typing.get_args(hint)
        return tuple(_typed(inner[0] if inner else None, each) for each in value)
    return value


def _word(network: nn.Module) -> str:
    config = getattr(network, "config", None)
    for word, (_, config_class) in NETWORKS.items():
        if type(config) is config_class:
            return word
    raise ValueError(
        f"{type(network).__name__} is no network that bundles know: {sorted(NETWORKS)}"
    )


def _put(folder: Path, uri: str) -> None:
    """The four files under their URI: a local folder is renamed into place, an object store gets config.json last."""
    fs, path = fsspec.core.url_to_fs(uri)
    if not isinstance(fs, LocalFileSystem):
        for name in (MODEL, CARD, PREVIEW, CONFIG):
            fs.put_file(str(folder / name), f"{path}/{name}")
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=target.parent) as aside:
        Path(aside, "new").mkdir()
        for name in (MODEL, CARD, PREVIEW, CONFIG):
            shutil.copyfile(folder / name, Path(aside, "new", name))
        if target.exists():
            target.rename(Path(aside, "old"))
        Path(aside, "new").rename(target)


def _read(uri: str, name: str) -> bytes:
    fs, path = fsspec.core.url_to_fs(uri)
    try:
        return bytes(fs.cat_file(f"{path}/{name}"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{uri}: no bundle there ({name} is missing)") from None


def _read_json(uri: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(_read(uri, name))
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{uri}/{name}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise BundleError(f"{uri}/{name}: not an object")
    return content
