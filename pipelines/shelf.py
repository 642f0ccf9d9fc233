"""Rows that wait on disk: what the driver must know of every video of a list costs it a few MiB, however long the list is.

A shelf is a private SQLite database in the temporary folder. SQLite keeps some pages of it in memory, sorts through files, and all
files are gone when it is closed or its process ends. Who uses one says in SQL what stands in it; nothing outlives a run.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines import storage

FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
Row = tuple[Any, ...]


class Shelf:
    """Tables on disk. Text sorts by its bytes, as Python and Arrow sort it."""

    def __init__(self, *statements: str) -> None:
        """Args:
        statements: that make its tables.
        """
        os.environ.setdefault("SQLITE_TMPDIR", tempfile.gettempdir())
        # A database without a name: a file of its own that SQLite removes. Nobody reads what is left of it after a crash.
        self._tables = sqlite3.connect("", check_same_thread=False)
        for statement in ("PRAGMA journal_mode = OFF", *statements):
            self.do(statement)

    def do(self, statement: str, values: Sequence[Any] = ()) -> None:
        """One statement without an answer."""
        with _room():
            self._tables.execute(statement, values)

    def add(self, statement: str, rows: Iterable[Row]) -> None:
        """One statement for each of many rows, which are held one at a time."""
        with _room():
            self._tables.executemany(statement, rows)

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[Row]:
        """What a query finds, a row at a time."""
        with _room():
            yield from self._tables.execute(query, values)

    def one(self, query: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row that a query finds; None for none."""
        return next(self.rows(query, values), None)

    def define(self, name: str, function: Any) -> None:
        """Give SQL a function of plain values."""
        self._tables.create_function(name, -1, function, deterministic=True)


def places(columns: Sequence[str]) -> str:
    """``?, ?, ?``: one for each column."""
    return ", ".join("?" * len(columns))


def quoted(columns: Iterable[str]) -> str:
    """Names as SQL takes any word for a name."""
    return ", ".join(f'"{name}"' for name in columns)


@contextmanager
def _room() -> Iterator[None]:
    """A full temporary folder is nobody's fault but the place's."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in FULL:
            raise
        place = os.environ["SQLITE_TMPDIR"]
        raise storage.PlaceError(f"{place}: {storage.UNUSABLE[errno.ENOSPC]}") from error
