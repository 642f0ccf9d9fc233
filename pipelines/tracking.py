"""MLflow, on the driver or rank 0. The only file that imports mlflow.

``MLFLOW_TRACKING_URI`` decides where a run is recorded; unset means files: ``mlflow.db`` and ``mlartifacts/`` in the
working directory, or ``OUTPUT/mlflow/`` in a submitted job, whose working directory is a temporary copy.

A store that cannot be used when a run begins is the user's to mend. One that stops answering later costs the run nothing
but its records: hours of work must not end with 1 because a server was restarted.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from pipelines import storage
from pipelines.download import public_url, scrub
from pipelines.schema import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

PARAMETER_LIMIT = 6000
"""MLflow's longest parameter value, characters."""
NOTE_LIMIT = 8000
"""MLflow's longest tag, characters."""
DIGEST_LIMIT = 36
"""MLflow's longest digest of a dataset, characters."""
PARAMETERS_AT_ONCE = 100
METRICS_AT_ONCE = 1000


class TrackingError(ValueError):
    """The tracking store cannot be used: one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where runs go, and what a person types to see them."""

    uri: str
    artifacts: str
    """Folder of the artifacts; empty when the tracking server decides."""
    show: str
    """The command that opens the UI."""
    upload_to: str = ""
    """Object-store URI that receives the local database when the run ends; empty when there is nothing to copy."""


def find_store(output: str, submitted: bool) -> Store:
    """The tracking store of this run.

    Args:
        output: of the job; used when nothing is configured and the working directory is temporary.
        submitted: whether this is a job submitted to a cluster.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri:
        is_server = uri.startswith(("http://", "https://"))
        place = f"open {public_url(uri)}" if is_server else ""
        # The URI of a database may hold a password, and what is printed ends up in logs.
        show = place or 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
        return Store(uri=uri, artifacts="", show=show)
    upload_to = ""
    if not submitted:
        folder = Path.cwd()
        database, artifacts = folder / "mlflow.db", folder / "mlartifacts"
        place = str(folder)
    else:
        place = storage.join(output, "mlflow")
        if storage.is_local(output):
            folder = Path(place)
        else:
            folder = Path(tempfile.mkdtemp(prefix="headray-mlflow-"))
            upload_to = place
        folder.mkdir(parents=True, exist_ok=True)
        database, artifacts = folder / "mlflow.db", folder / "mlartifacts"
    if upload_to:
        there = storage.join(place, "mlflow.db")
        fetch = f"import fsspec; fsspec.open_local('simplecache::{there}', simplecache={{'cache_storage': '.', 'same_names': True}})"
        return Store(
            uri=f"sqlite:///{database}",
            artifacts=storage.join(place, "mlartifacts"),
            show=f'python -c "{fetch}" && mlflow ui --backend-store-uri sqlite:///mlflow.db',
            upload_to=there,
        )
    where = f"{place}/mlflow.db" if submitted else "mlflow.db"
    return Store(
        uri=f"sqlite:///{database}",
        artifacts=str(artifacts),
        show=f"mlflow ui --backend-store-uri sqlite:///{where}",
    )


def run_address(store: Store, run: Run) -> str:
    """Where a browser shows a run, once the UI runs where ``Store.show`` starts it."""
    is_server = store.uri.startswith(("http://", "https://"))
    base = public_url(store.uri) if is_server else "http://127.0.0.1:5000"
    return f"{base.rstrip('/')}/{run.page}"


def make_database(uri: str) -> None:
    """Create the tables of a new SQLite store aside and rename it into place; other stores are left alone.

    MLflow makes them in dozens of steps that SQLite does not undo: a run killed in between would leave a database that
    no later run can open.
    """
    if not uri.startswith("sqlite:///"):
        return
    database = Path(uri.removeprefix("sqlite:///"))
    if database.exists():
        return
    from mlflow import MlflowClient

    with storage.local_aside(database) as aside:
        MlflowClient(tracking_uri=f"sqlite:///{aside}").search_experiments(max_results=1)


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """What MLflow keeps of a dataset that a run read or made."""

    name: str
    digest: str
    """Hash of its content; the first 36 characters are kept."""
    uri: str
    """Where it is, without secrets."""
    context: Literal["list", "published", "training", "evaluation"]
    """What the run did with it."""
    profile: Mapping[str, Any]
    """Counts."""
    columns: pa.Schema | None = None
    """Of its table, if it has one."""


class Run:
    """An open MLflow run. Its methods never raise: the first failure is logged and the later calls are left out."""

    def __init__(self, run_id: str, client: MlflowClient, experiment_id: str = "0") -> None:
        self.run_id = run_id
        self.page = f"#/experiments/{experiment_id}/runs/{run_id}"
        """Of the run, below the address of the UI, whose first page shows something else."""
        self.trouble = ""
        """Why the store is not written any more, one line; empty while it is."""
        self._client = client

    def _attempt(self, call: Callable[[], object]) -> None:
        if self.trouble:
            return
        try:
            call()
        except Exception as error:  # every kind of store has its own kinds
            self.trouble = describe_trouble(error)
            logger.warning("MLflow: this run is not recorded from here on: %s", self.trouble)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        self._attempt(lambda: self._log_metrics(values, step))

    def series(self, values: Mapping[str, float], step: int) -> bool:
        """Log one point of some series; False when the store did not take it. The next point may pass again."""
        try:
            self._log_metrics(values, step)
        except Exception as error:  # as above
            logger.info("MLflow: a point of a series was lost: %s", describe_trouble(error))
            return False
        return True

    def _log_metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in values.items()]
        for first in range(0, len(points), METRICS_AT_ONCE):
            some = points[first : first + METRICS_AT_ONCE]
            self._client.log_batch(self.run_id, metrics=some)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        for name, value in values.items():
            self._attempt(partial(self._client.set_tag, self.run_id, name, value))

    def note(self, markdown: str) -> None:
        """The description that MLflow shows on the run's page."""
        self.tags({"mlflow.note.content": markdown[:NOTE_LIMIT]})

    def dataset(self, entry: DatasetEntry) -> None:
        """Log a dataset that the run read or made."""
        self._attempt(lambda: self._log_dataset(entry))

    def _log_dataset(self, entry: DatasetEntry) -> None:
        from mlflow.entities import DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        tags = [InputTag(MLFLOW_DATASET_CONTEXT, entry.context)]
        self._client.log_inputs(self.run_id, [DatasetInput(_dataset_entity(entry), tags)])

    def file(self, path: Path, folder: str = "") -> None:
        """Log one file as an artifact."""
        self._attempt(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def record(self, content: Mapping[str, Any], name: str) -> None:
        """Log a dictionary as a JSON artifact."""
        self._attempt(lambda: self._client.log_dict(self.run_id, dict(content), name))


def describe_trouble(error: Exception) -> str:
    """What a store said, in one line without secrets."""
    return one_line(scrub(f"{type(error).__name__}: {error}"), 200)


def _dataset_entity(entry: DatasetEntry) -> Any:
    """:class:`DatasetEntry` as MLflow stores it."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset

    if entry.uri.startswith(("http://", "https://")):
        source: Any = HTTPDatasetSource(entry.uri)
    else:
        with warnings.catch_warnings(
            action="ignore"
        ):  # a local path is "ambiguous" between one kind
            source = resolve_dataset_source(entry.uri)
    schema = _colspecs(entry.columns) if entry.columns is not None else None
    digest = entry.digest[:DIGEST_LIMIT]
    made = MetaDataset(source, name=entry.name, digest=digest, schema=schema)  # type: ignore[abstract]
    return Dataset(**made.to_dict(), profile=json.dumps(dict(entry.profile)))


def _colspecs(columns: pa.Schema) -> Any:
    """An Arrow schema of plain types, lists and maps of them as MLflow's."""
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Map

    def convert(kind: pa.DataType) -> Any:
        if pa.types.is_map(kind):
            return Map(convert(kind.item_type))
        if pa.types.is_list(kind):
            return Array(convert(kind.value_type))
        if pa.types.is_floating(kind):
            return DataType.double
        if pa.types.is_integer(kind):
            return DataType.long if kind.bit_width > 32 else DataType.integer
        return DataType.string

    return Schema([ColSpec(convert(column.type), column.name) for column in columns])


def run_tags(name: str, job: str, commit: str, **further: str) -> dict[str, str]:
    """Tags that MLflow's pages show by themselves, and further ones.

    Args:
        name: of the run, in the list of runs.
        job: file that runs, as a user names it: ``jobs/preprocess.py``.
        commit: of the code.
        further: such as the dataset's URI.
    """
    return {
        "mlflow.runName": name,
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": job,
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": commit,
        **further,
    }


@contextmanager
def open_run(
    store: Store, experiment: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """A run with its parameters logged; ends as FINISHED, or FAILED when an exception leaves the block.

    Args:
        store: from :func:`find_store`.
        experiment: created when new.
        parameters: flat configuration; values are cut to what MLflow takes.
        tags: of :func:`run_tags`.

    Raises:
        TrackingError: the store does not answer, or is of an unknown kind.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute, not four
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # not two minutes, as often
    import mlflow

    for name in ("mlflow.store.db.utils", "alembic"):  # a page of migrations at the first use
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        make_database(store.uri)
        mlflow.set_tracking_uri(store.uri)
        run = _begin(store, experiment, parameters, tags)
    except (
        Exception
    ) as error:  # every kind of store has its own kinds; to the user they all say this
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={public_url(store.uri)}: cannot be used: {describe_trouble(error)}"
        ) from error
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        run._attempt(lambda: run._client.set_terminated(run.run_id, status))
        if store.upload_to:
            database = Path(store.uri.removeprefix("sqlite:///"))
            run._attempt(lambda: storage.put_file(database, store.upload_to))


def _begin(
    store: Store, experiment: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> Run:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(tracking_uri=store.uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = store.artifacts or None
        if location and "://" not in location:
            location = Path(location).as_uri()
        experiment_id = client.create_experiment(experiment, artifact_location=location)
    else:
        experiment_id = found.experiment_id
    begun = client.create_run(experiment_id, tags=dict(tags))
    values = [Param(name, str(value)[:PARAMETER_LIMIT]) for name, value in parameters.items()]
    for first in range(0, len(values), PARAMETERS_AT_ONCE):
        some = values[first : first + PARAMETERS_AT_ONCE]
        client.log_batch(begun.info.run_id, params=some)
    return Run(begun.info.run_id, client, experiment_id)
