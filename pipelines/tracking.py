"""MLflow, on the driver or rank 0. The only file that imports mlflow.

``MLFLOW_TRACKING_URI`` decides where a run is recorded; unset means files: ``mlflow.db`` and ``mlartifacts/`` in the
working directory, or ``OUTPUT/mlflow/`` in a submitted job, whose working directory is a temporary copy.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.download import public_url, scrub
from pipelines.schema import one_line

PARAMETER_LIMIT = 6000
"""MLflow's longest parameter value, characters."""


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


class Run:
    """An open MLflow run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        import mlflow

        mlflow.log_metrics(dict(values), step=step, run_id=self.run_id)

    def file(self, path: Path, folder: str = "") -> None:
        """Log one file as an artifact."""
        import mlflow

        mlflow.log_artifact(str(path), folder or None, run_id=self.run_id)

    def record(self, content: Mapping[str, Any], name: str) -> None:
        """Log a dictionary as a JSON artifact."""
        import mlflow

        mlflow.log_dict(dict(content), name, run_id=self.run_id)


@contextmanager
def open_run(
    store: Store, experiment: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """A run with its parameters logged; ends as FINISHED, or FAILED when an exception leaves the block.

    Args:
        store: from :func:`find_store`.
        experiment: created when new.
        parameters: flat configuration; values are cut to what MLflow takes.
        tags: such as the git commit and the dataset's URI.

    Raises:
        TrackingError: the store does not answer, or is of an unknown kind.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute, not four
    import mlflow

    for name in ("mlflow.store.db.utils", "alembic"):  # a page of migrations at the first use
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        make_database(store.uri)
        mlflow.set_tracking_uri(store.uri)
        found = mlflow.get_experiment_by_name(experiment)
        if found is None:
            location = store.artifacts or None
            if location and "://" not in location:
                location = Path(location).as_uri()
            experiment_id = mlflow.create_experiment(experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
    except (
        Exception
    ) as error:  # every kind of store has its own kinds; to the user they all say this
        reason = one_line(scrub(f"{type(error).__name__}: {error}"), 200)
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={public_url(store.uri)}: cannot be used: {reason}"
        ) from error
    try:
        with mlflow.start_run(experiment_id=experiment_id, tags=dict(tags)) as run:
            mlflow.log_params(
                {name: str(value)[:PARAMETER_LIMIT] for name, value in parameters.items()}
            )
            yield Run(run.info.run_id)
    finally:
        if store.upload_to:
            storage.put_file(Path(store.uri.removeprefix("sqlite:///")), store.upload_to)
