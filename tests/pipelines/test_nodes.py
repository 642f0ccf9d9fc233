"""What a run says of the machines that came and went."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipelines import nodes
from pipelines.nodes import GROUP, HEAD, Timeline, pool_of


def node(**labels: str) -> dict[str, Any]:
    """As ``ray.nodes()`` has it."""
    return {"Resources": {"CPU": 1.0}, "Labels": labels}


HEAD_NODE = {"Resources": {HEAD: 1.0}, "Labels": {}}


def test_kinds_of_nodes() -> None:
    assert pool_of(HEAD_NODE) == "head"
    assert pool_of(node()) == "worker"
    assert pool_of(node(pool="gpu")) == "gpu"


def test_a_cluster_whose_nodes_have_groups_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray's launcher starts has them (tests/test_autoscaling.py), what people start has not (tests/test_many_nodes.py)."""
    here = [HEAD_NODE, node(pool="cpu"), node(pool="gpu"), node()]
    monkeypatch.setattr(nodes, "alive", lambda: here)
    assert not nodes.may_grow()
    assert nodes.rooms() == [1, 1]
    here.append({"Resources": {}, "Labels": {GROUP: "cpu"}})
    assert nodes.may_grow()
    assert nodes.rooms() == [1, 1]


def test_every_change_is_told_and_the_hours_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    here = [HEAD_NODE]
    said: list[str] = []
    told = Timeline(said.append, lambda: here, poll_seconds=3600)
    for moment, found in (
        (0, [HEAD_NODE]),
        (60, [HEAD_NODE, node(pool="cpu"), node(pool="cpu")]),
        (120, [HEAD_NODE, node(pool="cpu"), node(pool="cpu")]),
        (180, [HEAD_NODE, node(pool="cpu"), node(pool="gpu")]),
        (240, [HEAD_NODE]),
    ):
        clock[0], here[:] = float(moment), found
        told.look()
    assert said == [
        "[    60 s] nodes: cpu 2, head 1 (cpu +2)",
        "[   180 s] nodes: cpu 1, gpu 1, head 1 (cpu -1, gpu +1)",
        "[   240 s] nodes: head 1 (cpu -1, gpu -1)",
    ]
    assert told.seconds == {"head": 240, "cpu": 2 * 120 + 60, "gpu": 60}
    with told:
        pass
    assert said[-1] == "node-hours cpu 0.08, gpu 0.02, head 0.07 (at most 3 nodes at a time)"


def test_one_machine_is_not_worth_a_line() -> None:
    said: list[str] = []
    with Timeline(said.append, lambda: [HEAD_NODE], poll_seconds=0.01):
        time.sleep(0.05)
    assert said == []
