"""A job's output folder: begun with which configuration, and who is writing there now.

The same command on the same output continues; another configuration, or a second run at the same time, is refused.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from pipelines import storage
from pipelines.schema import one_line

WORK = "work"
"""Folder of what a job needs while it is unfinished."""
CONFIG = "config.json"
"""The resolved configuration and the code's version; written before anything else."""
SHOWN_DIFFERENCES = 6
"""Of two configurations, in the line that refuses the second."""


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


def require_same_recipe(
    output: str,
    recipe: Mapping[str, Any],
    *,
    job: str = "",
    known: Collection[str] = (),
    neutral: Mapping[str, Any] | None = None,
) -> None:
    """The output is new and can be written, or was begun with the same recipe.

    Args:
        output: folder or URI.
        recipe: of :func:`flatten`; the part of a configuration that decides what the job makes.
        job: its name; an output that another job began is refused by that, not field by field. Empty: not compared.
        known: every field of the job's configuration; what is stored there beside these is refused by name. Empty: not
            compared.
        neutral: fields that are younger than outputs which are still about, and the value that means "as before": an older
            ``config.json``, which lacks the field, counts as one that has it.

    Raises:
        ConfigError: it holds something else, or was begun with another recipe; or the storage does not let us.
    """
    try:
        stored = _read_config(output)
        if stored:
            _compare(output, stored, recipe, job, known, neutral or {})
        probe = storage.join(output, WORK, "write-test")
        storage.write_atomic(probe, b"ok")
        storage.remove(probe)
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # every kind of storage has its own kinds; to the user they all say this
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise ConfigError(f"--output {output}: cannot be used: {reason}") from error


def _read_config(output: str) -> dict[str, Any]:
    """What OUTPUT/config.json says: ``config`` flat, and ``job``; empty for an output that is new."""
    uri = storage.join(output, CONFIG)
    try:
        told = json.loads(storage.read_bytes(uri))
        return {"config": flatten(told["config"]), "job": told.get("job", "")}
    except FileNotFoundError:
        if [name for name in storage.names_below(output) if not name.startswith(f"{WORK}/")]:
            raise ConfigError(
                f"--output {output}: holds files but no HeadRay config.json; give an empty folder"
            ) from None
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{uri}: not a configuration of HeadRay ({error})") from None


def _compare(
    output: str,
    stored: Mapping[str, Any],
    recipe: Mapping[str, Any],
    job: str,
    known: Collection[str],
    neutral: Mapping[str, Any],
) -> None:
    """Raises :class:`ConfigError`, naming what differs; arguments as of :func:`require_same_recipe`."""
    if job and stored["job"] and stored["job"] != job:
        raise ConfigError(
            f"--output {output}: holds what jobs/{stored['job']}.py made, this is jobs/{job}.py; give another --output"
        )
    before = {**neutral, **stored["config"]}
    differs = [
        f"{name} was {before[name]!r}, now {value!r}"
        if name in before
        else f"{name} is younger than that and is {value!r} now"
        for name, value in recipe.items()
        if name not in before or before[name] != value
    ]
    gone = sorted(set(stored["config"]) - set(known)) if known else []
    differs += [f"{name} was {before[name]!r}, now there is no such field" for name in gone]
    if differs:
        more = len(differs) - SHOWN_DIFFERENCES
        told = differs[:SHOWN_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise ConfigError(
            f"--output {output}: begun with another configuration ({'; '.join(told)}); "
            "use those values again or another --output"
        )


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
