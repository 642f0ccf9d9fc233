"""Stages 1–8 chained into one Ray Data plan: a list of videos becomes a published dataset. The data half starts here.

    voxceleb.read_list → download → tracks → crops → identities (embed) → quality → annotate → shards (commit)
        → quality (copies) → identities (filter, split) → shards (pack) → index, ledger, report → dataset.json

Everything may be killed at any time: committed videos are skipped by the next run of the same command, and what is
published depends on the commits only. A row is a video until it is committed, then a shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from models.frozen import weights
from pipelines import (
    annotate,
    archive,
    crops,
    download,
    identities,
    memory,
    quality,
    report,
    shards,
    storage,
    tracks,
    voxceleb,
)
from pipelines.output import ConfigError, NothingUsableError, flatten, require_same_recipe
from pipelines.progress import Progress
from pipelines.schema import (
    OFF_GPU_NODES,
    SCHEMA_VERSION,
    VIDEOS_IN_FLIGHT,
    Video,
    batched,
    one_line,
    to_row,
)
from pipelines.shelf import Shelf, places, quoted

if TYPE_CHECKING:
    from ray.data import Dataset

UNNEEDED = storage.join(shards.WORK, "unneeded")
"""A file that says that everything in the work folder is published and may go."""

OPERATIONAL = (
    "input",
    "output",
    "keep_work",
    "window",
    "videos_per_block",
    "max_attempts",
    "plan",
    "plan_videos",
    "stop_after",
    "replay",
    "crops.videos_at_once",
    "identities.videos_at_once",
    "annotate.videos_at_once",
    "tracks.decoder.deadline_seconds",
    "tracks.decoder.videos_per_child",
)
"""Fields that change how a run goes but not what it makes; neither does any ``resources``."""

YOUNGER = {"annotate.pupils": "none"}
"""Fields that outputs of earlier versions lack in their config.json, with the value that makes what those versions made. Only
fields that have such a value belong here: an output that lacks another field is refused."""

VIDEOS_AT_ONCE = 500
"""Videos of the list that the driver holds as objects."""

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("record", pa.string()),
        ("names", pa.list_(pa.string())),
        ("blobs", pa.list_(pa.binary())),
    ]
)
"""Of :class:`pipelines.schema.VideoRow` as Arrow keeps it."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """A list of videos → a published dataset of face crops."""

    input: str
    """List of videos: a folder, zip, table or fsspec URI (VoxCeleb metadata, csv/parquet/jsonl, or a folder of
    IDENTITY/VIDEO.mp4)."""
    output: str
    """Dataset to make: a folder or fsspec URI (s3://bucket/name). Running again on the same output resumes."""
    input_format: voxceleb.ListFormat = "auto"
    """Form of the list; auto looks at it and decides."""
    download: download.DownloadConfig = field(default_factory=download.DownloadConfig)
    """Fetching the videos."""
    tracks: tracks.TracksConfig = field(default_factory=tracks.TracksConfig)
    """Finding one person's face through a span without a cut."""
    crops: crops.CropsConfig = field(default_factory=crops.CropsConfig)
    """Landmarks and windows."""
    identities: identities.IdentitiesConfig = field(default_factory=identities.IdentitiesConfig)
    """Embedding, identity filter and split."""
    quality: quality.QualityConfig = field(default_factory=quality.QualityConfig)
    """Head pose; which frames, tracks and copies are worth keeping."""
    annotate: annotate.AnnotateConfig = field(default_factory=annotate.AnnotateConfig)
    """Face parsing, and pupils."""
    shards: shards.ShardsConfig = field(default_factory=shards.ShardsConfig)
    """Packing."""
    keep_work: bool = False
    """Keep OUTPUT/work (downloads and one part per video) after publication; needed to add videos later."""
    window: int = 2000
    """Videos per Ray Data plan, at most 5000: bounds the memory of driver and object store for any list."""
    videos_per_block: int = 1
    """Videos that travel together from stage to stage. 1 where a video takes seconds; 10 to 50 for lists of short clips,
    or whose videos are mostly gone: a block costs the driver 30 ms, which is then the bottleneck."""
    max_attempts: int = 3
    """Runs that try a video whose failure may pass (rate limits, network) before it is left as failed."""
    plan: bool = False
    """Only forecast: ask about a sample of the list, print survivors, gigabytes and hours, fetch and write nothing."""
    plan_videos: int = 20
    """Videos that --plan asks about."""
    stop_after: Literal["", "download", "tracks", "crops", "identities", "quality"] = ""
    """For work on one stage: run all videos up to and with this one, save the rows below OUTPUT/work/rows, publish
    nothing."""
    replay: Literal["", "tracks", "crops", "identities", "quality", "annotate"] = ""
    """For work on one stage: run it alone on the rows that --stop-after saved for it, with any configuration, and print
    what it changed."""

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 5000:
            raise ValueError(f"window must be between 1 and 5000 videos, got {self.window}")
        if self.videos_per_block < 1:
            raise ValueError(f"videos_per_block must be at least 1, got {self.videos_per_block}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.plan_videos < 1:
            raise ValueError(f"plan_videos must be at least 1, got {self.plan_videos}")
        if self.plan + bool(self.stop_after) + bool(self.replay) > 1:
            raise ValueError("plan, stop_after and replay are three different things: give one")
        if self.crops.smooth and self.tracks.frames_per_second:
            raise ValueError(
                "crops.smooth needs every frame: set tracks.frames_per_second to 0, not "
                f"{self.tracks.frames_per_second:g}"
            )

    @property
    def stages(self) -> tuple[Any, ...]:
        """Configurations of the stages that run as actor pools, in order."""
        return (
            self.download,
            self.tracks,
            self.crops,
            self.identities,
            self.quality,
            self.annotate,
            self.shards,
        )

    @property
    def minimum_cpus(self) -> float:
        """Logical CPUs below which the plan cannot start: every pool at its least, plus one for tasks."""
        return 1 + sum(
            max(stage.resources.min_actors, 1) * stage.resources.num_cpus for stage in self.stages
        )

    @property
    def flat(self) -> dict[str, Any]:
        """All fields (``download.min_height``), without secrets."""
        return flatten(download.public(dataclasses.asdict(self)))

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the configuration that decides what the dataset contains, flat."""
        flat = {}
        for name, value in self.flat.items():
            operational = name in OPERATIONAL or ".resources." in name
            if not operational and name not in download.OPERATIONAL:
                flat[name] = value
        return flat


SHARES = {
    "download": 0.17,
    "tracks": 0.23,
    "crops": 0.18,
    "identities": 0.29,
    "quality": 0.0,
    "annotate": 0.13,
    "shards": 0.0,
}
"""Of each stage in the CPU time that a video takes, with the networks that come in wheels (benchmarks/README.md). 0: less than
one in a hundred."""
PROCESSES_A_CORE = 1.5
"""An actor waits now and then for the stage before it, or behind it."""


def on_one_machine(config: PreprocessConfig, cores: int) -> PreprocessConfig:
    """Pools for a machine that works for this job alone: each stage has its share of the cores from the beginning.

    Left to grow, the pools of a small machine never came to rest: each new actor costs seconds for its networks, and was
    ended when the next stage wanted its place. Stages that cost next to nothing keep their one actor; those on a GPU are not
    sized by cores.
    """
    sized = {}
    for name, share in SHARES.items():
        stage = getattr(config, name)
        pool = stage.resources
        if not (pool.min_actors or pool.first_actors or pool.num_gpus):
            actors = math.ceil(PROCESSES_A_CORE * share * cores) or 1
            most = stage.resources.max_actors if share else 1
            resources = replace(stage.resources, min_actors=min(actors, most), max_actors=most)
            stage = replace(stage, resources=resources)
        sized[name] = stage
    return replace(config, **sized)


def on_fixed_cluster(config: PreprocessConfig, rooms: Sequence[float]) -> PreprocessConfig:
    """Pools for a cluster that cannot grow: they begin with all its CPUs and keep what would fit if its largest node were lost.

    Left to grow, they never come to rest (see :func:`on_one_machine`). If they kept everything, a stage whose actors were all on
    a node that is lost would find no place to start them again. Pools that the user sized stay as they are.

    Args:
        config: of the run.
        rooms: logical CPUs of each node on which stages without a GPU may run.
    """
    first = share_out(config, sum(rooms))
    left = sorted(rooms)[: max(len(rooms) - 1, 1)]
    least = share_out(config, sum(left) - len(left))  # a CPU of each node for what does not pack
    sized = {}
    for name, count in first.items():
        stage = getattr(config, name)
        if not (stage.resources.min_actors or stage.resources.first_actors):
            pool = replace(stage.resources, min_actors=least[name], first_actors=count)
            stage = replace(stage, resources=pool)
        sized[name] = stage
    return replace(config, **sized)


def share_out(config: PreprocessConfig, cpus: float) -> dict[str, int]:
    """Actors of each stage: one, or what the user wants, then every further CPU to the stage that is the bottleneck."""
    pools = {name: getattr(config, name).resources for name in SHARES}
    actors = {name: max(pool.min_actors, pool.first_actors, 1) for name, pool in pools.items()}
    free = cpus - sum(count * pools[name].num_cpus for name, count in actors.items())

    def grows(name: str) -> bool:
        pool = pools[name]
        sized = pool.min_actors or pool.first_actors or pool.num_gpus
        return bool(SHARES[name]) and not sized and actors[name] < pool.max_actors

    while growing := [name for name in SHARES if grows(name)]:
        bottleneck = max(growing, key=lambda name: SHARES[name] / actors[name])
        free -= pools[bottleneck].num_cpus
        if free < 0:
            break
        actors[bottleneck] += 1
    return actors


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run made, for the summary, the report and MLflow."""

    manifest: dict[str, Any]
    seconds: float
    stage_seconds: dict[str, float]
    """Summed over all videos this run worked on."""
    new_videos: int
    retryable: int
    """Failed videos that the next run of the same command tries again."""


def check(config: PreprocessConfig) -> None:
    """Everything that can be known to be wrong before a cluster is asked for.

    Raises:
        ConfigError: the output holds something else, or a dataset of another recipe.
        models.frozen.weights.WeightsError: a network's file is missing or damaged.
    """
    require_same_recipe(
        config.output, config.recipe, job="preprocess", known=config.flat, neutral=YOUNGER
    )
    check_weights(config)


def check_weights(config: PreprocessConfig) -> None:
    """Raises :class:`models.frozen.weights.WeightsError` if a network's file is missing or damaged."""
    for name in (
        *tracks.weight_names(config.tracks),
        *crops.weight_names(config.crops),
        *identities.weight_names(config.identities),
        *annotate.weight_names(config.annotate),
    ):
        weights.find(name)


def gpus_needed(config: PreprocessConfig) -> dict[str, float]:
    """Of each stage that will run and wants some: one actor's share, without which Ray would wait without end. More actors may wait."""
    names = list(SHARES)
    if config.replay:
        names = [config.replay]
    elif config.stop_after:
        names = names[: names.index(config.stop_after) + 1]
    shares = {name: getattr(config, name).resources.num_gpus for name in names}
    return {name: share for name, share in shares.items() if share}


def require_gpus(config: PreprocessConfig, there: float) -> None:
    """Raises :class:`ConfigError` when stages ask for more GPUs than the ``there`` that will ever be there."""
    wanted = gpus_needed(config)
    if sum(wanted.values()) > there:
        flags = ", ".join(f"--{name}.resources.num-gpus {share:g}" for name, share in wanted.items())  # fmt: skip
        raise ConfigError(
            f"{flags}: an actor of each needs {sum(wanted.values()):g} GPUs together, and Ray finds {there:g} here and no way to "
            "more; give 0 to run on CPUs, or smaller shares"
        )


def open_list(config: PreprocessConfig) -> Iterator[Video]:
    """The videos of the list, with their files if an archive is to give them.

    Raises:
        voxceleb.ListError: at once if the list cannot be read or is empty, or the archive is not there.
    """
    videos = voxceleb.read_list(
        config.input,
        config.input_format,
        url_template=config.download.url_template,
        allow_local=config.download.allow_local,
        both_sides=config.identities.split == "legacy",
    )
    if config.download.from_downloads:
        videos = archive.take_from(config.download.from_downloads, videos)
    return videos


def build_plan(videos: Iterable[Video], config: PreprocessConfig) -> Dataset:
    """The Ray Data plan of one window of videos; iterating its rows runs it.

    Returns:
        a Dataset of the small rows of :class:`pipelines.shards.Committer`.
    """
    import ray.data

    # Tables, a block at a time: the same videos as Python objects left ten times their size behind with its allocator.
    blocks = [
        pa.Table.from_pylist([to_row(video) for video in block], ROW_SCHEMA)
        for block in batched(videos, config.videos_per_block)
    ]
    dataset: Dataset = ray.data.from_arrow(blocks)
    for add in stage_adders(config).values():
        dataset = add(dataset)
    return shards.add_commits(dataset, config.output, describe_windows(config), config.shards)


def stage_adders(config: PreprocessConfig) -> dict[str, Callable[[Dataset], Dataset]]:
    """By name, in order, what appends each stage between list and commit to a plan over rows of videos."""
    window = quality.Window(size=config.crops.size, columns=crops.SCORE_COLUMNS)
    return {
        "download": partial(
            download.add_downloads, config=config.download, cache=cache_uri(config)
        ),
        "tracks": partial(tracks.add_tracks, config=config.tracks),
        "crops": partial(crops.add_crops, config=config.crops, decoder=config.tracks.decoder),
        "identities": partial(identities.add_embeddings, config=config.identities),
        "quality": partial(quality.add_quality, window=window, config=config.quality),
        "annotate": partial(
            annotate.add_annotations, config=config.annotate, smooth=config.crops.smooth
        ),
    }


def describe_windows(config: PreprocessConfig) -> dict[str, Any]:
    """What a reader must know about the windows of a dataset and what is stored with them."""
    told = crops.describe(config.crops)
    scores = [*told["scores"], *quality.SCORE_COLUMNS]
    return told | {"scores": scores} | annotate.describe(config.annotate)


def cache_uri(config: PreprocessConfig) -> str:
    """Where downloads are kept: ``--download.cache``, else inside the output while it is unfinished."""
    return config.download.cache or storage.join(config.output, shards.WORK, "downloads")


def run(config: PreprocessConfig, videos: Iterable[Video], progress: Progress) -> Outcome:
    """Make, or finish, the dataset of ``config``. Ray must be connected, :func:`check` passed, the output locked.

    Args:
        config: output and input absolute.
        videos: of :func:`open_list`.
        progress: told of each committed video and each packed shard.

    Raises:
        voxceleb.ListError: reading the list broke off.
        ConfigError: the list has changed and the work folder is gone.
        NothingUsableError: nothing passed; ledger and report are written all the same. Or the canary failed.
    """
    started = time.perf_counter()
    prepare(config)
    listed, stage_seconds, new_videos = process(config, videos, progress)
    manifest, retryable = publish(config, listed, progress)
    if not config.keep_work and not retryable:
        drop_work(config.output)
    return Outcome(
        manifest=manifest,
        seconds=time.perf_counter() - started,
        stage_seconds=stage_seconds,
        new_videos=new_videos,
        retryable=retryable,
    )


def prepare(config: PreprocessConfig) -> None:
    """What comes before the first video: what killed runs left goes, and the canary is fetched.

    Raises:
        NothingUsableError: the canary failed.
    """
    configure_ray_data(config)
    storage.remove_temporary(config.output)
    if storage.exists(storage.join(config.output, UNNEEDED)):
        drop_work(config.output)
    if config.download.canary:
        require_canary(config.download)


def drop_work(output: str) -> None:
    """Delete the work folder of a published dataset.

    Half a work folder would look like an unfinished dataset whose other half must be fetched again, perhaps from sites
    that no longer have it. So a mark goes in first and out last, and the next run of a killed one begins with the rest.
    """
    storage.write_atomic(storage.join(output, UNNEEDED), b"")
    for name in ("packed", "parts", "downloads"):
        storage.remove(storage.join(output, shards.WORK, name))
    storage.remove(storage.join(output, shards.WORK))


def configure_ray_data(config: PreprocessConfig) -> None:
    """Block size, progress and time-outs of Ray Data in this process."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # of every pool, where a list is shorter than a pool is large
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        # they print what is raised as well; who catches it tells it once
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 64 * 2**20
    # Ray Data asks the autoscaler for CPUs by number. Without this, those that the CPU nodes' maximum cannot give would start
    # GPU nodes, on which no stage then runs (seen with Ray's fake nodes).
    context.execution_options.label_selector = OFF_GPU_NODES
    context.raise_original_map_exception = True  # so that a PlaceError arrives here as one
    context.autoscaling_config.actor_pool_util_upscaling_threshold = VIDEOS_IN_FLIGHT - 0.5
    patience = download.manners_towards("", config.download).patience_seconds
    deadlines = 3 * config.download.deadline_seconds
    context.execution_no_progress_timeout_s = max(1800, int(deadlines + patience))


def require_canary(config: download.DownloadConfig) -> None:
    """Fetch the canary on a node of the cluster, where the videos will be fetched.

    Raises:
        NothingUsableError: it failed, so the list would too.
    """
    import ray

    needs = ray.remote(num_cpus=config.resources.num_cpus, label_selector=OFF_GPU_NODES)
    fetch = needs(download.fetch_canary)
    canary = ray.get(fetch.remote(config))
    if not canary.live:
        raise NothingUsableError(
            f"the canary {canary.url} could not be fetched: {canary.cause} ({canary.detail}); nothing of the list was tried. "
            "Update yt-dlp, wait, or give another --download.canary"
        )


class Listed:
    """Keys of all videos of the list, and of those that an earlier run has answered for. On disk."""

    def __init__(self) -> None:
        self._shelf = Shelf(
            "CREATE TABLE listed (key PRIMARY KEY, identity) WITHOUT ROWID",
            "CREATE TABLE answered (key PRIMARY KEY, kind) WITHOUT ROWID",
        )

    def __len__(self) -> int:
        return self._count("listed")

    def __iter__(self) -> Iterator[str]:
        """Sorted by identity, and not by key alone: ``a-b`` with ``c`` comes between two videos of ``a``."""
        return self._keys("SELECT key FROM listed ORDER BY identity, key")

    def by_key(self) -> Iterator[str]:
        """Sorted by key."""
        return self._keys("SELECT key FROM listed ORDER BY key")

    def add(self, videos: Iterable[Video]) -> None:
        """Videos of the list; one that is listed twice counts once."""
        rows = ((video.key, video.identity) for video in videos)
        self._shelf.add("INSERT OR REPLACE INTO listed VALUES (?, ?)", rows)

    def answer(self, answers: Iterable[tuple[str, str]]) -> int:
        """(key, ``done``, ``failed`` or ``published``) of videos; how many have an answer by now. The last one counts."""
        self._shelf.add("INSERT OR REPLACE INTO answered VALUES (?, ?)", answers)
        return self._count("answered")

    def answer_for(self, key: str) -> str:
        """What there is for one video; empty: nothing."""
        found = self._shelf.one("SELECT kind FROM answered WHERE key = ?", (key,))
        return str(found[0]) if found else ""

    def lost(self) -> str:
        """The first video that was answered for and is not listed; empty when there is none."""
        query = "SELECT key FROM answered WHERE key NOT IN (SELECT key FROM listed) ORDER BY key"
        found = self._shelf.one(query)
        return str(found[0]) if found else ""

    def _keys(self, query: str) -> Iterator[str]:
        return (key for (key,) in self._shelf.rows(query))

    def _count(self, table: str) -> int:
        (count,) = self._shelf.one(f"SELECT COUNT(*) FROM {table}") or (0,)
        return int(count)


def process(
    config: PreprocessConfig, videos: Iterable[Video], progress: Progress
) -> tuple[Listed, dict[str, float], int]:
    """Run every video of the list that has no commit yet, window by window.

    Returns:
        all videos of the list, seconds by stage summed over the videos run now, and their number.
    """
    listed = Listed()
    has_work = listed.answer(shards.committed(config.output))
    is_over = not has_work and listed.answer(published(config.output))
    seconds: Counter[str] = Counter()
    count = 0
    todo = unanswered(config, videos, listed, progress)
    for first in todo:
        if is_over:
            raise ConfigError(
                f"--output {config.output}: published without {first.key} and its work folder is gone; "
                "make a new --output, and give --keep-work where lists will grow"
            )
        window = itertools.chain((first,), itertools.islice(todo, config.window - 1))
        for row in build_plan(window, config).iter_rows():
            progress.video(row)
            seconds.update(json.loads(row["seconds"]))
            count += 1
        memory.give_back()
    if is_over and (missing := listed.lost()):
        raise ConfigError(
            f"--output {config.output}: published with {missing}, which the list no longer has, and its work "
            "folder is gone; take videos out with jobs/dataset.py takedown, or make a new --output"
        )
    return listed, dict(seconds), count


def unanswered(
    config: PreprocessConfig, videos: Iterable[Video], listed: Listed, progress: Progress
) -> Iterator[Video]:
    """The videos that this run must work on, with the number of this attempt; all others are counted and let go.

    Args:
        config: of the run.
        videos: the list.
        listed: each video is added to it; it holds the answers of earlier runs.
        progress: told of what is known by now, and of what has an answer.
    """
    takedowns = shards.read_takedowns(config.output)
    for some in batched(videos, VIDEOS_AT_ONCE):
        listed.add(some)
        progress.listed(len(listed))
        answers = {video.key: listed.answer_for(video.key) for video in some}
        again = [key for key, kind in answers.items() if kind == "failed"]
        attempts = {
            commit.video.key: commit.video.attempts
            for commit in shards.load_commits(config.output, again)
        }
        todo = [
            video
            for video in some
            if answers[video.key] in ("", "failed")
            and attempts.get(video.key, 0) < config.max_attempts
        ]
        progress.skipped(len(some) - len(todo))
        for video in todo:
            attempt = attempts.get(video.key, 0) + 1
            yield shards.honour(replace(video, attempts=attempt), takedowns)


def published(output: str) -> Iterator[tuple[str, str]]:
    """(key, ``published``) of the videos that a published dataset has an answer for, whatever it is; none before."""
    if storage.exists(storage.join(output, shards.MANIFEST)):
        for batch in shards.ledger_batches(output, ["kind", "key"]):
            for key in batch.filter(pc.equal(batch["kind"], "video"))["key"].to_pylist():
                yield key, "published"


def publish(
    config: PreprocessConfig, listed: Listed, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Filter identities, pack shards, write index, ledger, report and at last the manifest.

    Args:
        config: of the run.
        listed: all videos of the list; each has a commit, or the dataset is already published.
        progress: told of each packed shard.

    Returns:
        the manifest, and how many failed videos the next run will try again.
    """
    output = config.output
    list_sha256 = digest_of(listed.by_key())
    before: dict[str, Any] = {}
    version_before = shards.manifest_version(output)
    if storage.exists(storage.join(output, shards.MANIFEST)):
        before = shards.read_manifest(output)
        if before["list_sha256"] == list_sha256 and not any(shards.committed(output)):
            return before, 0
    made = pack(config, listed, before.get("buckets", {}), progress)
    memory.give_back()
    tally, retryable = account(config, listed, made)
    memory.give_back()
    records = made.records
    listing = [
        {
            "name": record["name"],
            "split": record["split"],
            "bytes": record["bytes"],
            "sha256": record["sha256"],
            "samples": record["samples"],
        }
        for record in records
    ]
    changed = before.get("shards") != listing
    indexed = (
        shards.index_table(shards.packed_record(record["digest"], output)) for record in records
    )
    manifest = {
        "format": "headray",
        "schema_version": SCHEMA_VERSION,
        "dataset_version": before.get("dataset_version", 0) + changed,
        "config": config.recipe,
        "list_sha256": list_sha256,
        "counts": tally.counts(),
        "splits": tally.splits(),
        "members": describe_windows(config) | identities.describe(config.identities),
        "twins": [
            [pair.one, pair.other, pair.cosine]
            for pair in made.twins
            if pair.one in made.splits and pair.other in made.splits
        ],
        "buckets": made.buckets,
        "shards": listing,
        "index": shards.write_index_tables(indexed, output) if records else {},
        "tools": tool_versions(),
    }
    memory.give_back()
    report.write(output, manifest)
    if not records:
        causes = manifest["counts"]["causes"]["videos"]
        reasons = ", ".join(
            f"{count} × {cause}{tally.example(cause)}" for cause, count in causes.items()
        )
        raise NothingUsableError(
            f"all {len(listed)} videos were rejected ({reasons}); see {storage.join(output, report.PAGE)}"
        )
    shards.write_manifest(manifest, output, version_before)
    named = {shard["name"] for shard in listing}
    for name in storage.names_below(storage.join(output, "shards")):
        if name not in named:
            storage.remove(storage.join(output, "shards", name))
    return manifest, retryable


def account(config: PreprocessConfig, listed: Listed, made: Packed) -> tuple[Tally, int]:
    """Write the ledger: a row for every video of the list and every track, with what was decided of it.

    Args:
        config: of the run.
        listed: all videos of the list; each has a commit.
        made: what was decided of the samples.

    Returns:
        the counts of all rows, and how many failed videos the next run will try again.
    """
    tally = Tally()
    retryable = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal retryable
        for commit in shards.load_commits(config.output, listed.by_key()):
            video = commit.video
            retryable += video.state == "failed" and video.attempts < config.max_attempts
            for row in shards.ledger_rows(commit, decisions(commit, made.splits, made.gone)):
                yield tally.see(row)

    shards.write_ledger(rows(), config.output)
    return tally, retryable


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What is decided of the samples, and the shards that hold those that stay."""

    splits: dict[str, str]
    """Of :func:`pipelines.identities.settle`."""
    gone: identities.Reasons
    twins: list[identities.Twins]
    buckets: dict[str, int]
    """Number of shards by split."""
    records: list[dict[str, Any]]
    """Of :func:`pipelines.shards.pack_all`, sorted by name."""


def pack(
    config: PreprocessConfig, listed: Listed, buckets: Mapping[str, int], progress: Progress
) -> Packed:
    """Filter identities and pack shards. What only these need, means and where each sample lies, is let go with them.

    Args:
        config: of the run.
        listed: all videos of the list; each has a commit.
        buckets: number of shards by split of an earlier publication.
        progress: told of each packed shard.
    """
    output = config.output
    samples, copies, means = gather(shards.load_commits(output, listed), config)
    twins = identities.find_twins(means, config.identities.twin_threshold)
    splits, gone = identities.settle(samples, copies, twins, config.identities)
    memory.give_back()
    plans, buckets = shards.plan_shards(
        samples.kept(splits, gone), config.shards.target_mb, buckets
    )
    records = []
    for record in shards.pack_all(plans, output, config.shards):
        records.append(record)
        progress.packed(len(records), len(plans))
    records.sort(key=lambda record: record["name"])
    return Packed(splits=splits, gone=gone, twins=twins, buckets=dict(buckets), records=records)


def digest_of(keys: Iterable[str]) -> str:
    """sha256 of keys, a line each."""
    digest = hashlib.sha256()
    for place, key in enumerate(keys):
        digest.update(f"\n{key}".encode() if place else key.encode())
    return digest.hexdigest()


SAMPLE_COLUMNS = (
    "key",
    "identity",
    "video",
    "split",
    "sha256",
    "address",
    "content",
    "frames",
    "offset",
    "length",
)


class Samples:
    """What publication must know of every sample that may be published, without vectors and hashes. On disk, sorted by identity.

    ``address`` and ``content`` stand for the video's URL and sha256.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Args:
        rows: of :data:`SAMPLE_COLUMNS`, sorted by identity.
        """
        self._shelf = Shelf(
            f"CREATE TABLE samples ({quoted(SAMPLE_COLUMNS)})",
            "CREATE TABLE shared (source PRIMARY KEY) WITHOUT ROWID",
        )
        values = (tuple(row[name] for name in SAMPLE_COLUMNS) for row in rows)
        self._shelf.add(f"INSERT INTO samples VALUES ({places(SAMPLE_COLUMNS)})", values)
        self._shelf.do(
            "INSERT INTO shared SELECT source FROM ("
            "SELECT address AS source, identity FROM samples UNION SELECT content, identity FROM samples"
            ") WHERE source GROUP BY source HAVING COUNT(*) > 1"
        )

    def __iter__(self) -> Iterator[identities.Candidate]:
        """Candidates without vectors, with those sources only that two identities have: others decide nothing."""
        shared = (
            f"CASE WHEN {name} IN (SELECT source FROM shared) THEN {name} ELSE 0 END"
            for name in ("address", "content")
        )
        query = f"SELECT key, identity, video, frames, split, {', '.join(shared)} FROM samples ORDER BY rowid"
        for key, identity, video, frames, split, *sources in self._shelf.rows(query):
            yield identities.Candidate(
                key=key,
                identity=identity,
                video=video,
                sources=tuple(sources),
                frames=frames,
                split=split,
                embedding=(),
            )

    def kept(
        self, splits: Mapping[str, str], gone: identities.Reasons
    ) -> Iterator[tuple[str, str, shards.Slice]]:
        """(split, identity, where it lies) of the samples that are not gone."""
        query = 'SELECT identity, video, key, sha256, "offset", length FROM samples ORDER BY rowid'
        for identity, video, key, *place in self._shelf.rows(query):
            if key not in gone:
                sha256, offset, length = place
                yield (
                    identities.side_of(splits, identity, video),
                    identity,
                    shards.Slice(
                        key=key,
                        part=f"{identity}-{video}",
                        sha256=sha256,
                        offset=offset,
                        length=length,
                    ),
                )


def gather(
    commits: Iterable[shards.Commit], config: PreprocessConfig
) -> tuple[Samples, identities.Reasons, dict[str, identities.Vectors]]:
    """Go through all commits once, one identity at a time, and compare its tracks with each other.

    Args:
        commits: sorted by identity.
        config: of the run.

    Returns:
        all samples, and why some of them do not stay: copies first, so that they count for nothing else, then tracks that
        look unlike their identity's other videos; and the mean of each identity's others.
    """
    gone: identities.Reasons = {}
    means: dict[str, identities.Vectors] = {}

    def rows() -> Iterator[dict[str, Any]]:
        last = ""
        for identity, group in itertools.groupby(commits, lambda commit: commit.video.identity):
            assert identity > last, f"the list is not sorted: {identity} after {last}"
            last = identity
            people = []
            for commit in group:
                for candidate in candidates_of(commit):
                    people.append(candidate)
                    yield sample_row(commit, candidate)
            copies = {}
            if config.identities.split == "clean":  # the other has copies on both sides
                copies = quality.find_duplicates(people, config.quality)
            single = [track for track in people if track.key not in copies]
            single.sort(key=lambda track: (track.video, track.key))
            gone.update(copies)
            gone.update(identities.strangers(single, config.identities.video_threshold))
            if staying := [track for track in single if track.key not in gone]:
                means[identity] = identities.mean(staying)

    return Samples(rows()), gone, means


def candidates_of(commit: shards.Commit) -> Iterator[identities.Candidate]:
    """What is compared of each sample of one video."""
    video = commit.video
    for track in video.tracks:
        key = video.track_key(track)
        if key in commit.slices:
            yield identities.Candidate(
                key=key,
                identity=video.identity,
                video=video.video,
                sources=(short_hash(video.url or video.path), short_hash(video.sha256)),
                frames=commit.frames[key],
                split=video.split,
                embedding=track.embedding,
                window_side=track.scores["window_side"],
                hash_marks=quality.hash_marks(track.hashes),
                hashes=quality.hash_bytes(track.hashes),
            )


def short_hash(text: str) -> int:
    """64 bits that stand for a text; 0 for none."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True) if text else 0


def sample_row(commit: shards.Commit, track: identities.Candidate) -> dict[str, Any]:
    """A row of :data:`SAMPLE_COLUMNS`."""
    offset, length = commit.slices[track.key]
    address, content = track.sources
    return {
        "key": track.key,
        "identity": track.identity,
        "video": track.video,
        "split": track.split,
        "sha256": commit.tar_sha256,
        "address": address,
        "content": content,
        "frames": track.frames,
        "offset": offset,
        "length": length,
    }


def decisions(
    commit: shards.Commit, splits: Mapping[str, str], gone: identities.Reasons
) -> dict[str, tuple[str, str, str]]:
    """(split, cause, detail) of each sample of one video, by key; an empty cause: it is published."""
    video = commit.video
    told = {}
    for key in commit.slices:
        cause, detail = gone.get(key, ("", ""))
        split = video.split if cause else identities.side_of(splits, video.identity, video.video)
        told[key] = (split, str(cause), detail)
    return told


class Tally:
    """Counts the rows of the ledger as they stream past."""

    def __init__(self) -> None:
        self.states: dict[str, Counter[str]] = {"video": Counter(), "track": Counter()}
        self.causes: dict[str, Counter[str]] = {"video": Counter(), "track": Counter()}
        self.examples: dict[str, tuple[str, str]] = {}
        """Key and detail of the first video of each cause."""
        self.dropped: Counter[str] = Counter()
        self.identities: set[str] = set()
        self.by_split: dict[str, set[str]] = {}
        """Identities published in each split."""
        self.videos: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.lost_frames = 0
        self.tracks: Counter[str] = Counter()

    def see(self, row: dict[str, Any]) -> dict[str, Any]:
        """Count one row; returns it."""
        kind = row["kind"]
        self.states[kind][row["state"]] += 1
        self.identities.add(row["identity"])
        if row["state"] != "published":
            cause = f"{row['stage']}: {row['cause']}"
            self.causes[kind][cause] += 1
            if kind == "video":
                self.examples.setdefault(cause, (row["key"], row["detail"]))
        elif kind == "video":
            self.videos[row["split"]] += 1
        else:
            self.by_split.setdefault(row["split"], set()).add(row["identity"])
            self.tracks[row["split"]] += 1
            self.frames[row["split"]] += row["frames"]
        if kind == "track":
            self.dropped.update(dict(row["dropped"]))
            self.lost_frames += 0 if row["state"] == "published" else row["frames"]
        return row

    def example(self, cause: str) -> str:
        """What is known of one video with this cause: a beginning for who asks why nothing is left."""
        key, detail = self.examples[cause]
        return f", as {key}: {one_line(detail, 160)}" if detail else f", as {key}"

    def splits(self) -> dict[str, dict[str, int]]:
        """Identities, videos, tracks and frames published in each split."""
        return {
            split: {
                "identities": len(people),
                "videos": self.videos[split],
                "tracks": self.tracks[split],
                "frames": self.frames[split],
            }
            for split, people in sorted(self.by_split.items())
        }

    def counts(self) -> dict[str, Any]:
        """What went in, what came out, and why the rest did not."""
        published = set().union(*self.by_split.values())
        return {
            "identities": {"listed": len(self.identities), "published": len(published)},
            "videos": {"listed": self.states["video"].total(), **_sorted(self.states["video"])},
            "tracks": {"found": self.states["track"].total(), **_sorted(self.states["track"])},
            "frames": {
                "published": self.frames.total(),
                "in_rejected_tracks": self.lost_frames,
                "dropped": self.dropped.total(),
            },
            "causes": {
                "videos": _sorted(self.causes["video"]),
                "tracks": _sorted(self.causes["track"]),
                "frames": _sorted(self.dropped),
            },
        }


def _sorted(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def tool_versions() -> dict[str, str]:
    """Versions of what decides the pixels."""
    names = (
        "av",
        "decord",
        "dlib-bin",
        "face-alignment",
        "numpy",
        "opencv-python",
        "ray",
        "yt-dlp",
    )
    return {name: version(name) for name in names}
