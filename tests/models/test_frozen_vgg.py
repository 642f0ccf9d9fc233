"""VGG-19's parts: counts, layers against torchvision's own forward pass, and the real small network."""

import pytest
import skimage.data
import torch
import torchvision

from models.frozen import weights
from models.frozen.vgg import IMAGENET_MEAN, IMAGENET_STD, Vgg19Features
from tests.material import SHARED, needs_shared


@pytest.mark.parametrize(
    ("last", "parameters"),
    [("relu3_4", 2_325_568), ("relu4_4", 10_585_152), ("relu5_4", 20_024_384)],
)
def test_parameters_up_to_a_layer(last, parameters):
    with torch.device("meta"):
        network = Vgg19Features([last], random_init=True)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_layers_are_torchvisions(monkeypatch, tmp_path):
    """A published state is loaded, with the names torchvision gives it, and computes what torchvision computes."""
    torch.manual_seed(0)
    theirs = torchvision.models.vgg19(init_weights=False).features[:12]  # to relu3_1
    state = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    path = tmp_path / "vgg19.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, path)
    monkeypatch.setattr("models.frozen.vgg.find", {"vgg19": path}.__getitem__)
    network = Vgg19Features(["relu3_1", "relu1_2"])
    images = torch.rand(2, 3, 24, 32) * 2 - 1
    deep, shallow = network(images)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((images + 1) / 2 - mean) / std
    with torch.no_grad():
        for i, module in enumerate(theirs):
            x = module(x)
            if i == 3:
                torch.testing.assert_close(shallow, x, rtol=1e-4, atol=1e-5)
                x = x.clone()
    torch.testing.assert_close(deep, x, rtol=1e-4, atol=1e-5)
    assert network.channels == [256, 64]
    assert network.strides == [4, 1]
    assert deep.shape == (2, 256, 6, 8)


def test_it_is_frozen_but_differentiable_in_its_input():
    network = Vgg19Features(["relu1_1", "relu2_1"], random_init=True)
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    sum(feature.sum() for feature in network(image)).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"relu1_1 to relu3_1.*relu4_1"):
        Vgg19Features(["relu4_1"], "vgg_normalised_conv3_1", random_init=True)


@needs_shared
@pytest.mark.real
def test_the_small_real_network_tells_noise_from_blur_from_another_picture(monkeypatch):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))
    network = Vgg19Features(["relu1_1", "relu2_1", "relu3_1"], "vgg_normalised_conv3_1")

    def tensor(picture) -> torch.Tensor:
        return torch.from_numpy(picture[:256, :256].copy()).permute(2, 0, 1)[None] / 127.5 - 1

    portrait, cat = tensor(skimage.data.astronaut()), tensor(skimage.data.cat())
    torch.manual_seed(0)
    noisy = portrait + 0.01 * torch.randn_like(portrait)
    blurred = torchvision.transforms.functional.gaussian_blur(portrait, 9)
    real = network(portrait)
    for feature in real:  # normalised: about the same magnitude in every layer
        assert 0.4 < feature.mean() < 1.6

    def distance(other: torch.Tensor) -> float:
        pairs = zip(network(other), real, strict=True)
        return sum((a - b).abs().mean().item() for a, b in pairs)

    assert 0 < distance(noisy) < distance(blurred) < distance(cat)
    assert distance(portrait) == 0
