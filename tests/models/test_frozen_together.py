"""Networks shared by threads: every answer goes to who asked, trouble to who made it, and the pictures of all fill the batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from models.frozen.parsing import classify
from models.frozen.together import Together

THREADS = 5
WAIT = 60.0
"""Seconds after which a test that waits for its own threads gives up."""


class Doubler:
    """Doubles numbers; zero is trouble. Its first call waits until it is let go."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.is_busy = threading.Event()
        self.may_go = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.calls.append(list(numbers))
        if len(self.calls) == 1:
            self.is_busy.set()
            assert self.may_go.wait(WAIT)
        return [2 * 60 // (60 // number) for number in numbers]


def ask_while_busy(requests: list[list[int]]) -> tuple[list[list[int] | Exception], Doubler]:
    """Ask from a thread each while a first request is being answered; then let go."""
    doubler = Doubler()
    shared = Together(doubler)

    def ask(numbers: list[int]) -> list[int] | Exception:
        try:
            return shared(numbers)
        except ZeroDivisionError as error:
            return error

    with ThreadPoolExecutor(len(requests) + 1) as pool:
        first = pool.submit(ask, [1])
        assert doubler.is_busy.wait(WAIT)
        others = [pool.submit(ask, numbers) for numbers in requests]
        while len(shared._waiting) < len(requests):
            assert not any(one.done() for one in others)
        doubler.may_go.set()
        assert first.result(WAIT) == [2]
        return [one.result(WAIT) for one in others], doubler


def test_all_who_wait_are_answered_in_one_call_and_each_gets_its_own() -> None:
    answers, doubler = ask_while_busy([[2], [3, 4], [], [5, 6, 10]])
    assert answers == [[4], [6, 8], [], [10, 12, 20]]
    assert len(doubler.calls) == 2
    assert sorted(doubler.calls[1]) == [2, 3, 4, 5, 6, 10]


def test_trouble_is_raised_where_it_was_made_and_nowhere_else() -> None:
    answers, _ = ask_while_busy([[2], [3, 0], [4]])
    assert answers[0] == [4]
    assert isinstance(answers[1], ZeroDivisionError)
    assert answers[2] == [8]


def test_alone_nobody_is_waited_for() -> None:
    doubler = Doubler()
    doubler.may_go.set()
    shared = Together(doubler)
    assert [shared([number]) for number in (1, 2, 3)] == [[2], [4], [6]]
    with pytest.raises(ZeroDivisionError):
        shared([0])
    assert shared([4]) == [8]


def test_a_networks_answer_is_the_same_bit_for_bit_whoever_shares_its_batch() -> None:
    """Convolutions with a norm, at the fixed batch of the parsers, from many threads."""
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 19, 1)
    ).eval()  # fmt: skip

    def alone(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        return classify(lambda x: network(x / 255), pictures, "cpu")

    draw = np.random.default_rng(0)
    asked = [
        [draw.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(draw.integers(1, 7))]
        for _ in range(30)
    ]
    expected = [alone(pictures) for pictures in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(Together(alone), asked))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
