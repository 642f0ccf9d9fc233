"""Is a training going well? Pure functions of the metrics logged so far; each finding names the cure.

Thresholds are ours and meant to be quiet: a warning that comes every run is read in none. Identity leakage follows
GHOST's finding on HeSer (spec: separate encoders carry the target's identity; self-reenactment metrics reward it).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

History = Sequence[Mapping[str, float]]
"""Logged values, oldest first; every record has ``samples``."""

REMEMBERED = 400
"""Records that a run keeps of its history."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a run warns."""

    progress: str = ""
    """Loss that must keep falling; empty: not watched."""
    discriminator: str = "loss/discriminator"
    """Hinge loss of the discriminator: 0 when it sees through everything, 2 when it knows nothing."""
    leakage: str = "eval/leakage"
    """Similarity of what is generated to the driving person minus that to the source person, cross pairs."""
    leakage_limit: float = 0.02
    """Leakage above which three evaluations in a row are a warning."""
    plateau_records: int = 100
    """Logged records that are compared with as many before them; 0: no warning."""
    plateau_gain: float = 0.005
    """Relative fall of the loss between the two below which it has stalled."""
    collapse_records: int = 20
    """Logged records over which the discriminator must have been stuck."""
    explosion: float = 10.0
    """Gradient norm over its median so far that is too much."""
    data_wait: float = 0.3
    """Share of the time spent waiting for samples that is too much."""


@dataclass(frozen=True)
class Finding:
    """Something a person should look at."""

    kind: str
    """Also the name of its metric, ``health/KIND``."""
    message: str
    """What was seen and what to do, one line."""


def examine(history: History, config: HealthConfig) -> list[Finding]:
    """Everything that is wrong by the newest record."""
    found = (check(history, config) for check in CHECKS.values())
    return [finding for finding in found if finding]


def gauges(findings: Sequence[Finding]) -> dict[str, float]:
    """``health/KIND`` → 1 where something was found, else 0, for the charts."""
    kinds = {finding.kind for finding in findings}
    return {f"health/{kind}": float(kind in kinds) for kind in CHECKS}


def plateau(history: History, config: HealthConfig) -> Finding | None:
    """The loss has stopped falling: what its mean fell by, against as many records before, is little or within the noise."""
    count = config.plateau_records
    losses = _series(history, config.progress)
    if not count or len(losses) < 2 * count:
        return None
    halves = losses[-2 * count : -count], losses[-count:]
    before, now = map(statistics.fmean, halves)
    noise = 2 * math.sqrt(sum(map(statistics.pvariance, halves)) / count)  # two standard errors
    if before - now >= max(config.plateau_gain * abs(before), noise):
        return None
    return Finding(
        "plateau",
        f"{config.progress} has stalled: {before:.4g} → {now:.4g} over the last {count} records; evaluate and stop here, or "
        "go on with a lower --learner.lr from the bundle",
    )


def collapse(history: History, config: HealthConfig) -> Finding | None:
    """The discriminator is perfect, or blind: either way the generator learns nothing from it."""
    losses = _series(history, config.discriminator)[-config.collapse_records :]
    if len(losses) < config.collapse_records:
        return None
    if max(losses) < 0.02:
        return Finding(
            "collapse",
            f"{config.discriminator} is {losses[-1]:.3f}: the discriminator sees through everything and the generator gets no "
            "signal; lower its learning rate, or check that generated and real pictures have the same range",
        )
    if min(losses) > 1.9 and max(losses) < 2.1:
        return Finding(
            "collapse",
            f"{config.discriminator} stays at {losses[-1]:.3f}: the discriminator tells nothing apart; raise its learning rate, "
            "or lower the weight of the other losses",
        )
    return None


def explosion(history: History, config: HealthConfig) -> Finding | None:
    """A gradient norm has left its usual range."""
    for name in sorted(
        name for name in (history[-1] if history else {}) if name.startswith("norm/")
    ):
        norms = _series(history, name)
        if len(norms) < 20:
            continue
        usual = statistics.median(norms[:-1])
        if usual > 0 and norms[-1] > config.explosion * usual:
            return Finding(
                "explosion",
                f"{name} is {norms[-1]:.3g}, usually {usual:.3g}; if it stays there, go back to the checkpoint before and lower "
                "--learner.lr or --learner.clip",
            )
    return None


def leakage(history: History, config: HealthConfig) -> Finding | None:
    """Heads come out with the driving person's identity: in the last three evaluations they looked more like it."""
    values = _series(history, config.leakage)[-3:]
    if len(values) < 3 or min(values) <= config.leakage_limit:
        return None
    return Finding(
        "leakage",
        f"{config.leakage} is {values[-1]:+.3f}: heads look more like the driving person than like the source; strengthen the "
        "augmentation of the driving picture or use the single motion encoder",
    )


def starvation(history: History, config: HealthConfig) -> Finding | None:
    """The workers wait for samples: the median of the last three shares is too high."""
    shares = _series(history, "speed/data_wait")[-3:]
    if len(shares) < 3 or statistics.median(shares) <= config.data_wait:
        return None
    return Finding(
        "starvation",
        f"{statistics.median(shares):.0%} of the time goes into waiting for samples; give each worker more CPUs "
        "(--cluster.cpus-per-worker) and loaders, or put the dataset on a nearer disk",
    )


def eta_seconds(samples_left: float, samples_per_second: float) -> float:
    """Seconds to the end at this speed; infinite when nothing moves."""
    return samples_left / samples_per_second if samples_per_second > 0 else float("inf")


def cost(seconds: float, num_workers: int, price_per_worker_hour: float) -> float:
    """What so much time costs, in the currency of the price."""
    return seconds / 3600 * max(num_workers, 1) * price_per_worker_hour


def _series(history: History, name: str) -> list[float]:
    return [record[name] for record in history if name in record]


CHECKS: dict[str, Callable[[History, HealthConfig], Finding | None]] = {
    "plateau": plateau,
    "collapse": collapse,
    "explosion": explosion,
    "leakage": leakage,
    "starvation": starvation,
}
