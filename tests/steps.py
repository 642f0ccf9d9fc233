"""One optimiser step, against gradients that were computed another way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def assert_stepped(
    after: Mapping[str, nn.Module],
    before: Mapping[str, nn.Module],
    averages: Mapping[str, nn.Module],
) -> None:
    """Every weight went down its gradient, at rate 1, and every average a thousandth of the way.

    Args:
        after: networks after the step, by name.
        before: the same before it, with the gradients of a reference.
        averages: of some of them, at the weights of ``before`` until the step.
    """
    for name, reference in before.items():
        weights = dict(after[name].named_parameters())
        means = dict(averages[name].named_parameters()) if name in averages else {}
        for key, p in reference.named_parameters():
            torch.testing.assert_close(weights[key], p - p.grad, rtol=1e-6, atol=1e-9, msg=key)
            if means:
                mean = p - 0.001 * p.grad
                torch.testing.assert_close(means[key], mean, rtol=1e-6, atol=1e-12, msg=key)
