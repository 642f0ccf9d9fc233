"""A job's output folder: begun with which configuration, and who is writing there now.

The same command on the same output continues; another configuration, or a second run at the same time, is refused.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from pipelines import storage
from pipelines.schema import one_line

WORK = "work"
"""Folder of what a job needs while it is unfinished."""
CONFIG = "config.json"
"""The resolved configuration and the code's version; written before anything else."""


class ConfigError(ValueError):
    """The arguments contradict themselves, the output, or another run: one line, exit code 2."""


class NothingUsableError(RuntimeError):
    """Nothing can be published: one line that says why, exit code 3."""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def require_same_recipe(output: str, recipe: Mapping[str, Any]) -> None:
    """The output is new and can be written, or was begun with the same recipe.

    Args:
        output: folder or URI.
        recipe: of :func:`flatten`; the part of a configuration that decides what the job makes.

    Raises:
        ConfigError: it holds something else, or was begun with another recipe; or the storage does not let us.
    """
    try:
        _require_same_recipe(output, recipe)
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # every kind of storage has its own kinds; to the user they all say this
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise ConfigError(f"--output {output}: cannot be used: {reason}") from error


def _require_same_recipe(output: str, recipe: Mapping[str, Any]) -> None:
    uri = storage.join(output, CONFIG)
    try:
        before = flatten(json.loads(storage.read_bytes(uri))["config"])
    except FileNotFoundError:
        if [name for name in storage.names_below(output) if not name.startswith(f"{WORK}/")]:
            raise ConfigError(
                f"--output {output}: holds files but no HeadRay config.json; give an empty folder"
            ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{uri}: not a configuration of HeadRay ({error})") from None
    else:
        differs = [
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in recipe.items()
            if before.get(name) != value
        ]
        if differs:
            raise ConfigError(
                f"--output {output}: begun with another configuration ({'; '.join(differs)}); "
                "use those values again or another --output"
            )
    probe = storage.join(output, WORK, "write-test")
    storage.write_atomic(probe, b"ok")
    storage.remove(probe)


@dataclass
class OutputLock:
    """Keeps two runs from writing one output. A run that was killed loses it at once on its own machine."""

    output: str
    stale_seconds: float = 120.0

    def __post_init__(self) -> None:
        self.uri = storage.join(self.output, WORK, "lock.json")
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> OutputLock:
        if not storage.create(self.uri, self._content()):
            owner = self._owner()
            if owner and self._alive(owner):
                raise ConfigError(
                    f"--output {self.output}: another run (host {owner['host']}, process {owner['pid']}) "
                    "is writing there; wait for it or stop it"
                )
            storage.write_atomic(self.uri, self._content())
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._beat.join()
        storage.remove(self.uri)

    def _content(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        return json.dumps(owner).encode()

    def _owner(self) -> dict[str, Any]:
        """Whoever holds the lock; empty when it was killed while it wrote its name."""
        for _ in range(2):
            try:
                owner: dict[str, Any] = json.loads(storage.read_bytes(self.uri))
            except (ValueError, FileNotFoundError):
                time.sleep(0.5)  # it may be writing just now
            else:
                return owner
        return {}

    def _alive(self, owner: Mapping[str, Any]) -> bool:
        if owner["host"] == socket.gethostname():
            try:
                started = psutil.Process(owner["pid"]).create_time()
            except psutil.NoSuchProcess:
                return False
            return owner["pid"] != os.getpid() and started < owner["time"]
        return time.time() - owner["time"] < self.stale_seconds

    def _keep(self) -> None:
        while not self._stop.wait(self.stale_seconds / 6):
            storage.write_atomic(self.uri, self._content())
