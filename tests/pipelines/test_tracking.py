"""Where runs are recorded, and what is said when they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import tracking


def test_address_of_the_store_is_shown_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:word@mlflow.example")
    assert tracking.find_store(str(tmp_path), False).show == "open https://mlflow.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:word@db/mlflow")
    assert "word" not in tracking.find_store(str(tmp_path), False).show


def test_store_that_does_not_answer_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store = tracking.Store(uri="http://me:word@127.0.0.1:1", artifacts="", show="")
    with (
        pytest.raises(tracking.TrackingError, match="cannot be used") as raised,
        tracking.open_run(store, "experiment", {}, {}),
    ):
        pass
    assert "word" not in str(raised.value)
