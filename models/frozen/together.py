"""Several threads that use one network fill its batches together.

Each thread works on a video of its own and asks for a few pictures at a time; alone, a track of forty frames leaves the second batch of
32 three quarters empty. Whoever finds the network idle answers all who wait by then, so nobody waits for a batch to fill. The networks
here run in batches of one fixed size whose rows do not depend on each other: with whom a picture was shown changes no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Request(Generic[Item, Answer]):
    items: Sequence[Item]
    answers: list[Answer] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class Together(Generic[Item, Answer]):
    """A function from items to as many answers that many threads may call; it runs in one of them at a time."""

    def __init__(self, function: Callable[[Sequence[Item]], Sequence[Answer]]) -> None:
        """Args:
        function: answers each item for itself, however many there are.
        """
        self._function = function
        self._turn = threading.Lock()
        self._queueing = threading.Lock()
        self._waiting: list[_Request[Item, Answer]] = []

    def __call__(self, items: Sequence[Item]) -> list[Answer]:
        """Answers in the order of the items. What the function raises for these items, alone, is raised here and nowhere else."""
        request = _Request[Item, Answer](items)
        with self._queueing:
            self._waiting.append(request)
        with self._turn:
            if not request.is_done:
                with self._queueing:
                    requests, self._waiting = self._waiting, []
                self._answer(requests)
        if request.error:
            raise request.error
        return request.answers

    def _answer(self, requests: list[_Request[Item, Answer]]) -> None:
        try:
            answers = self._function([item for request in requests for item in request.items])
        except Exception as error:
            if len(requests) > 1:  # whose fault it is shows when each is asked alone
                for request in requests:
                    self._answer([request])
                return
            requests[0].error = error
        else:
            start = 0
            for request in requests:
                request.answers = list(answers[start : start + len(request.items)])
                start += len(request.items)
        for request in requests:
            request.is_done = True
