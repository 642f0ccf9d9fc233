"""Warnings of a training: each comes when it should, says what to do, and stays away otherwise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from pipelines import health
from pipelines.health import HealthConfig

CONFIG = HealthConfig(progress="loss/l1")


def history(**series: Callable[[int], float]) -> list[dict[str, float]]:
    """300 records; ``loss__l1`` is the metric ``loss/l1``."""
    return [
        {"samples": 100.0 * i, **{name.replace("__", "/"): f(i) for name, f in series.items()}}
        for i in range(300)
    ]


def kinds(records: list[dict[str, float]], config: HealthConfig = CONFIG) -> set[str]:
    return {finding.kind for finding in health.examine(records, config)}


def noise(i: int) -> float:
    return random.Random(i).uniform(0.9, 1.1)


def healthy() -> dict[str, Callable[[int], float]]:
    return {
        "loss__l1": lambda i: 2 * math.exp(-i / 300) * noise(i),
        "loss__discriminator": lambda i: 1.2 * noise(i),
        "norm__generator": lambda i: 3.0 * noise(i),
        "eval__leakage": lambda i: -0.2 * noise(i),
        "speed__data_wait": lambda i: 0.02 * noise(i),
        "speed__samples_per_second": lambda i: 40.0 * noise(i),
    }


def test_a_healthy_run_is_left_alone_at_every_moment() -> None:
    records = history(**healthy())
    assert all(kinds(records[:n]) == set() for n in range(0, 301, 7))


@pytest.mark.parametrize(
    ("kind", "name", "series", "cure"),
    [
        ("plateau", "loss__l1", lambda i: 0.5 * noise(i), "lower --learner.lr"),
        ("collapse", "loss__discriminator", lambda _: 0.004, "lower its learning rate"),
        ("collapse", "loss__discriminator", lambda i: 2.0 + 0.01 * noise(i), "raise its learning"),
        ("explosion", "norm__generator", lambda i: 90.0 if i == 299 else 3.0, "lower --learner.lr"),
        ("leakage", "eval__leakage", lambda _: 0.05, "augmentation"),
        ("starvation", "speed__data_wait", lambda _: 0.6, "--cluster.cpus-per-worker"),
    ],
)
def test_each_illness_is_seen_alone_and_has_a_cure(
    kind: str, name: str, series: Callable[[int], float], cure: str
) -> None:
    findings = health.examine(history(**{**healthy(), name: series}), CONFIG)
    assert [finding.kind for finding in findings] == [kind]
    assert cure in findings[0].message
    assert name.replace("__", "/") in findings[0].message or kind == "starvation"


def test_slow_progress_is_no_plateau() -> None:
    """10 % from one hundred records to the next under 10 % noise; 0.1 % is one, 1 % without noise is none."""
    assert kinds(history(loss__l1=lambda i: math.exp(-i / 1_000) * noise(i))) == set()
    assert kinds(history(loss__l1=lambda i: math.exp(-i / 100_000) * noise(i))) == {"plateau"}
    assert kinds(history(loss__l1=lambda i: math.exp(-i / 10_000))) == set()


def test_one_bad_record_is_no_collapse_and_no_starvation() -> None:
    series = healthy()
    series["loss__discriminator"] = lambda i: 0.001 if i > 295 else 1.2
    series["speed__data_wait"] = lambda i: 0.9 if i == 299 else 0.01
    assert kinds(history(**series)) == set()


def test_gauges_are_there_when_all_is_well_too() -> None:
    records = history(**healthy())
    values = health.gauges(health.examine(records, CONFIG))
    assert values == dict.fromkeys((f"health/{kind}" for kind in health.CHECKS), 0.0)
    sick = health.gauges([health.Finding("plateau", "")])
    assert sick["health/plateau"] == 1.0
    assert sum(sick.values()) == 1.0


def test_time_and_cost() -> None:
    assert health.eta_seconds(720.0, 2.0) == 360.0
    assert health.eta_seconds(720.0, 0.0) == math.inf
    assert health.cost(1800.0, 6, 2.5) == 7.5
    assert health.cost(3600.0, 0, 2.5) == 2.5  # in the job's own process
    assert health.cost(3600.0, 6, 0.0) == 0.0
