"""MLflow, on the driver or rank 0. The only file that imports mlflow.

``MLFLOW_TRACKING_URI`` decides where a run is recorded; unset means files: ``mlflow.db`` and ``mlartifacts/`` in the
working directory, or ``OUTPUT/mlflow/`` in a submitted job, whose working directory is a temporary copy.

Two ways in. :func:`open_run` is for a job on the driver: a store that cannot be used when it begins is the user's to mend, and
one that stops answering later costs the job nothing but its records. :class:`Tracker` is for a training: it writes every record
to ``OUTPUT/tracking`` first and sends it from a thread, so that a store that is away delays nothing and loses nothing, and a run
that was killed and goes on logs no step twice.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import psutil
import pyarrow as pa
import pynvml

from pipelines import storage
from pipelines.download import public_url, scrub
from pipelines.schema import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FOLDER = "tracking"
"""Of an output: ``begin.json`` describes the run, ``run.json`` says how far it is sent, ``pending/`` is what is not."""
CANDIDATE = "candidate"
"""Alias of the newest version of a registered model."""
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
    """Of the store; may hold a password."""
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
    if uri.startswith("sqlite:///"):  # workers run in another folder
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
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


def prepare(store: Store) -> None:
    """Everything a store needs before its first use: a database from an earlier run of the job, or an empty one."""
    if store.upload_to and storage.exists(store.upload_to):
        database = Path(store.uri.removeprefix("sqlite:///"))
        if not database.exists():
            with storage.local_aside(database) as aside:
                aside.write_bytes(storage.read_bytes(store.upload_to))
    make_database(store.uri)


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


def find_trouble(uri: str) -> str:
    """Why a tracking server cannot be used from here, with the cure; empty when it answers and lets us in."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # every kind of store has its own kinds
        return (
            f"{public_url(uri)} cannot be used: {describe_trouble(error)}; is it there, does it let this node in, and are "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD right?"
        )
    return ""


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
        "mlflow.user": _user(),
        "mlflow.source.name": job,
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": commit,
        **further,
    }


def _user() -> str:
    """Who runs this; the number where it has no name, as in a container with a user of its own."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def find_experiment(client: Any, store: Store, name: str) -> str:
    """Id of an experiment, created when new."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = store.artifacts or None
    if location and "://" not in location:
        location = Path(location).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _be_brief() -> None:
    """MLflow's own patience and its pages of remarks, cut to what a person at a terminal wants. Before it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute, not four
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # not two minutes, as often
    for name in ("mlflow.store.db.utils", "alembic"):  # a page of migrations at the first use
        logging.getLogger(name).setLevel(logging.WARNING)
    # each retry, with the exception in it; what comes of them is told once
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@contextmanager
def _told(store: Store) -> Iterator[None]:
    """Turns whatever a store raises, and a server that nothing listens for, into one :class:`TrackingError`."""
    try:
        _require_listener(store.uri)
        yield
    except (
        Exception
    ) as error:  # every kind of store has its own kinds; to the user they all say this
        where, cure = (
            f"MLFLOW_TRACKING_URI={public_url(store.uri)}",
            "unset it to record in mlflow.db of this folder",
        )
        if store.uri.startswith("sqlite:") and not os.environ.get("MLFLOW_TRACKING_URI"):
            where, cure = store.uri, "set MLFLOW_TRACKING_URI to record elsewhere"
        raise TrackingError(
            f"{where}: cannot be used: {describe_trouble(error)}; mend it, or {cure}"
        ) from error


def _require_listener(uri: str) -> None:
    """Raises ``OSError`` when nothing listens at a tracking server's address; MLflow itself would try for half a minute."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname and not getproxies():
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=20).close()


def require(store: Store) -> None:
    """For jobs that record when they are done: raises :class:`TrackingError` now if a server is not going to take it.

    A file of this machine is not asked: it is made once there is something to record.
    """
    if store.uri.startswith("sqlite:"):
        return
    _be_brief()
    from mlflow import MlflowClient

    with _told(store):
        prepare(store)
        MlflowClient(tracking_uri=store.uri).search_experiments(max_results=1)


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
    _be_brief()
    import mlflow

    with _told(store):
        prepare(store)
        mlflow.set_tracking_uri(store.uri)
        run = _begin(store, experiment, parameters, tags)
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

    client = MlflowClient(tracking_uri=store.uri)
    experiment_id = find_experiment(client, store, experiment)
    begun = client.create_run(experiment_id, tags=dict(tags))
    _log_parameters(client, begun.info.run_id, parameters)
    return Run(begun.info.run_id, client, experiment_id)


class Tracker:
    """The MLflow run of a training, across kills: one run however often the job is started.

    Records go to ``OUTPUT/tracking/pending`` as small files, at once; a thread sends them and then deletes them. What was
    sent or is pending has a mark by kind and step in ``run.json`` and the files' names, and is not recorded again when steps
    are replayed from a checkpoint. Sending twice, after a kill between the two, is harmless: MLflow keeps one metric of
    the same time, step and value, and pictures have a name that is looked for.
    """

    def __init__(self, output: str, store: Store, retry_seconds: float = 30.0) -> None:
        """Args:
        output: of the job; :func:`begin` was called for it.
        store: where to.
        retry_seconds: between attempts while the store does not answer.
        """
        import mlflow  # noqa: F401  # not first in the thread: a loader forked meanwhile would inherit half an import

        self.folder = storage.join(output, FOLDER)
        self.store = store
        self.retry_seconds = retry_seconds
        self.problem = ""
        """Why the store could not be reached at the first failure; empty while all is well."""
        self._begin: dict[str, Any] = json.loads(self._read("begin.json"))
        state = _read_state(self.folder)
        identity = _identity(store)
        self._state: dict[str, Any] = (
            state if state.get("store") == identity else {"store": identity, "sent": {}}
        )
        self._marks: dict[str, int] = dict(self._state["sent"])
        for name in self._pending():
            step, kind = _parts(name)
            if kind.startswith("end"):  # of a run that now goes on
                storage.remove(storage.join(self.folder, "pending", name))
            self._marks[kind] = max(step, self._marks.get(kind, -1))
        self._client: Any = None
        self._run_id = ""
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int, kind: str = "metrics") -> None:
        """Record numbers at a step, once for each kind and step."""
        self._record(kind, step, {"metrics": dict(values)})

    def image(self, png: bytes, step: int, key: str = "preview") -> None:
        """Record a PNG at a step; MLflow shows those of one key as a series."""
        self._record(key, step, {"image": base64.b64encode(png).decode(), "key": key})

    def film(self, mp4: bytes, step: int) -> None:
        """Record a video at a step, as the artifact ``films/STEP.mp4``."""
        self._record("film", step, {"film": base64.b64encode(mp4).decode()})

    def bundle(self, uri: str, name: str, sha256: str, step: int) -> None:
        """Record a bundle as a new version of a registered model, alias ``candidate``; the same bytes are one version."""
        content = {"bundle": uri, "name": name, "sha256": sha256}
        self._record(f"bundle-{sha256[:8]}", step, content)

    def end(self, status: str, step: int) -> None:
        """Record how the run ended: FINISHED, FAILED or KILLED."""
        self._record(f"end-{uuid.uuid4().hex[:8]}", step, {"status": status})

    def close(self, patience_seconds: float = 600.0) -> int:
        """Send what is left: for so long at most while it goes well, with one attempt when the store is away.

        Returns:
            how many records must wait for the next run of the command.
        """
        self._ending.set()
        self._wake.set()
        self._thread.join(patience_seconds)
        return len(self._pending())

    def _record(self, kind: str, step: int, content: dict[str, Any]) -> None:
        if step <= self._marks.get(kind, -1):
            return
        self._marks[kind] = step
        content = {"time": int(time.time() * 1000), "kind": kind, "step": step, **content}
        name = f"pending/{step:015d}-{kind.replace('/', '_')}.json"
        uri = storage.join(self.folder, name)
        storage.write_atomic(uri, json.dumps(content).encode(), durable=False)
        self._wake.set()

    def _pending(self) -> list[str]:
        return [
            name
            for name in storage.names_below(storage.join(self.folder, "pending"))
            if name.endswith(".json")
        ]

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.folder, name))

    def _send_all(self) -> None:
        """The thread: sends whatever is pending, waits, and after a failure tries again later."""
        while True:
            self._wake.clear()  # before the next line, or a close in between would wait in vain
            ending = self._ending.is_set()
            try:
                self._send_pending()
            except Exception as error:  # every kind of store has its own kinds
                self._client = None
                if not self.problem:
                    reason = one_line(scrub(f"{type(error).__name__}: {error}"), 200)
                    self.problem = (
                        f"MLflow at {public_url(self.store.uri)} cannot be reached ({reason}); training goes on, and what it "
                        f"records waits in {self.folder}/pending"
                    )
                    logging.getLogger(__name__).warning("%s", self.problem)
                self._ending.wait(self.retry_seconds)
            else:
                if not ending:
                    self._wake.wait()
            if ending:
                return

    def _send_pending(self) -> None:
        if self._client is None:
            self._client = self._connect()
        names = self._pending()
        for name in names:
            record = json.loads(self._read(f"pending/{name}"))
            self._send(record)
            self._state["sent"][record["kind"]] = record["step"]
        if self.store.upload_to and names:
            database = Path(self.store.uri.removeprefix("sqlite:///"))
            storage.put_file(database, self.store.upload_to)
        if names:
            self._write_state()
        for name in names:
            storage.remove(storage.join(self.folder, "pending", name))

    def _connect(self) -> Any:
        """A client whose run exists and is open; found again by id, or by its token if the id was not yet written."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # this loop tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        for name in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        prepare(self.store)
        client = MlflowClient(tracking_uri=self.store.uri, registry_uri=self.store.uri)
        begin = self._begin
        run_id = self._state.get("run_id", "")
        try:
            if run_id:
                client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run_id = ""  # deleted for good: a new one
        if not run_id:
            experiment_id = find_experiment(client, self.store, begin["experiment"])
            token = begin["tags"]["headray.token"]
            found = client.search_runs([experiment_id], f"tags.`headray.token` = '{token}'")
            run_id = (
                found[0].info.run_id
                if found
                else client.create_run(
                    experiment_id, tags=begin["tags"], run_name=begin["name"]
                ).info.run_id
            )
            _log_parameters(client, run_id, begin["parameters"])
        _attach(client, run_id, begin)
        self._run_id = run_id
        self._state["run_id"] = run_id
        self._write_state()
        return client

    def _write_state(self) -> None:
        uri = storage.join(self.folder, "run.json")
        storage.write_atomic(uri, json.dumps(self._state, indent=1).encode(), durable=False)

    def _send(self, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        run_id, step, moment = self._run_id, record["step"], record["time"]
        if "metrics" in record:
            metrics = [
                Metric(name, value, moment, step) for name, value in record["metrics"].items()
            ]
            self._client.log_batch(run_id, metrics=metrics)
        elif "image" in record:
            self._send_image(record)
        elif "film" in record:
            with tempfile.TemporaryDirectory(prefix="headray-") as folder:
                made = Path(folder, f"{step:012d}.mp4")
                made.write_bytes(base64.b64decode(record["film"]))
                self._client.log_artifact(run_id, str(made), "films")
        elif "bundle" in record:
            self._register(record)
        else:
            self._client.set_terminated(run_id, status=record["status"], end_time=moment)

    def _send_image(self, record: Mapping[str, Any]) -> None:
        import cv2
        import numpy as np

        key, step = record["key"], record["step"]
        there = [item.path for item in self._client.list_artifacts(self._run_id, "images")]
        if any(re.search(rf"/{key}[%+]step[%+]{step}[%+]", path) for path in there):
            return
        coded = np.frombuffer(base64.b64decode(record["image"]), np.uint8)
        image = cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)
        self._client.log_image(
            self._run_id, image, key=key, step=step, timestamp=record["time"], synchronous=True
        )

    def _register(self, record: Mapping[str, Any]) -> None:
        client, name = self._client, record["name"]
        known = client.search_registered_models(f"name = '{name}'")
        if not known:
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        if any(version.tags.get("sha256") == record["sha256"] for version in versions):
            return
        with tempfile.TemporaryDirectory(prefix="headray-") as folder:
            for file in storage.names_below(record["bundle"]):
                content = storage.read_bytes(storage.join(record["bundle"], file))
                Path(folder, file).write_bytes(content)
            client.log_artifacts(self._run_id, folder, "bundle")
        source = f"{client.get_run(self._run_id).info.artifact_uri}/bundle"
        version = client.create_model_version(
            name, source, run_id=self._run_id, tags={"sha256": record["sha256"]}
        )
        client.set_registered_model_alias(name, CANDIDATE, version.version)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The dataset of a run, as MLflow's Datasets column shows it."""

    uri: str
    version: int
    digest: str
    """First 12 hexadecimal digits of the sha256 of ``dataset.json``."""


def begin(
    output: str,
    experiment: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    lineage: Lineage,
    config: Mapping[str, Any],
) -> None:
    """Describe the run of an output before a :class:`Tracker` opens it; reaches no server.

    Args:
        output: of the job.
        experiment: created when new.
        parameters: flat configuration; logged when the run is new.
        tags: such as the git commit.
        lineage: of the dataset; another version when a run goes on is added to the first.
        config: what ``config.json`` holds; an artifact.
    """
    uri = storage.join(output, FOLDER, "begin.json")
    token = uuid.uuid4().hex
    if storage.exists(uri):
        token = json.loads(storage.read_bytes(uri))["tags"]["headray.token"]
    content = {
        "experiment": experiment,
        "name": output.rstrip("/").rpartition("/")[2],
        "parameters": {name: str(value)[:PARAMETER_LIMIT] for name, value in parameters.items()},
        "tags": {**tags, "headray.token": token},
        "lineage": vars(lineage),
        "config": dict(config),
    }
    storage.write_atomic(uri, json.dumps(content, indent=1).encode())


def read_lineage(output: str) -> Lineage | None:
    """The dataset that an output's run was begun or last continued with."""
    try:
        content = json.loads(storage.read_bytes(storage.join(output, FOLDER, "begin.json")))
    except FileNotFoundError:
        return None
    return Lineage(**content["lineage"])


def num_pending(output: str) -> int:
    """Records that no store has been sent yet."""
    return len(storage.names_below(storage.join(output, FOLDER, "pending")))


def find_bundle(uri: str, cache: Path | None = None) -> str:
    """Where the files of a bundle are: ``models:/NAME@alias`` and ``models:/NAME/VERSION`` are fetched from the registry of
    ``MLFLOW_TRACKING_URI``, anything else is returned as it is.

    Args:
        uri: whatever a user gave as a bundle.
        cache: folder for what is fetched; by default one that lives as long as the machine's temporary files.

    Raises:
        TrackingError: the registry does not answer or knows no such model.
    """
    if not uri.startswith("models:/"):
        return uri
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    place = find_store(".", submitted=False).uri
    if place.startswith("sqlite:///") and not Path(place.removeprefix("sqlite:///")).exists():
        raise TrackingError(f"{uri}: no registry at {place}; set MLFLOW_TRACKING_URI")
    name, _, which = uri.removeprefix("models:/").replace("@", "/@").partition("/")
    try:
        client = MlflowClient(tracking_uri=place, registry_uri=place)
        version = (
            client.get_model_version_by_alias(name, which[1:]).version
            if which.startswith("@")
            else which
        )
        source = client.get_model_version_download_uri(name, version)
        folder = cache or Path(tempfile.mkdtemp(prefix="headray-bundle-"))
        return str(
            download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=place)
        )
    except Exception as error:
        reason = one_line(scrub(f"{type(error).__name__}: {error}"), 200)
        raise TrackingError(f"{uri}: not found in {public_url(place)}: {reason}") from error


def system_metrics() -> dict[str, float]:
    """CPU, memory and GPU load of this machine, under the names that MLflow's page of system metrics shows."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            used = pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e6
            values[f"system/gpu_{number}_memory_usage_megabytes"] = used
            share = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            values[f"system/gpu_{number}_utilization_percentage"] = float(share)
    except pynvml.NVMLError:  # no GPU, or one that does not tell
        pass
    return values


def _identity(store: Store) -> str:
    """Tells stores apart without holding their passwords."""
    return hashlib.sha256((store.upload_to or store.uri).encode()).hexdigest()[:16]


def _read_state(folder: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, "run.json")))
    except FileNotFoundError:
        return {}
    return state


def _parts(name: str) -> tuple[int, str]:
    """Step and kind of a pending file."""
    step, _, kind = name.removesuffix(".json").partition("-")
    return int(step), kind


def _log_parameters(client: Any, run_id: str, parameters: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    values = [Param(name, str(value)[:PARAMETER_LIMIT]) for name, value in parameters.items()]
    for first in range(0, len(values), PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=values[first : first + PARAMETERS_AT_ONCE])


def _attach(client: Any, run_id: str, begin: Mapping[str, Any]) -> None:
    """Dataset, configuration and commit of this start of the run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    lineage = begin["lineage"]
    dataset = Dataset(
        name=lineage["uri"].rstrip("/").rpartition("/")[2],
        digest=f"v{lineage['version']}-{lineage['digest']}",
        source_type="headray",
        source=json.dumps({"uri": lineage["uri"], "version": lineage["version"]}),
    )
    client.log_inputs(
        run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    )
    client.log_dict(run_id, begin["config"], "config.json")
    for name, value in begin["tags"].items():
        client.set_tag(run_id, name, value)
