"""Ends every test run by saying how many tests this machine could not run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four drawn people."""
    from tests.trainings import make_people

    return make_people(tmp_path_factory.mktemp("people") / "data")


@pytest.fixture(scope="session")
def smoke_training(people: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a smoke training of the Aligner that nobody disturbed, and what it printed."""
    from tests.trainings import train_smoke

    folder = tmp_path_factory.mktemp("smoke")
    code, text = train_smoke(folder, people)
    assert code == 0, text
    return folder, text


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line, after pytest's own: green with tests skipped is not the same as green."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped:
        reporter.write_line(f"{skipped} tests skipped on this machine: reasons above")
