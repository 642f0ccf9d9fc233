"""Writes motion_losses.json: the losses of 20 steps of the tiny motion learner, stage 2, from a fixed seed.

    python tests/assets/make_motion_losses.py

Replace the file only in a commit that says why the losses changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.models.motion.pairs import doubled, learner, pairs  # noqa: E402

STEPS = 20


def losses() -> list[dict[str, float]]:
    """Of every step, by name.

    In float64: in float32 the roundings of two kernels grow to 0.7 % within 20 steps, since Adam starts by signs.
    """
    trained, rows = learner(), []
    trained.networks.double()
    for index in range(STEPS):
        metrics = trained.train_step(doubled(pairs(4, seed=index)), samples_seen=0)
        rows.append({name: float(v) for name, v in metrics.items() if name.startswith("loss/")})
    return rows


if __name__ == "__main__":
    rows = losses()
    (HERE / "motion_losses.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} steps, last: {rows[-1]}")  # noqa: T201
