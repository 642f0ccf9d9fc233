"""Politeness: when may this cluster fetch its next video from that site, seen from each egress address.

A site that has had enough of us (429, a page that asks for proof of not being a bot) means an address, not a video, so
everything that leaves by one address shares one :class:`Gate` for each site. A gate keeps a gap between starts and is
a circuit breaker: after a block it is shut for a pause that doubles up to an hour, then one fetch may probe; what comes
of the probe opens it or shuts it for longer. After ``max_blocks`` in a row the address is given up.

The state machine knows neither clock nor Ray: every method takes ``now`` in seconds. :class:`LimiterActor` adds the
clock, :class:`ClusterLimiter` is how a download actor reaches the one that the whole cluster shares. It is detached, so
what an address has learned outlives a job, and ends itself when nobody has asked for three hours.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pipelines.metrics import observe_egress
from pipelines.nodes import HEAD

Outcome = Literal["passed", "blocked", "unclear"]
"""What a fetch says about its address: the site answered (even that the video is gone), refused us, or neither."""

NEVER = float("-inf")
NODE_ID_LENGTH = 56
"""Of Ray's name of a node, which stands for an address that nobody has named."""


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How one site is treated. Travels with every question: the actor outlives configurations."""

    gap_seconds: tuple[float, float] = (0.0, 0.0)
    """Least and most time between the starts of two fetches; drawn evenly."""
    first_pause_seconds: float = 60.0
    longest_pause_seconds: float = 3600.0
    max_blocks: int = 7
    """Blocks in a row after which an address is given up."""
    probe_seconds: float = 900.0
    """A probe that has not come back after this long is lost, and another fetch may probe."""

    @property
    def poll_seconds(self) -> float:
        """How often to ask again while a probe is out."""
        return min(5.0, self.first_pause_seconds / 10)

    @property
    def patience_seconds(self) -> float:
        """All pauses together, until an address is given up."""
        return sum(pause_seconds(block, self) for block in range(1, self.max_blocks + 1))


def pause_seconds(blocks: int, manners: Manners) -> float:
    """Length of the pause after the ``blocks``-th block in a row (from 1): doubles up to the longest."""
    doubled = manners.first_pause_seconds * 2.0 ** min(blocks - 1, 60)
    return min(doubled, manners.longest_pause_seconds)


def backoff_seconds(key: str, attempt: int, tries: int, base_seconds: float) -> float:
    """How long to wait before a video is tried again in the same run: doubles, times 0.5 to 1.5.

    Args:
        key: of the video. Every video has its own jitter, and the same one on every machine.
        attempt: run that tries it.
        tries: how often this run has tried it, from 1.
        base_seconds: of the first wait.
    """
    digest = hashlib.sha256(f"backoff {key} {attempt} {tries}".encode()).digest()
    jitter = 0.5 + int.from_bytes(digest[:8], "big") / 2**64
    return base_seconds * 2.0 ** (tries - 1) * jitter


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Answer to "may I fetch?"."""

    wait_seconds: float = 0.0
    """0: fetch now, then report. Otherwise ask again after so long."""
    ticket: int = 0
    """Names the time between two blocks, so that late answers of earlier fetches change nothing."""
    passed: int = 0
    """Fetches that have got through so far, those left out that began before a block and ended after it."""
    hopeless: str = ""
    """Cause of the last block, when every address is given up. Nothing may be fetched."""


@dataclass(frozen=True, kw_only=True)
class Pause:
    """An egress address that must wait, as a person is told."""

    address: str
    site: str
    cause: str
    """Of the last block."""
    blocks: int
    """In a row."""
    seconds: float
    """Left; 0 when a probe is out or may go."""
    under_way: int
    """Fetches of this address that have not come back, a probe among them."""


@dataclass
class Gate:
    """One egress address towards one site."""

    draw: random.Random
    next_start: float = NEVER
    shut_until: float = NEVER
    probe_until: float = NEVER
    asked: float = NEVER
    blocks: int = 0
    """In a row. 0: open."""
    ticket: int = 0
    passed: int = 0
    cause: str = ""
    started: list[float] = field(default_factory=list)
    """When the fetches that have not come back were granted."""

    def under_way(self, now: float, manners: Manners) -> int:
        """Fetches that have not come back. One whose actor died is forgotten when it must have ended."""
        oldest = now - manners.probe_seconds
        self.started = [start for start in self.started if start > oldest]
        return len(self.started)

    def ask(self, now: float, manners: Manners) -> float:
        """Seconds to wait; 0 grants a fetch that begins now."""
        self.asked = now
        if self.blocks:
            if now < self.shut_until:
                return self.shut_until - now
            if now < self.probe_until:
                return min(self.probe_until - now, manners.poll_seconds)
            self.probe_until = now + manners.probe_seconds
        elif now < self.next_start:
            return self.next_start - now
        self.next_start = now + self.draw.uniform(*manners.gap_seconds)
        self.started.append(now)
        return 0.0

    def report(
        self, now: float, ticket: int, outcome: Outcome, cause: str, manners: Manners
    ) -> None:
        """What became of a fetch that was granted under ``ticket``."""
        del self.started[:1]
        if ticket != self.ticket:
            return
        if outcome == "passed":
            self.passed += 1
            self.blocks = 0
        elif outcome == "unclear":
            self.probe_until = NEVER
        else:
            self.ticket += 1
            self.blocks += 1
            self.cause = cause
            self.shut_until = now + pause_seconds(self.blocks, manners)
            self.probe_until = NEVER


@dataclass
class Limiter:
    """All gates, by (egress address, site)."""

    gates: dict[tuple[str, str], Gate] = field(default_factory=dict)

    def ask(self, address: str, site: str, now: float, manners: Manners) -> Turn:
        """May ``address`` fetch a video from ``site`` now? A turn without a wait must be reported."""
        gate = self._gate(address, site)
        wait = gate.ask(now, manners)
        hopeless = gate.cause if wait and self._hopeless(site, now, manners) else ""
        return Turn(wait_seconds=wait, ticket=gate.ticket, passed=gate.passed, hopeless=hopeless)

    def report(
        self,
        address: str,
        site: str,
        now: float,
        turn: Turn,
        outcome: Outcome,
        cause: str,
        manners: Manners,
    ) -> None:
        """What became of a fetch that ``turn`` granted."""
        self._gate(address, site).report(now, turn.ticket, outcome, cause, manners)

    def pauses(self, now: float, manners: Manners) -> list[Pause]:
        """The addresses that must wait, in order of their names."""
        return [
            Pause(
                address=address,
                site=site,
                cause=gate.cause,
                blocks=gate.blocks,
                seconds=max(0.0, gate.shut_until - now),
                under_way=gate.under_way(now, manners),
            )
            for (address, site), gate in sorted(self.gates.items())
            if gate.blocks and self._in_use(gate, now, manners)
        ]

    def state(self, address: str, site: str, now: float, manners: Manners) -> tuple[float, int]:
        """(seconds of its pause that are left, fetches under way) of an address."""
        gate = self._gate(address, site)
        left = max(0.0, gate.shut_until - now) if gate.blocks else 0.0
        return left, gate.under_way(now, manners)

    def _gate(self, address: str, site: str) -> Gate:
        seed = f"gap {address} {site}"
        return self.gates.setdefault((address, site), Gate(draw=random.Random(seed)))

    def _hopeless(self, site: str, now: float, manners: Manners) -> bool:
        """No address that is still in use gets through. One that does should get the videos of the others."""
        return all(
            gate.blocks >= manners.max_blocks
            for (_, named), gate in self.gates.items()
            if named == site and self._in_use(gate, now, manners)
        )

    @staticmethod
    def _in_use(gate: Gate, now: float, manners: Manners) -> bool:
        return gate.asked >= now - manners.longest_pause_seconds - manners.probe_seconds


# ---------------------------------------------------------------------------------------------- Ray


class Limits(Protocol):
    """A limiter as one egress address sees it."""

    def ask(self, site: str, manners: Manners) -> Turn:
        """See :meth:`Limiter.ask`."""
        ...

    def report(self, site: str, turn: Turn, outcome: Outcome, cause: str, manners: Manners) -> None:
        """See :meth:`Limiter.report`."""
        ...


class LimiterActor:
    """Actor, one in the cluster: a :class:`Limiter` with a clock."""

    IDLE_SECONDS = 3 * 3600.0
    """Longer than any client is silent between two questions: the longest pause and a video."""

    def __init__(self) -> None:
        self.limiter = Limiter()
        self.used = time.monotonic()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def ask(self, address: str, site: str, manners: Manners) -> Turn:
        """See :meth:`Limiter.ask`."""
        self.used = time.monotonic()
        turn = self.limiter.ask(address, site, self.used, manners)
        self._observe(address, site, manners)
        return turn

    def report(
        self,
        address: str,
        site: str,
        turn: Turn,
        outcome: Outcome,
        cause: str,
        manners: Manners,
    ) -> None:
        """See :meth:`Limiter.report`."""
        self.used = time.monotonic()
        self.limiter.report(address, site, self.used, turn, outcome, cause, manners)
        self._observe(address, site, manners)

    def pauses(self, manners: Manners) -> list[Pause]:
        """See :meth:`Limiter.pauses`. Whoever looks keeps nothing alive."""
        return self.limiter.pauses(time.monotonic(), manners)

    def _observe(self, address: str, site: str, manners: Manners) -> None:
        observe_egress(address, site, *self.limiter.state(address, site, self.used, manners))

    def _end_when_idle(self) -> None:
        import ray

        while time.monotonic() - self.used < self.IDLE_SECONDS:
            time.sleep(self.IDLE_SECONDS / 100)
        ray.kill(ray.get_runtime_context().current_actor)


class ClusterLimiter:
    """The cluster's :class:`LimiterActor`, made by whoever asks first. Raises if Ray is not connected."""

    NAME, NAMESPACE = "headray-limiter", "headray"

    def __init__(self, address: str) -> None:
        """``address`` names the way out; empty: the node that this process runs on."""
        self.address = address
        self._actor: Any = None

    def ask(self, site: str, manners: Manners) -> Turn:
        """See :meth:`Limiter.ask`."""
        return self._call(lambda actor, address: actor.ask.remote(address, site, manners))

    def report(self, site: str, turn: Turn, outcome: Outcome, cause: str, manners: Manners) -> None:
        """See :meth:`Limiter.report`."""
        self._call(
            lambda actor, address: actor.report.remote(address, site, turn, outcome, cause, manners)
        )

    def _call(self, method: Callable[[Any, str], Any]) -> Any:
        import ray

        address = self.address or ray.get_runtime_context().get_node_id()
        for last in (False, True):
            self._actor = self._actor or self._connect()
            try:
                return ray.get(method(self._actor, address))
            except ray.exceptions.ActorDiedError:  # it was idle for hours and has ended
                self._actor = None
                if last:
                    raise
        raise AssertionError

    def _connect(self) -> Any:
        import ray

        return (
            ray.remote(LimiterActor)
            .options(
                name=self.NAME,
                namespace=self.NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                # On the head, which stays. Elsewhere it would keep a worker from being idle, for hours after the last
                # download, and forget everything when that one is taken away.
                resources={HEAD: 0.001},
                max_restarts=-1,
                max_task_retries=-1,
            )
            .remote()
        )


def find_pauses(manners: Manners, patience_seconds: float = 2.0) -> list[Pause]:
    """The addresses of this cluster that must wait now; none when no limiter answers in time.

    Never makes the limiter, never raises: it is for people who watch.
    """
    import ray

    try:
        actor = ray.get_actor(ClusterLimiter.NAME, namespace=ClusterLimiter.NAMESPACE)
        found: list[Pause] = ray.get(actor.pauses.remote(manners), timeout=patience_seconds)
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    except (ValueError, RuntimeError, ray.exceptions.RayError):  # no actor, not connected, busy
        return []
    return [
        replace(pause, address=f"node {nodes.get(pause.address, pause.address[:8])}")
        if len(pause.address) == NODE_ID_LENGTH
        else pause
        for pause in found
    ]
