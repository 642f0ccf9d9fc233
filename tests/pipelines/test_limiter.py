"""The limiter without a clock: pace, pauses and probes by table and by property; then the actor itself."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.limiter import (
    ClusterLimiter,
    Gate,
    Limiter,
    LimiterActor,
    Manners,
    Outcome,
    Turn,
    backoff_seconds,
    pause_seconds,
)

PACED = Manners(gap_seconds=(10.0, 20.0), probe_seconds=100.0)
FAST = Manners(probe_seconds=100.0)


def gate() -> Gate:
    return Gate(draw=random.Random(1))


# ---------------------------------------------------------------------------------------------- by table


def test_pauses_double_up_to_an_hour() -> None:
    pauses = [pause_seconds(block, Manners()) for block in range(1, 10)]
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert Manners().patience_seconds == sum(pauses[:7])
    assert pause_seconds(10_000, Manners()) == 3600


def test_one_block_after_another() -> None:
    """Time, question or report, answer: the whole life of a gate."""
    one = gate()
    assert one.ask(0, FAST) == 0
    assert one.ask(0, FAST) == 0, "no gap is wanted"
    one.report(5, 0, "blocked", "429", FAST)
    assert one.ask(6, FAST) == 59
    one.report(7, 0, "blocked", "429", FAST)
    assert one.ask(7, FAST) == 58, "it began before the block: nothing new"
    one.report(8, 0, "passed", "", FAST)
    assert one.ask(8, FAST) == 57, "neither is that it got through"
    assert one.ask(65, FAST) == 0, "a probe"
    assert one.ask(65, FAST) == FAST.poll_seconds, "only one"
    one.report(70, 1, "blocked", "429", FAST)
    assert one.ask(70, FAST) == 120
    assert one.ask(190, FAST) == 0
    assert one.ask(288, FAST) == 2, "the probe is nearly lost"
    assert one.ask(290, FAST) == 0, "it is lost, here is another"
    one.report(291, 2, "unclear", "network", FAST)
    assert one.ask(291, FAST) == 0, "it said nothing, so another goes at once"
    assert one.ask(291, FAST) == FAST.poll_seconds, "but no more than one"
    one.report(292, 2, "passed", "", FAST)
    assert [one.ask(292, FAST) for _ in range(3)] == [0, 0, 0]
    one.report(293, 2, "blocked", "429", FAST)
    assert one.ask(293, FAST) == 60, "as short as the first"


def test_pauses_tell_who_waits_how_long_and_what_is_under_way() -> None:
    limiter = Limiter()
    turns = [limiter.ask("a", "site", now, FAST) for now in (0, 1, 2)]
    limiter.ask("b", "site", 2, FAST)
    assert limiter.pauses(2, FAST) == []
    assert limiter.state("a", "site", 2, FAST) == (0, 3)
    limiter.report("a", "site", 3, turns[0], "blocked", "download: bot check", FAST)
    (pause,) = limiter.pauses(10, FAST)
    assert (pause.address, pause.site, pause.cause) == ("a", "site", "download: bot check")
    assert (pause.seconds, pause.blocks, pause.under_way) == (53, 1, 2)
    assert limiter.state("a", "site", 10, FAST) == (53, 2)
    limiter.report("a", "site", 11, turns[1], "passed", "", FAST)
    probe = limiter.ask("a", "site", 63, FAST)
    (pause,) = limiter.pauses(64, FAST)
    assert (pause.seconds, pause.under_way) == (0, 2), "the probe, and one that has not come back"
    (pause,) = limiter.pauses(110, FAST)
    assert pause.under_way == 1, "whose actor died: it must have ended by now"
    limiter.report("a", "site", 111, probe, "passed", "", FAST)
    assert limiter.pauses(112, FAST) == []


def test_a_probe_begins_a_gap_like_any_fetch() -> None:
    one = gate()
    one.ask(0, PACED)
    one.report(1, 0, "blocked", "429", PACED)
    assert one.ask(61, PACED) == 0
    one.report(62, 1, "passed", "", PACED)
    assert 9 <= one.ask(62, PACED) <= 19


def test_pauses_come_in_the_order_of_names() -> None:
    limiter = Limiter()
    for address in ("c", "a", "b"):
        turn = limiter.ask(address, "site", 0, FAST)
        limiter.report(address, "site", 1, turn, "blocked", "429", FAST)
    assert [pause.address for pause in limiter.pauses(2, FAST)] == ["a", "b", "c"]


def test_gaps_are_spread_evenly_between_least_and_most() -> None:
    one, now, gaps = gate(), 0.0, []
    for _ in range(300):
        assert one.ask(now, PACED) == 0
        gaps.append(one.ask(now, PACED))
        now += gaps[-1]
        one.report(now, 0, "passed", "", PACED)
    assert 10 <= min(gaps) < 11
    assert 19 < max(gaps) <= 20
    assert 14 < sum(gaps) / 300 < 16


def test_given_up_only_when_nobody_gets_through() -> None:
    manners = replace(FAST, max_blocks=2)
    limiter = Limiter()

    def block(address: str, now: float) -> None:
        turn = limiter.ask(address, "site", now, manners)
        assert (turn.wait_seconds, turn.hopeless) == (0, "")
        limiter.report(address, "site", now, turn, "blocked", "download: bot check", manners)

    for address in ("a", "b"):
        block(address, 0)
    block("a", 60)
    assert limiter.ask("a", "site", 61, manners).hopeless == "", "b may still get through"
    assert limiter.ask("a", "site", 61, manners).wait_seconds == 119
    assert limiter.ask("a", "other site", 61, manners) == Turn()
    block("b", 100)
    assert limiter.ask("a", "site", 101, manners).hopeless == "download: bot check"
    assert limiter.ask("b", "site", 101, manners).hopeless == "download: bot check"
    turn = limiter.ask("a", "site", 180, manners)
    assert turn == Turn(ticket=2), "a later run may probe again"
    limiter.report("a", "site", 181, turn, "passed", "", manners)
    assert limiter.ask("a", "site", 182, manners).wait_seconds == 0
    assert limiter.ask("b", "site", 182, manners).hopeless == ""


def test_an_address_that_left_the_cluster_keeps_no_hope_alive() -> None:
    manners = replace(FAST, max_blocks=1)
    limiter = Limiter()
    limiter.ask("gone", "site", 0, manners)
    for now, hopeless in ((10, ""), (10_000, "429")):
        turn = limiter.ask("here", "site", now, manners)
        limiter.report("here", "site", now, turn, "blocked", "429", manners)
        assert limiter.ask("here", "site", now + 1, manners).hopeless == hopeless


# ---------------------------------------------------------------------------------------------- by property


class Crowd:
    """Clients of one gate that do as they are told, on a clock of their own, and a site that may refuse them."""

    def __init__(self, clients: int, manners: Manners, storm: tuple[float, float], seed: int):
        self.manners = manners
        self.storm = storm
        self.draw = random.Random(seed)
        self.gate = gate()
        self.due = [(self.draw.random(), client) for client in range(clients)]
        self.starts: list[float] = []
        self.shut: list[tuple[float, float]] = []
        self.ends: Counter[Outcome] = Counter()
        self.flying: list[tuple[float, int, int]] = []

    def run(self, fetches: int) -> None:
        """Until so many fetches got through."""
        for _ in range(200_000):
            if self.ends["passed"] >= fetches:
                return
            self._step()
        raise AssertionError("it never got through")

    def _step(self) -> None:
        asks, ends = min(self.due, default=(1e99, 0)), min(self.flying, default=(1e99, 0, 0))
        if ends[0] <= asks[0]:
            now, client, ticket = ends
            self.flying.remove(ends)
            outcome: Outcome = "blocked" if self.storm[0] <= now < self.storm[1] else "passed"
            before = self.gate.ticket
            self.gate.report(now, ticket, outcome, "429", self.manners)
            if self.gate.ticket > before:
                self.shut.append((now, self.gate.shut_until))
            self.ends[outcome] += 1
            self.due.append((now, client))
            return
        now, client = asks
        self.due.remove(asks)
        ticket = self.gate.ticket
        wait = self.gate.ask(now, self.manners)
        if wait:
            self.due.append((now + wait, client))
        else:
            self.starts.append(now)
            self.flying.append((now + self.draw.uniform(0.5, 30), client, ticket))


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 12),
    seed=st.integers(0, 99),
    begin=st.floats(0, 300),
    length=st.floats(0, 8000),
    gap=st.sampled_from([(0.0, 0.0), (3.0, 3.0), (10.0, 20.0)]),
)
def test_any_crowd_keeps_the_pace_waits_out_any_storm_and_goes_on(
    clients: int, seed: int, begin: float, length: float, gap: tuple[float, float]
) -> None:
    manners = Manners(gap_seconds=gap, probe_seconds=100)
    crowd = Crowd(clients, manners, (begin, begin + length), seed)
    crowd.run(fetches=150)
    for one, other in itertools.pairwise(crowd.starts):
        assert other - one >= gap[0] - 1e-6
    for begun, until in crowd.shut:
        assert not any(begun < start < until - 1e-6 for start in crowd.starts), "nobody in a pause"
    for (_, until), (begun, _) in itertools.pairwise(crowd.shut):
        between = [start for start in crowd.starts if until - 1e-6 <= start <= begun]
        if begun < begin + length and until > begin + 30:
            assert len(between) == 1, "one probe between two pauses of a storm"
    assert crowd.ends["blocked"] <= clients + 2 + len(crowd.shut)


@settings(deadline=None)
@given(key=st.text("abc-_", max_size=9), attempt=st.integers(1, 9), tries=st.integers(1, 9))
def test_backoff_doubles_within_its_jitter_and_is_the_same_everywhere(
    key: str, attempt: int, tries: int
) -> None:
    waits = backoff_seconds(key, attempt, tries, 2.0)
    assert 0.5 <= waits / (2.0 * 2 ** (tries - 1)) < 1.5
    assert waits == backoff_seconds(key, attempt, tries, 2.0)
    assert waits != backoff_seconds(key, attempt + 1, tries, 2.0)


def test_backoff_spreads_videos() -> None:
    waits = [backoff_seconds(f"id-{i}", 1, 1, 1.0) for i in range(400)]
    assert 0.97 < sum(waits) / 400 < 1.03
    assert min(waits) < 0.52
    assert max(waits) > 1.48


# ---------------------------------------------------------------------------------------------- the actor


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_processes_of_a_cluster_share_one_limiter_and_nodes_do_not_share_an_address(
    cluster: Any,
) -> None:
    ray = cluster
    manners = Manners(first_pause_seconds=100)

    @ray.remote(num_cpus=0)
    def meet_a_block(address: str) -> str:
        limits = ClusterLimiter(address)
        turn = limits.ask("site", manners)
        limits.report("site", turn, "blocked", "429", manners)
        return str(ray.get_runtime_context().get_worker_id())

    worker = ray.get(meet_a_block.remote(""))
    assert worker != ray.get_runtime_context().get_worker_id()
    node = ray.get_runtime_context().get_node_id()
    for address, waits in (("", True), (node, True), ("proxy", False)):
        assert bool(ClusterLimiter(address).ask("site", manners).wait_seconds) == waits

    limits = ClusterLimiter("")
    assert limits.ask("site", manners).wait_seconds > 90
    ray.kill(ray.get_actor(ClusterLimiter.NAME, namespace=ClusterLimiter.NAMESPACE))
    for _ in range(600):  # the kill may arrive after the next question
        if limits.ask("site", manners).wait_seconds == 0:
            return
        time.sleep(0.2)
    pytest.fail("no new limiter, which knows nothing, took over")


@pytest.mark.slow
def test_an_actor_that_nobody_asks_ends_itself(cluster: Any) -> None:
    class Hasty(LimiterActor):
        IDLE_SECONDS = 6.0

    actor = cluster.remote(Hasty).options(max_restarts=-1, num_cpus=0).remote()
    assert cluster.get(actor.ask.remote("a", "site", Manners())) == Turn()
    time.sleep(1)  # far from 6: the machine may be busy
    assert cluster.get(actor.ask.remote("a", "site", Manners())) == Turn()
    time.sleep(10)
    with pytest.raises(cluster.exceptions.ActorDiedError):
        cluster.get(actor.ask.remote("a", "site", Manners()), timeout=120)
