"""Writes aligner_losses.json: what 20 steps of the tiny Aligner minimise, in float64.

Run ``python -m tests.assets.make_aligner_losses`` from the repository's root when a change of the numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.aligners import doubled, drawn_batch, in_double, tiny_learner

FILE = Path(__file__).with_name("aligner_losses.json")
STEPS = 20


def losses() -> list[dict[str, float]]:
    """Of each step, by name."""
    learner = in_double(tiny_learner())
    batches = [doubled(drawn_batch(moves=1, seed=seed)) for seed in range(4)]
    steps = [learner.train_step(batches[i % 4], samples_seen=2 * i) for i in range(STEPS)]
    return [
        {name: value.item() for name, value in metrics.items() if name.startswith("loss/")}
        for metrics in steps
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(losses(), indent=1) + "\n")
