"""Peak of the bytes that live tensors occupy, counted at every operation: exact, and the same on every machine.

Resident memory of a process also holds what an allocator keeps; this is what the algorithm needs. What a library allocates
and frees inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """``with PeakBytes() as peak: ...`` then ``peak.peak``: bytes above what was there before the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation; count the storages that it made."""
        for x in tree_iter((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage(), is_new=False)
        result = operation(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage(), is_new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _watch(self, storage: torch.UntypedStorage, *, is_new: bool) -> None:
        number, size = storage._cdata, storage.nbytes() if is_new else 0
        if number in self._known:
            return
        self.live += size

        def gone(_: object) -> None:
            self.live -= size
            self._known.pop(number, None)

        self._known[number] = weakref.ref(storage, gone)
