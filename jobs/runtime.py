"""What every job does the same way: parse, print and record the configuration, connect to Ray, end with a code."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from models.frozen.weights import WeightsError
from pipelines import nodes, shards, storage, tracking
from pipelines.download import public, public_url
from pipelines.output import (
    CONFIG,
    WORK,
    ConfigError,
    NothingUsableError,
    OutputLock,
    flatten,
    require_same_recipe,
)
from pipelines.shards import DatasetError
from pipelines.tracking import TrackingError
from pipelines.voxceleb import ListError

if TYPE_CHECKING:
    from pipelines.training import Batches, Build, ClusterConfig, Film, HeldOut, Training

REPOSITORY = Path(__file__).resolve().parents[1]
DONE, FAULT, USAGE, NOTHING = 0, 1, 2, 3
JOINING_SECONDS = 60.0
"""For nodes of a cluster that was started by hand: one after another."""
USER_ERRORS = (
    ConfigError,
    DatasetError,
    ListError,
    storage.PlaceError,
    TrackingError,
    WeightsError,
)

PLACE_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""What an operating system says of a place that a user named and that does not do."""

Config = TypeVar("Config")
console = Console(soft_wrap=True, highlight=False, markup=False)


def parse(presets: Mapping[str, Config], description: str) -> Config:
    """``JOB [PRESET] [--flag value ...]`` → the resolved configuration. ``-h`` explains every flag and exits.

    Args:
        presets: by name; the first is the default. Fields set to ``tyro.MISSING`` are required flags.
        description: shown by ``-h``; the presets are listed below it.
    """
    arguments = sys.argv[1:]
    names = list(presets)
    name = names[0]
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in presets:
            usage(f"preset {name!r} is unknown; the presets are {', '.join(names)}")
    default = presets[name]
    told = description
    if len(names) > 1:
        told += f"\n\nPresets: {', '.join(names)} (now: {name}; give it as the first word)."
    try:
        config = tyro.cli(type(default), default=default, args=arguments, description=told)
    except ValueError as error:  # a check in __post_init__, which names the field and the value
        usage(str(error))
    if len(names) > 1:
        others = ", ".join(each for each in names if each != name)
        console.print(f"preset   {name} (others: {others})")
    return config


def again(flag: str, value: object, without: str = "") -> str:
    """The command line of this process as it can be typed again, with another value of one flag.

    Args:
        flag: its name, without dashes.
        value: its new value.
        without: a flag that is left out.
    """
    kept: list[str] = []
    is_value = False
    for word in sys.argv:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") in (f"--{flag}", f"--{without}"):
            is_value = not equals
        elif is_value:
            is_value = False
        else:
            kept.append(_shown(word))
    return f"python {shlex.join([*kept, f'--{flag}', str(value)])}"


def _shown(word: str) -> str:
    """A word of the command line as it may be printed: ``...`` for a URL with what nobody else may see."""
    if "://" not in word:
        return word
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return word if public_url(value) == value else f"{flag}{equals}..."


def location(flag: str, uri: str) -> str:
    """The value of a flag that names a file or folder, made absolute; one that nothing here can open is usage."""
    if uri.startswith("models:/"):
        return uri
    try:
        return storage.absolute(uri)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        usage(f"--{flag} {uri}: {error}")


def usage(message: str) -> NoReturn:
    """One readable line on stderr, exit code 2."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {message}")
    raise SystemExit(USAGE)


def main(job: Callable[[], None]) -> None:
    """Run a job and end the process with the code of docs/formats.md: 0 done, 2 usage, 3 nothing usable, 1 our fault."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if callable(signal.getsignal(signal.SIGINT)):  # of script_path, until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job()
    except USER_ERRORS as error:
        original = getattr(
            error, "cause", error
        )  # of an error in a worker, to which Ray adds lines
        usage(str(original).splitlines()[0])
    except NothingUsableError as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"nothing usable: {error}")
        raise SystemExit(NOTHING) from None
    except OSError as error:
        if error.errno not in PLACE_ERRORS or not error.filename:
            raise_fault()
        usage(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues from here")
        raise SystemExit(130) from None
    except Exception:
        raise_fault()


def raise_fault() -> NoReturn:
    """The stack of the exception that is being handled, and exit code 1: our fault."""
    traceback.print_exc()
    raise SystemExit(FAULT) from None


def record(config: Any, output: str, job: str = "preprocess") -> dict[str, Any]:
    """Print the resolved configuration and write it with the code's version as ``OUTPUT/config.json``, without secrets.

    Args:
        config: of the job.
        output: folder or URI.
        job: its name; says what the configuration is of.

    Returns:
        the flat configuration (``download.min_height``), for MLflow.
    """
    nested = public(dataclasses.asdict(config))
    flat = flatten(nested)
    console.print("configuration")
    own = {name: value for name, value in nested.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in nested.items() if isinstance(value, Mapping)}
    for group, values in [("", own), *groups.items()]:
        told = " ".join(f"{name}={value!r}" for name, value in flatten(values).items())
        console.print(f"  {group + ': ' if group else ''}{told}")
    content = {"job": job, "config": nested, "code": code_version()}
    data = json.dumps(content, indent=1, sort_keys=True).encode()
    storage.write_atomic(storage.join(output, CONFIG), data)
    return flat


def code_version() -> dict[str, Any]:
    """Git commit and whether the tree differs from it.

    A submitted job runs in a copy without ``.git``; there ``HEADRAY_COMMIT`` of the job's environment is taken.
    """
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return {"commit": os.environ.get("HEADRAY_COMMIT", "unknown"), "dirty": None}
    if head.returncode:
        return {"commit": os.environ.get("HEADRAY_COMMIT", "unknown"), "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(state.stdout.strip())}


def submitted() -> bool:
    """Whether Ray runs this process as the driver of a submitted job (in a temporary copy of the tree)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def require_answer(address: str) -> None:
    """End with 2 when nothing listens at ``HOST:PORT``: Ray itself would try for minutes and leave a page of stack."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto"
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), 10).close()
    except OSError as error:
        usage(f"RAY_ADDRESS={address}: no cluster there ({error}); unset it to use this machine")


def own_cores() -> int:
    """Cores of this machine that a private cluster will have; 0 when the job joins a cluster."""
    if submitted() or os.environ.get("RAY_ADDRESS", "local") != "local":
        return 0
    return len(os.sched_getaffinity(0))


def patience() -> float:
    """Seconds to wait for nodes that may be joining: none on a private cluster."""
    return 0.0 if own_cores() else JOINING_SECONDS


def connect(minimum_cpus: float) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, else start a private one on this machine.

    Args:
        minimum_cpus: logical CPUs that the plan needs to run at all. A private cluster is told that it has as many more
            as the machine has cores: most pools wait most of the time, and the slowest must be able to use every core.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # an "error" for each actor pool that is none
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    )
    address = os.environ.get("RAY_ADDRESS", "local")
    import ray

    if submitted():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    elif address != "local":
        environment = {
            "working_dir": str(REPOSITORY),
            "excludes": [".git", ".venv", "demo", "mlartifacts", "mlflow.db"],
        }
        require_answer(address)
        ray.init(
            address=address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(
            address="local",
            num_cpus=own_cores() + int(minimum_cpus + 0.999) - 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


# --- trainings ----------------------------------------------------------------------------------------------------


def train(
    name: str,
    config: Any,
    *,
    build: Build,
    batches: Batches,
    held_out: HeldOut,
    remarks: Sequence[str],
    film: Film | None = None,
) -> None:
    """What every training job does once it has checked its configuration: lock, record, connect, train, summarise.

    Args:
        name: of the model.
        config: a ``TrainConfig`` with ``learner`` and ``samples``.
        build: of the learner.
        batches: to train on.
        held_out: to evaluate on.
        remarks: what the summary says of the training beside its numbers.
        film: shown of each evaluation.
    """
    from pipelines import checkpoints, journal, training

    try:
        config.cluster.require_divides(config.samples.batch_size, config.learner.accumulate)
    except ValueError as error:
        usage(str(error))
    flat = flatten(public(dataclasses.asdict(config)))
    recipe = {
        field: value for field, value in flat.items() if not field.startswith(training.OPERATIONAL)
    }
    require_same_recipe(config.output, recipe, job=f"train_{name}", known=flat)
    with OutputLock(config.output):
        seen = checkpoints.samples_of(checkpoints.newest(config.output))
        bundle = storage.join(config.output, journal.BUNDLE)
        is_done = seen >= config.training.samples and storage.exists(storage.join(bundle, CONFIG))
        if not is_done:  # what cannot run leaves nothing behind
            find_room(config.cluster)
        told = prepare_training(name, config)
        work = training.Training(
            output=config.output,
            build=build,
            batches=batches,
            held_out=held_out,
            film=film,
            config=config.training,
            cluster=config.cluster,
            health=config.health,
            **told,
        )
        started = time.perf_counter()
        if is_done:
            console.print(
                f"nothing to do: {seen:,} samples were seen; --training.samples takes more"
            )
        else:
            if seen:
                console.print(f"going on from {seen:,} samples")
            priced = config.cluster.price_per_worker_hour > 0
            try:
                with (
                    cluster_told(config.cluster),
                    journal.Watch(config.output, priced, console.print),
                ):
                    training.run(work)
            except BaseException as error:
                status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                close_run(work, status)
                raise
        waiting = close_run(work)
    summarise_training(work, time.perf_counter() - started, waiting, remarks)


def find_room(cluster: ClusterConfig) -> None:
    """Join or start Ray if the training wants it; raises :class:`ConfigError`, or ends with 2, where its workers cannot run."""
    from pipelines import training

    if not training.is_local(cluster):
        connect(max(cluster.num_workers, 1))
    training.require_room(cluster, patience())
    if not training.is_local(cluster):
        require_reach(cluster)


def cluster_told(cluster: ClusterConfig) -> AbstractContextManager[object]:
    """Context that tells which nodes come and go, where there is a cluster at all."""
    from pipelines import training

    return nullcontext() if training.is_local(cluster) else nodes.Timeline(console.print)


def prepare_training(name: str, config: Any) -> dict[str, Any]:
    """Write the configuration, describe the MLflow run, and say what the bundle's card will; warns of another dataset."""
    manifest = storage.read_bytes(storage.join(config.dataset, shards.MANIFEST))
    digest = hashlib.sha256(manifest).hexdigest()
    lineage = tracking.Lineage(
        uri=public_url(config.dataset),
        version=json.loads(manifest)["dataset_version"],
        digest=digest[:12],
    )
    before = tracking.read_lineage(config.output)
    if before and before != lineage:
        console.print(
            f"warning: the dataset was version {before.version} ({before.digest}) before and is {lineage.version} "
            f"({lineage.digest}) now; the run goes on with the new one"
        )
    flat = record(config, config.output, f"train_{name}")
    code = code_version()
    tags = {
        "git_commit": code["commit"],
        "mlflow.source.git.commit": code["commit"],
        "mlflow.source.name": f"jobs/train_{name}.py",
        "mlflow.source.type": "JOB",
        "git_dirty": str(code["dirty"]),
        "dataset": lineage.uri,
        "output": public_url(config.output),
        "job": f"train_{name}",
    }
    written = json.loads(storage.read_bytes(storage.join(config.output, CONFIG)))
    tracking.begin(config.output, f"headray-{name}", flat, tags, lineage, written)
    return {
        "store": tracking.find_store(config.output, submitted()),
        "model_name": f"headray-{name}",
        "card": {"model": name, "dataset": dataclasses.asdict(lineage), "code": code}
        | stage_of(written["config"]),
    }


def stage_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle's card says of a training in stages, from the configuration as it is written; of others nothing."""
    return {name: config["learner"][name] for name in ("stage",) if name in config["learner"]}


def require_reach(cluster: ClusterConfig) -> None:
    """End with 2 when workers may run where they cannot reach this machine's files, in which MLflow would record."""
    import ray

    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    own = next(node["Resources"] for node in nodes if node["NodeID"] == here)
    needed = max(cluster.num_workers, 1) * max(cluster.cpus_per_worker, 1)
    gpus = cluster.num_workers if cluster.gpu == "yes" else 0
    if len(nodes) > 1 or own.get("CPU", 0) < needed or own.get("GPU", 0) < gpus:
        usage(
            "MLFLOW_TRACKING_URI is not set, and workers on other machines cannot reach files on this one; start an MLflow "
            'server and set it (ray job submit --runtime-env-json \'{"env_vars": {"MLFLOW_TRACKING_URI": ...}}\')'
        )


def close_run(work: Training, status: str = "") -> int:
    """Send what still waits for MLflow, and how the run ended unless its rank 0 said so; returns what must go on waiting."""
    from pipelines import journal

    if not work.store or not (status or tracking.num_pending(work.output)):
        return 0
    tracker = tracking.Tracker(work.output, work.store)
    if status:
        tracker.end(status, int(journal.read_progress(work.output).get("samples_seen", 0)))
    return tracker.close()


def summarise_training(
    work: Training, seconds: float, waiting: int, remarks: Sequence[str]
) -> None:
    """What was made, where it is, what to run next."""
    from pipelines import journal

    say = console.print
    progress = journal.read_progress(work.output)
    say(
        f"{progress['samples_seen']:,} samples, {seconds:,.0f} s now, {progress['seconds']:,.0f} s in all"
    )
    for name, value in sorted(progress["values"].items()):
        if name.startswith(("loss/", "eval/")):
            unit = " dB" if "psnr" in name else ""
            say(f"  {name:<36}{value:.5g}{unit}")
    for remark in remarks:
        say(f"  {remark}")
    bundle = storage.join(work.output, journal.BUNDLE)
    say(f"bundle   {bundle}")
    say(f"preview  {storage.join(bundle, 'preview.png')}")
    if work.store:
        say(f"mlflow   {work.store.show}")
    if work.store and not waiting:
        say(f"registry models:/{work.model_name}@{tracking.CANDIDATE}")
    if waiting:
        say(f"{waiting} records wait for MLflow; the same command sends them when it is back")
    more = again("training.samples", 2 * work.config.samples)
    say(f"go on    {more}")


def log_made(
    store: tracking.Store,
    job: str,
    config: Any,
    code: Mapping[str, Any],
    numbers: Mapping[str, float],
) -> str:
    """Record in MLflow what a job has made. The work is done by then: a store that is gone is told of and no failure.

    Args:
        store: that :func:`pipelines.tracking.require` passed before the work.
        job: its name.
        config: of the job, a dataclass.
        code: of :func:`code_version`.
        numbers: metrics.

    Returns:
        what to say after ``mlflow``.
    """
    told = public(dataclasses.asdict(config))
    tags = tags_of(job, config.output, code["commit"])
    try:
        with tracking.open_run(store, f"headray-{job}", flatten(told), tags) as run:
            run.metrics(numbers)
            run.record({"config": told, "code": code}, "config.json")
    except TrackingError as error:
        return f"not recorded: {error}"
    return store.show


def tags_of(job: str, output: str, commit: str) -> dict[str, str]:
    """Of the MLflow run of a job that makes one thing in one go, named after where it is."""
    name = run_name(public_url(output))
    return tracking.run_tags(name, f"jobs/{job}.py", commit, git_commit=commit) | {"job": job}


def run_name(uri: str) -> str:
    """The last two parts of a URI: folders are often called ``dataset``."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def fetch_bundle(uri: str, output: str, name: str) -> str:
    """A bundle where all workers can read it: one of the registry is copied to ``OUTPUT/work/NAME``, once, so that a run goes on
    with what it began with; others stay where they are."""
    if not uri.startswith("models:/"):
        return uri
    from models import bundle  # torch: not for every job

    place = storage.join(output, WORK, name)
    if not storage.exists(storage.join(place, bundle.CONFIG)):
        found = tracking.find_bundle(uri)
        for file in (bundle.MODEL, bundle.CARD, bundle.PREVIEW, bundle.CONFIG):
            content = storage.read_bytes(storage.join(found, file))
            storage.write_atomic(storage.join(place, file), content)
    return place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What jobs/calibrate.py measures: how much each layer counts when features are compared."""

    vgg: str
    """Network, or ``none``."""
    vgg_layers: tuple[str, ...]
    vgg_weights: tuple[float, ...]
    """λ_l, one a layer."""
    identity: str = ""
    """Identity network of an Aligner."""
    identity_weights: tuple[float, ...] = ()
    """λ_l, one a stage."""


def read_calibration(uri: str) -> Calibration:
    """A file of jobs/calibrate.py; anything else is usage."""
    uri = location("calibration", uri)
    try:
        told = json.loads(storage.read_bytes(uri))
        return Calibration(
            vgg=told["vgg"],
            vgg_layers=tuple(told["vgg_layers"]),
            vgg_weights=tuple(told["vgg_weights"]),
            identity=told["identity"],
            identity_weights=tuple(told["identity_weights"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        usage(f"--calibration {uri}: not a file of jobs/calibrate.py ({error!r})")
