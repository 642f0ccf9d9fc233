"""Rows on disk: everything comes back in order, memory does not grow with them, a full disk is said in one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.shelf import Shelf, places, quoted
from pipelines.storage import PlaceError
from pipelines.tables import ROW_COLUMNS, sorted_rows

texts = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.tuples(texts, texts), max_size=20))
def test_rows_come_back_as_they_are_sorted_as_python_sorts_them(
    rows: list[tuple[str, str]],
) -> None:
    columns = ("left", "order")  # words of SQL
    shelf = Shelf(f"CREATE TABLE rows ({quoted(columns)})")
    shelf.add(f"INSERT INTO rows VALUES ({places(columns)})", rows)
    found = shelf.rows(f"SELECT {quoted(columns)} FROM rows ORDER BY {quoted(columns)}")
    assert list(found) == sorted(rows)
    assert shelf.one("SELECT COUNT(*) FROM rows") == (len(rows),)
    assert shelf.one("SELECT * FROM rows WHERE 1 = 2") is None


def made_rows(count: int) -> int:
    """Sort so many rows of a list, and read them; the most memory that Python's objects took."""

    def rows():
        for number in range(count, 0, -1):
            row = dict.fromkeys(ROW_COLUMNS, "x" * 20)
            yield row | {"identity": f"id{number:07d}", "line": number}

    tracemalloc.start()
    try:
        lines = [row["line"] for row in sorted_rows(rows()) if row["line"] % 1000 == 0]
        assert lines == list(range(1000, count + 1, 1000))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_long_list_is_sorted_without_being_held() -> None:
    assert made_rows(10_000) < 1_000_000  # as objects 10 MB


def test_a_full_temporary_folder_is_a_place_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    shelf = Shelf("CREATE TABLE rows (text)", "PRAGMA max_page_count = 20")
    with pytest.raises(PlaceError, match=f"{tmp_path}: no space left"):
        shelf.add("INSERT INTO rows VALUES (?)", (("x" * 1000,) for _ in range(1000)))
