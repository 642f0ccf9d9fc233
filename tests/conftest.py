"""Ends every test run by saying how many tests this machine could not run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def iris_weights(request: pytest.FixtureRequest) -> Path:
    """A folder for ``HEADRAY_WEIGHTS`` with the network that finds pupils; kept from run to run."""
    from tests.material import fetch_iris

    return fetch_iris(request.config.cache.mkdir("weights"))


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good videos and a broken one, with their list."""
    from jobs import demo
    from tests.small_list import CLIPS

    folder = tmp_path_factory.mktemp("corpus")
    demo.make_corpus(folder, CLIPS)
    return folder


@pytest.fixture(scope="session")
def url(corpus: Path) -> Iterator[str]:
    """Where the videos are served."""
    from jobs import demo

    with demo.serve(corpus / "videos") as address:
        yield address


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that nobody touches."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, url: str, calm: Path) -> tuple[dict[str, str], float]:
    """Fingerprint of the dataset of a run that nobody touched, and its duration in seconds."""
    from tests.runs import fingerprint, run_job
    from tests.small_list import arguments

    started = time.monotonic()
    code, text = run_job("preprocess", *arguments(corpus, url, calm / "out"), folder=calm)
    assert code == 0, text
    return fingerprint(calm / "out"), time.monotonic() - started


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of an S3 bucket that this process and its children reach, empty when the file's first test asks for it."""
    from tests.buckets import BUCKET, object_store, reached

    with object_store() as environment, reached(environment):
        yield f"s3://{BUCKET}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line, after pytest's own: green with tests skipped is not the same as green."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or config.option.collectonly:
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped:
        reporter.write_line(f"{skipped} tests skipped on this machine: reasons above")
