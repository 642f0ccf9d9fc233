"""The loop that every model trains in, and its launch on Ray Train. The only file that imports ``ray.train``.

    run (driver) ──▶ TorchTrainer ──▶ fit on every worker: batch → learner.train_step → log → evaluate → checkpoint
                                        rank 0: OUTPUT/checkpoints, OUTPUT/tracking (MLflow), OUTPUT/progress.json

The step belongs to the learner, the rest is here (after torchtune's recipes, which share the loop and never the step).
Progress counts samples, so that a run may go on with another number of workers; every draw is a function of (seed,
samples_seen, rank), so that a run that was killed ends with the numbers of one that was not.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from models.frozen.weights import WeightsError
from models.updates import NonFiniteLossError
from pipelines import checkpoints, health, nodes, storage, tracking
from pipelines.journal import Journal
from pipelines.output import CONFIG, WORK, ConfigError, NothingUsableError
from pipelines.shards import DatasetError

RESIZE_SECONDS = 60.0
"""Between two looks whether more workers could join, where their number may change."""

OPERATIONAL = (
    "output",
    "cluster.",
    "health.",
    "training.samples",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "learner.schedule.epochs",
)
"""Fields, or beginnings of their names, that an unfinished or finished run may change and go on."""


NOT_EVALUATED: tuple[dict[str, float], Tensor | None] = ({}, None)


class Batch(Protocol):
    """What a learner is given: tensors, and the keys of the samples they come from."""

    @property
    def keys(self) -> list[str]: ...

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Any: ...

    def __len__(self) -> int: ...


B = TypeVar("B", contravariant=True)


class Learner(Protocol[B]):
    """A model with its losses and optimizers. Structural: models know nothing of this file."""

    @property
    def networks(self) -> nn.ModuleDict:
        """Trained networks and their averages by name, without DDP's wrapper: what a checkpoint holds."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """By name."""
        ...

    @property
    def preview_columns(self) -> tuple[str, ...]:
        """What :meth:`preview` shows from left to right."""
        ...

    def train_step(self, batch: B, samples_seen: int) -> dict[str, Tensor]:
        """A whole update. Returns ``loss/...`` and ``norm/...`` as detached scalars."""
        ...

    def eval_step(self, batch: B) -> dict[str, Tensor]:
        """Metrics of a held-out batch."""
        ...

    def preview(self, batch: B) -> Tensor:
        """(b, 3, h, w * k) in [-1, 1]: for each sample, k pictures side by side."""
        ...

    def export(self) -> nn.Module:
        """The network to hand on: averaged weights, eval mode."""
        ...


class Build(Protocol):
    """How a worker makes its learner; ``wrap`` goes around each trained network."""

    def __call__(
        self, *, wrap: Callable[[nn.Module], nn.Module], device: torch.device
    ) -> Learner[Any]: ...


class Batches(Protocol):
    """This rank's share of every global batch, from the one that begins at ``samples_seen``; all shares are equal."""

    def __call__(self, *, samples_seen: int, rank: int, world_size: int) -> Iterable[Any]: ...


class HeldOut(Protocol):
    """This rank's share of the batches of every evaluation, the same each time."""

    def __call__(self, *, rank: int, world_size: int) -> Iterable[Any]: ...


class Film(Protocol):
    """What rank 0 shows of each evaluation beside the preview: an mp4."""

    def __call__(self, *, learner: Learner[Any], device: torch.device) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, and how often what. Everything is counted in samples, over all workers."""

    samples: int = 1_000_000
    """Samples to train on. A larger number on the same output goes on."""
    log_every: int = 500
    """Samples between two records of the metrics."""
    evaluate_every: int = 20_000
    """Samples between two evaluations with their preview."""
    checkpoint_every: int = 10_000
    """Samples between two checkpoints: what a crash may cost."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay."""
    seed: int = 0
    """Of weights and noise."""

    def __post_init__(self) -> None:
        for name in ("samples", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The workers."""

    num_workers: int = 1
    """Processes that train together, one GPU each if there are GPUs. 0, or 1 without a cluster: in the job's own process."""
    min_workers: int = 0
    """Fewest workers to begin or to go on with while the others are not to be had; when they are, they join at the next
    checkpoint's samples. The numbers then are not to the last digit those of a fixed number. 0: always num_workers."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """auto: if the cluster has any now. yes: wait for them, so that an autoscaling cluster starts machines."""
    cpus_per_worker: int = 0
    """CPUs of a worker; 0: as many as its machines have for each of them."""
    max_failures: int = 3
    """Times that lost workers are replaced, from the last checkpoint, before the job ends."""
    price_per_worker_hour: float = 0.0
    """Cost of one worker for an hour in your currency, for the forecast; 0: not shown."""

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.cpus_per_worker < 0 or self.max_failures < 0:
            raise ValueError(
                f"num_workers, cpus_per_worker and max_failures cannot be negative, got {self.num_workers}, "
                f"{self.cpus_per_worker}, {self.max_failures}"
            )
        if not 0 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers: 0 <= min_workers <= num_workers, got {self.min_workers} and {self.num_workers}"
            )

    def require_divides(self, batch_size: int, accumulate: int) -> None:
        """Every number of workers that there may be gets a share of the batch, and each share can be accumulated.

        Raises:
            ValueError: if not.
        """
        for count in range(self.min_workers or self.num_workers, self.num_workers + 1):
            if count and batch_size % count:
                raise ValueError(
                    f"a batch of {batch_size} cannot be divided among {count} workers, which cluster.min-workers "
                    f"{self.min_workers} and cluster.num-workers {self.num_workers} allow"
                )
            share = batch_size // max(count, 1)
            if share % accumulate:
                raise ValueError(
                    f"--learner.accumulate {accumulate} must divide a worker's {share} samples"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training job is told; each adds its learner and its samples."""

    dataset: str
    """Published dataset: a folder or fsspec URI."""
    output: str
    """Where checkpoints, the bundle and what is recorded go: a folder or fsspec URI that all workers can write. Running
    again on the same output goes on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, how often what."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The workers."""
    health: health.HealthConfig = field(default_factory=health.HealthConfig)
    """When to warn."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything a worker needs; made of importable functions and plain values, because it travels."""

    output: str
    """Folder or URI that all workers can write."""
    build: Build
    batches: Batches
    held_out: HeldOut
    config: TrainingConfig
    film: Film | None = None
    """For models of motion, which stills do not show."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    health: health.HealthConfig = field(default_factory=health.HealthConfig)
    store: tracking.Store | None = None
    """Of MLflow; :func:`tracking.begin` was called. None: recorded nowhere."""
    model_name: str = "headray"
    """Of the registered model in MLflow."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What the bundle's card says beside the samples and scores."""
    use_gpu: bool = False
    """Set by :func:`run`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended."""

    samples_seen: int
    values: dict[str, float]
    """Last record of every metric."""
    stopped: str = ""
    """Why it ended before its time: losses and samples that were not finite."""


def run(training: Training) -> Outcome:
    """Train, or go on, until ``config.samples``. Ray must be connected unless :func:`is_local`.

    Raises:
        NothingUsableError: a loss was not finite.
        ray.train.TrainingFailedError: workers were lost, or failed, more often than ``max_failures``.
    """
    cluster = training.cluster
    local = is_local(cluster)
    use_gpu = uses_gpu(cluster)
    training = Training(**{**vars(training), "use_gpu": use_gpu})
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    trainer = ray.train.torch.TorchTrainer(
        fit,  # type: ignore[arg-type]  # returns a value, as Train's version 2 allows
        train_loop_config={"training": training},
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # of version 2
            num_workers=0 if local else _group_size(cluster),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=use_gpu and not local,
            resources_per_worker=None if local else _resources(cluster, use_gpu),
        ),
        run_config=_run_config(training, local),
    )
    try:
        outcome: Outcome = trainer.fit().return_value  # type: ignore[attr-defined]  # of version 2
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            reason = getattr(failure, "_base_exc", failure)  # Ray wraps it and offers no other way
            if isinstance(reason, ConfigError | DatasetError | WeightsError):
                raise reason from None
        raise
    if outcome.stopped:
        raise NothingUsableError(
            f"{outcome.stopped} after {outcome.samples_seen:,} samples; look at these samples, or lower the learning rate on a "
            f"new --output; {training.output} keeps the last checkpoint"
        )
    return outcome


def is_local(cluster: ClusterConfig) -> bool:
    """Whether the training runs in the job's own process: no second worker and no cluster asked for."""
    has_cluster = os.environ.get("RAY_ADDRESS", "local") != "local"
    return cluster.num_workers == 0 or (cluster.num_workers == 1 and not has_cluster)


def uses_gpu(cluster: ClusterConfig) -> bool:
    """Whether each worker trains on a GPU of its own. Ray must be connected unless :func:`is_local`."""
    return cluster.gpu == "yes" or (cluster.gpu == "auto" and _has_gpu(is_local(cluster)))


def require_room(cluster: ClusterConfig, patience: float = 0.0) -> None:
    """Raises :class:`ConfigError` when workers ask for more than will ever be there: Ray would wait for it without end.

    Args:
        cluster: what is asked for. Ray must be connected unless :func:`is_local`.
        patience: seconds to wait for nodes that may be joining a cluster which nothing else makes grow.
    """
    if is_local(cluster):
        if cluster.gpu == "yes" and not torch.cuda.is_available():
            raise ConfigError(
                "--cluster.gpu yes: torch finds no GPU on this machine (nvidia-smi tells whether the driver does); auto trains "
                "on its CPU"
            )
        return
    if nodes.may_grow():
        return
    least = cluster.min_workers or cluster.num_workers
    if not nodes.become(lambda: _room(cluster) >= least, patience):
        cpus = f"{cluster.cpus_per_worker or 1} CPUs"
        wanted = f"{cpus} and a GPU" if uses_gpu(cluster) else cpus
        machines = _machines()
        there = ", ".join(f"{has_cpus} CPUs and {has_gpus} GPUs" for has_cpus, has_gpus in machines)
        flag = "min" if cluster.min_workers else "num"
        raise ConfigError(
            f"--cluster.{flag}-workers {least}, each with {wanted} (--cluster.cpus-per-worker, --cluster.gpu {cluster.gpu}): there "
            f"is room for {_room(cluster)} (nodes: {there}); fewer workers, or on CPUs with --cluster.gpu no"
        )


def _room(cluster: ClusterConfig) -> int:
    """Workers that the nodes of now can take."""
    cpus, use_gpu = cluster.cpus_per_worker or 1, uses_gpu(cluster)
    return sum(
        min(has_cpus // cpus, has_gpus) if use_gpu else has_cpus // cpus
        for has_cpus, has_gpus in _machines()
    )


def _machines() -> list[tuple[int, int]]:
    """CPUs and GPUs of each node."""
    return [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in nodes.alive()
    ]


def _has_gpu(local: bool) -> bool:
    return torch.cuda.is_available() if local else any(gpus for _, gpus in _machines())


def _group_size(cluster: ClusterConfig) -> int | tuple[int, int]:
    """How many workers there must be, or from how many to how many."""
    return (
        (cluster.min_workers, cluster.num_workers) if cluster.min_workers else cluster.num_workers
    )


def _resources(cluster: ClusterConfig, use_gpu: bool) -> dict[str, float]:
    cpus = cluster.cpus_per_worker or share_of_cpus(_machines(), cluster.num_workers, use_gpu)
    return {"CPU": float(cpus)} | ({"GPU": 1.0} if use_gpu else {})


def share_of_cpus(machines: Sequence[tuple[int, int]], num_workers: int, use_gpu: bool) -> int:
    """The most CPUs that each of so many workers can have.

    Args:
        machines: CPUs and GPUs of each; those without a GPU do not count when workers need one.
        num_workers: that must find room together.
        use_gpu: whether each needs a GPU.

    Returns:
        1 where they find no room now, so that an autoscaling cluster can start any machine for them.
    """
    for cpus in range(max((cpus for cpus, _ in machines), default=1), 1, -1):
        rooms = [min(each // cpus, gpus) if use_gpu else each // cpus for each, gpus in machines]
        if sum(rooms) >= num_workers:
            return cpus
    return 1


def _run_config(training: Training, local: bool) -> ray.train.RunConfig:
    """Ray's own files go to ``OUTPUT/work/ray``, through fsspec: any URI that the rest of the job can use."""
    if local:
        return ray.train.RunConfig(name="ray")
    import pyarrow.fs

    fs, path = storage.filesystem(storage.join(training.output, WORK))
    return ray.train.RunConfig(
        name="ray",
        storage_path=path,
        storage_filesystem=None
        if isinstance(fs, LocalFileSystem)
        else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
        failure_config=ray.train.FailureConfig(max_failures=training.cluster.max_failures),
    )


def fit(settings: dict[Any, Any]) -> Outcome:
    """A worker: build, resume, train, export. All ranks do the same except that rank 0 writes.

    Raises:
        ConfigError: the output is not shared, or its newest checkpoint is damaged.
    """
    training: Training = settings["training"]
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device() if training.use_gpu else torch.device("cpu")
    if not storage.exists(storage.join(training.output, CONFIG)):
        raise ConfigError(
            f"--output {training.output} is not to be seen from every worker; give a folder that all machines share, or s3://"
        )

    reseed(training.config.seed, 0, 0)  # the same weights everywhere
    learner = training.build(
        wrap=lambda network: ray.train.torch.prepare_model(network, move_to_device=device),
        device=device,
    )
    newest = checkpoints.newest(training.output)
    samples_seen, notes = 0, {}
    if newest:
        content = checkpoints.read(newest)
        checkpoints.restore(content, learner)
        samples_seen, notes = content["samples_seen"], content["notes"]

    journal = Journal(training, notes, samples_seen) if rank == 0 else None
    try:
        samples_seen, stopped = _loop(training, learner, journal, samples_seen, device)
        if journal and not stopped:
            journal.export(learner, samples_seen)
    finally:
        if journal:
            journal.close()
    values = journal.values if journal else {}
    return Outcome(samples_seen=samples_seen, values=values, stopped=stopped)


def _loop(
    training: Training,
    learner: Learner[Any],
    journal: Journal | None,
    samples_seen: int,
    device: torch.device,
) -> tuple[int, str]:
    """Steps until the end; returns the samples seen, and why it stopped before."""
    config, context = training.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if samples_seen == 0:  # what is broken in an evaluation shows before hours are spent
        evaluated, preview = evaluate(training, learner, device, 0)
        if journal:
            journal.write(0, {}, evaluated, preview, learner.preview_columns)
            journal.film(learner, device, 0)
    meter = Meter(device, world_size, samples_seen)
    for batch in steps(training, samples_seen, rank, world_size, meter):
        reseed(config.seed, samples_seen, rank)
        try:
            metrics = learner.train_step(batch.to(device, non_blocking=True), samples_seen)
        except NonFiniteLossError as error:  # on every rank
            return samples_seen, " | ".join(_gather(str(error)))
        meter.add(metrics)
        before, samples_seen = samples_seen, samples_seen + len(batch) * world_size
        due = Due(config, before, samples_seen)
        values = meter.read(samples_seen) if due.log else {}
        evaluated, preview = (
            evaluate(training, learner, device, samples_seen) if due.evaluate else NOT_EVALUATED
        )
        if journal and values:
            journal.write(samples_seen, values, evaluated, preview, learner.preview_columns)
        if journal and due.evaluate:
            journal.film(learner, device, samples_seen)
        if due.checkpoint:
            if journal:
                journal.checkpoint(learner, samples_seen)
            ray.train.report({"samples_seen": samples_seen})  # every rank waits for rank 0
    return samples_seen, ""


def steps(
    training: Training, samples_seen: int, rank: int, world_size: int, meter: Meter
) -> Iterator[Any]:
    """The batches of the steps that are left; waiting for them is on the meter."""
    total = training.config.samples
    if samples_seen >= total:
        return
    batches = iter(training.batches(samples_seen=samples_seen, rank=rank, world_size=world_size))
    while samples_seen < total:
        with meter.waiting():
            batch = next(batches)
        yield batch
        samples_seen += len(batch) * world_size


@dataclass(frozen=True)
class Due:
    """What comes after a step: whatever lies between the samples before it and after it, and everything at the end."""

    config: TrainingConfig
    before: int
    now: int

    def _crossed(self, every: int) -> bool:
        return self.now // every > self.before // every or self.now >= self.config.samples

    @property
    def log(self) -> bool:
        """Also with each checkpoint, so that a resumed run's meter starts where the first one's did, and each evaluation."""
        return self._crossed(self.config.log_every) or self.checkpoint or self.evaluate

    @property
    def evaluate(self) -> bool:
        return self._crossed(self.config.evaluate_every)

    @property
    def checkpoint(self) -> bool:
        return self._crossed(self.config.checkpoint_every)


def reseed(seed: int, samples_seen: int, rank: int) -> None:
    """Every generator from (seed, samples_seen, rank): the state of random numbers is a function of the progress."""
    words = np.random.SeedSequence((seed, samples_seen, rank)).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002
    random.seed(int(words[1]))


@torch.no_grad()
def evaluate(
    training: Training, learner: Learner[Any], device: torch.device, samples_seen: int
) -> tuple[dict[str, float], Tensor | None]:
    """Means of ``eval_step`` over all held-out batches of all ranks, and the preview of this rank's first batch."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    reseed(training.config.seed, samples_seen, rank)
    meter = Meter(device, world_size)
    preview = None
    for number, held_out in enumerate(training.held_out(rank=rank, world_size=world_size)):
        batch = held_out.to(device)
        meter.add(learner.eval_step(batch))
        if number == 0:
            preview = learner.preview(batch).cpu()
    return {f"eval/{name}": value for name, value in meter.means().items()}, preview


class Meter:
    """Sums metrics on the device and reduces them over ranks when read: one transfer for all, not one for each step."""

    def __init__(self, device: torch.device, world_size: int, samples_seen: int = 0) -> None:
        self.device = device
        self.world_size = world_size
        self._reset(samples_seen)

    def _reset(self, samples_seen: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._waited = 0.0
        self._samples = samples_seen
        self._started = time.perf_counter()

    def waiting(self) -> _Waiting:
        """Context of waiting for a batch. On a GPU its earlier work goes on meanwhile: the share is an upper bound."""
        return _Waiting(self)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Metrics of one step."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over steps and ranks."""
        return self._reduce({})[0]

    def read(self, samples_seen: int) -> dict[str, float]:
        """Means over steps and ranks since the last reading, speed, and the worst rank's wait and memory."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        own = {"speed/data_wait": self._waited / elapsed}
        if self.device.type == "cuda":
            own["memory/gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        means, worst = self._reduce(own)
        speed = {"speed/samples_per_second": (samples_seen - self._samples) / elapsed}
        self._reset(samples_seen)
        return means | worst | speed

    def _reduce(self, own: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the sums, and the largest of each rank's ``own``."""
        names = sorted(self._sums)
        row = [self._sums[name].to(self.device) / self._counts[name] for name in names]
        row += [
            torch.tensor(value, dtype=torch.float64, device=self.device) for value in own.values()
        ]
        if not row:
            return {}, {}
        rows = torch.stack(row).unsqueeze(0)  # (1, n)
        if self.world_size > 1:
            gathered = rows.new_empty(self.world_size, rows.shape[1])
            distributed.all_gather_into_tensor(gathered, rows)
            rows = gathered  # (world_size, n)
        means = dict(zip(names, rows.mean(dim=0).tolist(), strict=False))
        worst = rows.amax(dim=0).tolist()
        return (
            {name: means[name] for name in self._sums},  # in the learner's order, which people read
            dict(zip(own, worst[len(names) :], strict=True)),
        )


class _Waiting:
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter._waited += time.perf_counter() - self._began


def _gather(text: str) -> list[str]:
    """What each rank says, without those who only heard it from another."""
    texts: list[Any] = [text]
    if distributed.is_initialized():
        texts = [None] * distributed.get_world_size()
        distributed.all_gather_object(texts, text)
    return sorted({each for each in texts if "another rank" not in each})
