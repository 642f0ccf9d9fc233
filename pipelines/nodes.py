"""Which machines a run had, when: an autoscaling cluster starts and ends them, and they are what a run costs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

POOL = "pool"
"""Label of a node (ray_cluster.yaml, infra/kuberay) that says which kind it is."""
GROUP = "ray.io/node-group"
"""Label of a node that Ray's launcher or KubeRay started: the name of its kind."""
HEAD = "node:__internal_head__"
"""Resource by which Ray marks the head."""


def pool_of(node: Mapping[str, Any]) -> str:
    """Kind of a node of ``ray.nodes()``: its label, ``head``, or ``worker``."""
    label = str(node.get("Labels", {}).get(POOL, ""))
    return label or ("head" if HEAD in node["Resources"] else "worker")


def alive() -> list[dict[str, Any]]:
    """The cluster's nodes as ``ray.nodes()`` gives them, those that ended left out. Ray must be connected."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def gpus() -> float:
    """GPUs of the cluster that Ray is connected to."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def may_grow() -> bool:
    """Whether something may start nodes for this cluster. Ray's launcher and KubeRay name the group of each node that they start;
    who starts nodes by hand does not."""
    return any(node["Labels"].get(GROUP) for node in alive())


def become(enough: Callable[[], bool], patience: float) -> bool:
    """Whether the nodes are enough, or become so within ``patience`` seconds: who starts nodes by hand starts one after another."""
    deadline = time.monotonic() + patience
    while not enough():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(2.0, patience))
    return True


def rooms() -> list[float]:
    """Logical CPUs of each node that has some and is no GPU node."""
    cpus = [node["Resources"].get("CPU", 0.0) for node in alive() if pool_of(node) != "gpu"]
    return [each for each in cpus if each]


class Timeline:
    """Says when nodes come and go, and at the end how long there were how many. Silent on one machine."""

    def __init__(
        self,
        say: Callable[[str], None],
        nodes: Callable[[], Sequence[Mapping[str, Any]]] = alive,
        poll_seconds: float = 2.0,
    ) -> None:
        """Args:
        say: prints a line.
        nodes: that are there now; of Ray.
        poll_seconds: between two looks.
        """
        self.say = say
        self.nodes = nodes
        self.poll_seconds = poll_seconds
        self.seconds: dict[str, float] = {}
        """That nodes of each kind were there, summed over them."""
        self._now: Counter[str] = Counter()
        self._most = 0
        self._started = self._last = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Timeline:
        self._started = self._last = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10 * self.poll_seconds)
        if self._most > 1:
            hours = ", ".join(
                f"{kind} {seconds / 3600:.2f}" for kind, seconds in sorted(self.seconds.items())
            )
            self.say(f"node-hours {hours} (at most {self._most} nodes at a time)")

    def look(self) -> None:
        """Compare what is there with what was there before."""
        moment = time.perf_counter()
        found = Counter(pool_of(node) for node in self.nodes())
        for kind, count in self._now.items():
            passed = count * (moment - self._last)
            self.seconds[kind] = self.seconds.get(kind, 0.0) + passed
        self._last = moment
        if found != self._now and max(found.total(), self._now.total()) > 1:
            told = ", ".join(f"{kind} {found[kind]}" for kind in sorted(found))
            changes = {kind: found[kind] - self._now[kind] for kind in sorted({*found, *self._now})}
            changed = ", ".join(f"{kind} {by:+d}" for kind, by in changes.items() if by)
            self.say(f"[{moment - self._started:6.0f} s] nodes: {told} ({changed})")
        self._now = found
        self._most = max(self._most, found.total())

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(self.poll_seconds)
            self.look()
