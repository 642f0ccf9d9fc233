"""LPIPS against its definition, FID against closed forms; with drawn weights, for the published ones cannot be had here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from skimage import data
from torch import Tensor

from models.frozen.perceptual import Inception, Lpips, frechet_distance
from models.frozen.weights import REGISTRY, WeightsError
from tests import likeness

TAPS = (1, 4, 7, 9, 11)
"""Of AlexNet's ``features``: the five ReLUs."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The registry's files; nothing else is loaded: who asks torch.hub fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.hub was asked")

    written = likeness.write_inception(likeness.write_alexnet(tmp_path_factory.mktemp("networks")))
    with pytest.MonkeyPatch.context() as patch:
        likeness.accept(written, patch)
        patch.setattr("torch.hub.download_url_to_file", refuse)
        patch.setenv("TORCH_HOME", str(written))
        yield written


def pairs() -> tuple[Tensor, Tensor]:
    """Two pictures (2, 3, 96, 64) in [-1, 1], and others: noisier, and of something else."""
    rng = np.random.default_rng(0)
    face, cat = (np.moveaxis(image[:96, 200:264] / 127.5 - 1, 2, 0) for image in (data.astronaut(), data.cat()))  # fmt: skip
    noisy = np.clip(face + rng.normal(0, 0.1, face.shape), -1, 1)
    one, other = np.stack([face, face]), np.stack([noisy, cat])
    return torch.from_numpy(one).float(), torch.from_numpy(other).float()


def test_lpips_is_what_its_paper_says(folder: Path) -> None:
    """Unit features of AlexNet's ReLUs, squared differences weighted by channel, mean over places, summed over layers."""
    one, other = pairs()
    features = torchvision.models.AlexNet().features
    state = torch.load(folder / REGISTRY["alexnet"].file, weights_only=True)
    features.load_state_dict({name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")})  # fmt: skip
    shipped = files("torchmetrics") / "functional/image/lpips_models/alex.pth"
    linear = torch.load(str(shipped), map_location="cpu", weights_only=True)
    shift, scale = (torch.tensor(numbers)[:, None, None] for numbers in (SHIFT, SCALE))
    x, y = (one - shift) / scale, (other - shift) / scale
    expected = torch.zeros(2)
    with torch.no_grad():
        for place, layer in enumerate(features):
            x, y = layer(x.clone()), layer(y.clone())
            if place in TAPS:
                weight = linear[f"lin{TAPS.index(place)}.model.1.weight"]  # (1, c, 1, 1)
                difference = torch.nn.functional.normalize(x) - torch.nn.functional.normalize(y)
                expected += (weight * difference.square()).sum(dim=1).mean(dim=(1, 2))
    network = Lpips()
    torch.testing.assert_close(network(one, other), expected, rtol=1e-4, atol=1e-5)
    assert network(one, one).tolist() == [0, 0]
    torch.testing.assert_close(network(other, one), network(one, other))
    assert 0 < network(one, other)[0] < network(one, other)[1]  # noise is nearer than a cat
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_lpips_asks_for_what_torchvisions_alexnet_has(folder: Path) -> None:
    with torch.device("meta"):
        published = torchvision.models.AlexNet().state_dict()
    asked = torch.load(folder / REGISTRY["alexnet"].file, weights_only=True)
    asked = {name: value.shape for name, value in asked.items() if name.startswith("features.")}
    assert asked == {name: value.shape for name, value in published.items() if name in asked}
    assert len(asked) == 10
    loaded = Lpips().network.net.state_dict()
    assert sorted(value.shape for value in loaded.values()) == sorted(asked.values())


@pytest.mark.usefixtures("folder")
def test_features_of_a_picture_do_not_depend_on_its_neighbours() -> None:
    network = Inception()
    one, other = (((images + 1) * 127.5).byte() for images in pairs())
    with torch.inference_mode():
        both, alone = network(torch.cat([one[:1], other])), network(one[:1])
    assert both.shape == (3, 2048)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
    assert (both[0] - both[2]).norm() > (both[0] - both[1]).norm() > 0
    assert not network.network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_file_that_is_not_the_published_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRAY_WEIGHTS", str(tmp_path))
    for name, network in (("alexnet", Lpips), ("inception", Inception)):
        (tmp_path / REGISTRY[name].file).write_bytes(b"something else")
        with pytest.raises(WeightsError, match=f"weights {name}: .* has sha256"):
            network()


# --- FID --------------------------------------------------------------------------------------------------------


def drawn(seed: int, count: int, size: int) -> Tensor:
    """Features (count, size) whose directions are correlated."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, size)) @ rng.normal(size=(size, size))
    return torch.from_numpy(mixed + rng.normal(size=size))


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    """Means 3 and 4 apart in two directions; standard deviations 1, 2, 3 and 4, 2, 1 along the same axes."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(50, 3))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    one = torch.from_numpy(white * [1, 2, 3])
    other = torch.from_numpy(white * [4, 2, 1] + [3, 0, 4])
    assert frechet_distance(one, other) == pytest.approx(25 + 9 + 0 + 4)
    assert frechet_distance(other, one) == pytest.approx(38)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_the_distance_is_scipys() -> None:
    one, other = drawn(1, 60, 12), drawn(2, 40, 12)
    a, b = (np.cov(each.numpy(), rowvar=False) for each in (one, other))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = (one.mean(0) - other.mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)


def test_fewer_pictures_than_features_are_compared_too() -> None:
    """The root of a product of covariances is as large as the singular values of the pictures' products."""
    one, other = drawn(1, 9, 64), drawn(2, 7, 64)
    x, y = one - one.mean(0), other - other.mean(0)
    trace = torch.linalg.svdvals(x @ y.T).sum() / (8 * 6) ** 0.5
    expected = (one.mean(0) - other.mean(0)).square().sum() + x.square().sum() / 8 + y.square().sum() / 6 - 2 * trace  # fmt: skip
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="at least 2 pictures of each kind, got 1 and 9"):
        frechet_distance(one[:1], one)


def test_few_pictures_of_one_distribution_are_far_apart() -> None:
    """What the page warns of: the same Gaussian twice, whose distance is 0."""
    generator = torch.Generator().manual_seed(0)
    found = [
        frechet_distance(*torch.randn(2, count, 64, generator=generator).double())
        for count in (20, 200, 2000)
    ]
    assert found[0] > 10 * found[2] > 0
    assert found[0] > found[1] > found[2]
