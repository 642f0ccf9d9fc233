"""How alike pictures look to a network: LPIPS of two pictures, and the features whose distributions FID compares.

LPIPS (Zhang et al. 2018; version 0.1, AlexNet) is torchmetrics', whose wheel carries the linear layers; AlexNet is torchvision's.
FID (Heusel et al. 2017) is torch-fidelity's: TensorFlow's Inception of 2015, its way of resizing, the formula. Left alone, both
libraries fetch their networks themselves; here these are files of ``weights``. Importing them takes seconds, so only who builds
a network does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.frozen.weights import find

WEIGHTS: dict[Literal["lpips", "fid"], tuple[str, ...]] = {
    "lpips": ("alexnet",),
    "fid": ("inception",),
}
"""Entries of ``models.frozen.weights`` that each score loads."""


class Lpips(nn.Module):
    """Distance of two pictures as people see it; frozen."""

    def __init__(self) -> None:
        """Load AlexNet and the linear layers. Raises ``WeightsError``."""
        super().__init__()
        state = torch.load(find("alexnet"), map_location="cpu", weights_only=True)
        # the public class has no way to be given an AlexNet: it always downloads one
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net="alex", pnet_rand=True)
        for part in self.network.net.children():
            for place, layer in part.named_children():  # numbered as in torchvision's "features"
                own = {name: state[f"features.{place}.{name}"] for name in layer.state_dict()}
                layer.load_state_dict(own)
        self.eval().requires_grad_(False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """RGB (b, 3, h, w) in [-1, 1] twice, at least 32 pixels wide and high, to (b,), 0 for equal pictures."""
        distances: Tensor = self.network(made, real)
        return distances.flatten()


class Inception(nn.Module):
    """Features of the last pooling layer, of which FID is made; frozen."""

    def __init__(self) -> None:
        """Load the network. Raises ``WeightsError``."""
        super().__init__()
        # torch-fidelity unpickles whatever is in it: only because all of its hash is known
        path = find("inception")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )

    def forward(self, images: Tensor) -> Tensor:
        """RGB (b, 3, h, w) uint8, resized to 299 x 299 here as TensorFlow did, to (b, 2048)."""
        (features,) = self.network(images)
        found: Tensor = features
        return found


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """FID: squared Fréchet distance of the normal distributions with the means and covariances of two sets of features.

    Estimated from n < some thousands it is far too high, the more so the fewer there are; a few seconds for 2048 features.

    Args:
        made: (n, d), n at least 2.
        real: (m, d), m at least 2.

    Raises:
        ValueError: a set of one picture has no covariance.
    """
    if min(len(made), len(real)) < 2:
        raise ValueError(f"need at least 2 pictures of each kind, got {len(made)} and {len(real)}")
    from torch_fidelity import metric_fid

    one, other = (metric_fid.fid_features_to_statistics(each.double()) for each in (made, real))
    found = metric_fid.fid_statistics_to_metric(one, other, verbose=False)
    # rounding can take the distance of equal sets below 0
    return max(0.0, float(found[metric_fid.KEY_METRIC_FID]))
