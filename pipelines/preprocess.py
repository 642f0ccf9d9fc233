"""Stages 1–8 chained into one Ray Data plan: a list of videos becomes a published dataset. The data half starts here.

    voxceleb.read_list → download → tracks → crops → identities (embed) → quality → annotate → shards (commit)
        → quality (copies) → identities (filter, split) → shards (pack) → index, ledger, report → dataset.json

Everything may be killed at any time: committed videos are skipped by the next run of the same command, and what is
published depends on the commits only. A row is a video until it is committed, then a shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.compute as pc

from models.frozen import weights
from pipelines import (
    annotate,
    archive,
    crops,
    download,
    identities,
    quality,
    report,
    shards,
    storage,
    tracks,
    voxceleb,
)
from pipelines.output import ConfigError, NothingUsableError, flatten, require_same_recipe
from pipelines.schema import SCHEMA_VERSION, Video, batched, to_row

if TYPE_CHECKING:
    from ray.data import Dataset

UNNEEDED = storage.join(shards.WORK, "unneeded")
"""A file that says that everything in the work folder is published and may go."""

OPERATIONAL = (
    "input",
    "output",
    "keep_work",
    "window",
    "max_attempts",
    "plan",
    "plan_videos",
    "stop_after",
    "replay",
    "tracks.decoder.deadline_seconds",
    "tracks.decoder.videos_per_child",
)
"""Fields that change how a run goes but not what it makes; neither does any ``resources``."""


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
    """Face parsing."""
    shards: shards.ShardsConfig = field(default_factory=shards.ShardsConfig)
    """Packing."""
    keep_work: bool = False
    """Keep OUTPUT/work (downloads and one part per video) after publication; needed to add videos later."""
    window: int = 2000
    """Videos per Ray Data plan, at most 5000: bounds the memory of driver and object store for any list."""
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
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.plan_videos < 1:
            raise ValueError(f"plan_videos must be at least 1, got {self.plan_videos}")
        if self.plan + bool(self.stop_after) + bool(self.replay) > 1:
            raise ValueError("plan, stop_after and replay are three different things: give one")

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
            stage.resources.min_actors * stage.resources.num_cpus for stage in self.stages
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the configuration that decides what the dataset contains, flat."""
        flat = {}
        for name, value in flatten(download.public(dataclasses.asdict(self))).items():
            operational = name in OPERATIONAL or ".resources." in name
            if not operational and name not in download.OPERATIONAL:
                flat[name] = value
        return flat


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
    require_same_recipe(config.output, config.recipe)
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

    rows = [to_row(video) for video in videos]
    dataset: Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
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
        "annotate": partial(annotate.add_annotations, config=config.annotate),
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
    keys, stage_seconds, new_videos = process(config, videos, progress)
    manifest, retryable = publish(config, keys, progress)
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
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 64 * 2**20
    patience = download.manners_towards("", config.download).patience_seconds
    deadlines = 3 * config.download.deadline_seconds
    context.execution_no_progress_timeout_s = max(1800, int(deadlines + patience))


def require_canary(config: download.DownloadConfig) -> None:
    """Fetch the canary on a node of the cluster, where the videos will be fetched.

    Raises:
        NothingUsableError: it failed, so the list would too.
    """
    import ray

    fetch = ray.remote(num_cpus=config.resources.num_cpus)(download.fetch_canary)
    canary = ray.get(fetch.remote(config))
    if not canary.live:
        raise NothingUsableError(
            f"the canary {canary.url} could not be fetched: {canary.cause} ({canary.detail}); nothing of the list was tried. "
            "Update yt-dlp, wait, or give another --download.canary"
        )


def process(
    config: PreprocessConfig, videos: Iterable[Video], progress: Progress
) -> tuple[list[str], dict[str, float], int]:
    """Run every video of the list that has no commit yet, window by window.

    Returns:
        keys of all videos of the list in its order, seconds by stage summed over the videos run now, and their number.
    """
    done, failed = shards.committed(config.output)
    published = set() if done or failed else published_keys(config.output)
    finished = done | published
    takedowns = shards.read_takedowns(config.output)
    keys: list[str] = []
    seconds: Counter[str] = Counter()
    count = 0
    for window in batched(videos, config.window):
        keys += [video.key for video in window]
        progress.listed(len(keys))
        again = [video.key for video in window if video.key in failed]
        attempts = {
            commit.video.key: commit.video.attempts
            for commit in shards.load_commits(config.output, again)
        }
        todo = [
            shards.honour(replace(video, attempts=attempts.get(video.key, 0) + 1), takedowns)
            for video in window
            if video.key not in finished and attempts.get(video.key, 0) < config.max_attempts
        ]
        progress.skipped(len(window) - len(todo))
        if not todo:
            continue
        if published:
            raise ConfigError(
                f"--output {config.output}: published without {todo[0].key} and its work folder is gone; "
                "make a new --output, and give --keep-work where lists will grow"
            )
        for row in build_plan(todo, config).iter_rows():
            progress.video(row)
            seconds.update(json.loads(row["seconds"]))
            count += 1
    if missing := sorted(published.difference(keys)):
        raise ConfigError(
            f"--output {config.output}: published with {missing[0]}, which the list no longer has, and its work "
            "folder is gone; take videos out with jobs/dataset.py takedown, or make a new --output"
        )
    return keys, dict(seconds), count


def published_keys(output: str) -> set[str]:
    """Keys of the videos that a published dataset has an answer for; empty when nothing is published."""
    if not storage.exists(storage.join(output, shards.MANIFEST)):
        return set()
    ledger = shards.read_ledger(output)
    videos = ledger.filter(pc.equal(ledger["kind"], "video"))
    return set(videos["key"].to_pylist())


def publish(
    config: PreprocessConfig, keys: list[str], progress: Progress
) -> tuple[dict[str, Any], int]:
    """Filter identities, pack shards, write index, ledger, report and at last the manifest.

    Args:
        config: of the run.
        keys: of all videos of the list; each has a commit, or the dataset is already published.
        progress: told of each packed shard.

    Returns:
        the manifest, and how many failed videos the next run will try again.
    """
    output = config.output
    list_sha256 = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
    before: dict[str, Any] = {}
    if storage.exists(storage.join(output, shards.MANIFEST)):
        before = shards.read_manifest(output)
        done, failed = shards.committed(output)
        if before["list_sha256"] == list_sha256 and not done and not failed:
            return before, 0
    keys = sorted(set(keys))
    candidates = []
    slices = {}
    retryable = 0
    for commit in shards.load_commits(output, keys):
        video = commit.video
        retryable += video.state == "failed" and video.attempts < config.max_attempts
        for track in video.tracks:
            key = video.track_key(track)
            if key in commit.slices:
                offset, length = commit.slices[key]
                slices[key] = shards.Slice(
                    key=key, part=video.key, sha256=commit.tar_sha256, offset=offset, length=length
                )
                candidates.append(
                    identities.Candidate(
                        key=key,
                        identity=video.identity,
                        video=video.video,
                        sources=(video.url or video.path, video.sha256),
                        frames=commit.frames[key],
                        split=video.split,
                        embedding=track.embedding,
                        window_side=track.scores["window_side"],
                        hash_marks=quality.hash_marks(track.hashes),
                        hashes=quality.hash_bytes(track.hashes),
                    )
                )
    decisions = decide(candidates, config)
    kept = [
        (decisions[item.key].split, item.identity, slices[item.key])
        for item in candidates
        if not decisions[item.key].cause
    ]
    plans, buckets = shards.plan_shards(kept, config.shards.target_mb, before.get("buckets", {}))
    records = []
    for record in shards.pack_all(plans, output, config.shards):
        records.append(record)
        progress.packed(len(records), len(plans))
    tally = Tally()
    told = {
        key: (decision.split, decision.cause, decision.detail)
        for key, decision in decisions.items()
    }
    shards.write_ledger(
        (
            tally.see(row)
            for commit in shards.load_commits(output, keys)
            for row in shards.ledger_rows(commit, told)
        ),
        output,
    )
    listing = [
        {
            "name": record["name"],
            "split": record["split"],
            "bytes": record["bytes"],
            "sha256": record["sha256"],
            "samples": len(record["samples"]),
        }
        for record in sorted(records, key=lambda record: record["name"])
    ]
    changed = before.get("shards") != listing
    manifest = {
        "format": "headray",
        "schema_version": SCHEMA_VERSION,
        "dataset_version": before.get("dataset_version", 0) + changed,
        "config": config.recipe,
        "list_sha256": list_sha256,
        "counts": tally.counts(),
        "splits": tally.splits(),
        "members": describe_windows(config) | identities.describe(config.identities),
        "buckets": buckets,
        "shards": listing,
        "index": shards.write_index(records, output) if records else {},
        "tools": tool_versions(),
    }
    report.write(output, manifest, records)
    if not records:
        causes = manifest["counts"]["causes"]["videos"]
        reasons = ", ".join(f"{count} × {cause}" for cause, count in causes.items())
        raise NothingUsableError(
            f"all {len(keys)} videos were rejected ({reasons}); see {storage.join(output, report.PAGE)}"
        )
    shards.write_manifest(manifest, output)
    named = {shard["name"] for shard in listing}
    for name in storage.names_below(storage.join(output, "shards")):
        if name not in named:
            storage.remove(storage.join(output, "shards", name))
    return manifest, retryable


def decide(
    candidates: list[identities.Candidate], config: PreprocessConfig
) -> dict[str, identities.Decision]:
    """Which tracks are published in which split, by key: copies go first, so that they count for nothing else."""
    copies = quality.find_duplicates(candidates, config.quality)
    single = [item for item in candidates if item.key not in copies]
    decisions = identities.decide(single, config.identities)
    splits = {item.key: item.split for item in candidates}
    for key, (cause, detail) in copies.items():
        decisions[key] = identities.Decision(split=splits[key], cause=cause.value, detail=detail)
    return decisions


class Tally:
    """Counts the rows of the ledger as they stream past."""

    def __init__(self) -> None:
        self.states: dict[str, Counter[str]] = {"video": Counter(), "track": Counter()}
        self.causes: dict[str, Counter[str]] = {"video": Counter(), "track": Counter()}
        self.dropped: Counter[str] = Counter()
        self.identities: set[str] = set()
        self.by_split: dict[str, dict[str, set[str]]] = {}
        self.frames: Counter[str] = Counter()
        self.lost_frames = 0
        self.tracks: Counter[str] = Counter()

    def see(self, row: dict[str, Any]) -> dict[str, Any]:
        """Count one row; returns it."""
        kind = row["kind"]
        self.states[kind][row["state"]] += 1
        self.identities.add(row["identity"])
        if row["state"] != "published":
            self.causes[kind][f"{row['stage']}: {row['cause']}"] += 1
        elif kind == "track":
            split = self.by_split.setdefault(row["split"], {"identities": set(), "videos": set()})
            split["identities"].add(row["identity"])
            split["videos"].add(f"{row['identity']}-{row['video']}")
            self.tracks[row["split"]] += 1
            self.frames[row["split"]] += row["frames"]
        if kind == "track":
            self.dropped.update(dict(row["dropped"]))
            self.lost_frames += 0 if row["state"] == "published" else row["frames"]
        return row

    def splits(self) -> dict[str, dict[str, int]]:
        """Identities, videos, tracks and frames published in each split."""
        return {
            split: {
                "identities": len(sets["identities"]),
                "videos": len(sets["videos"]),
                "tracks": self.tracks[split],
                "frames": self.frames[split],
            }
            for split, sets in sorted(self.by_split.items())
        }

    def counts(self) -> dict[str, Any]:
        """What went in, what came out, and why the rest did not."""
        published = set().union(*(sets["identities"] for sets in self.by_split.values()), set())
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


class Progress:
    """Tells a person how a long run is going: a line every 30 seconds, whether or not anything finished.

    On a terminal Ray Data draws its own bars and this class only counts.
    """

    def __init__(self, say: Callable[[str], None], every_seconds: float = 30.0) -> None:
        self.say = say
        self.every_seconds = every_seconds
        self.states: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.frames = 0
        self.known = 0
        self.before = 0
        self.step = "reading the list"
        self._started = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Progress:
        if not os.isatty(1):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def listed(self, count: int) -> None:
        """``count`` videos of the list are known by now."""
        self.known = count
        self.step = "processing"

    def skipped(self, count: int) -> None:
        """``count`` videos were committed by an earlier run."""
        self.before += count

    def video(self, row: Mapping[str, Any]) -> None:
        """One video was committed."""
        self.states[row["state"]] += 1
        self.frames += row["frames"]
        if row["cause"]:
            self.causes[row["cause"]] += 1

    def packed(self, count: int, total: int) -> None:
        """``count`` of ``total`` shards are packed."""
        self.step = f"packing shards ({count} of {total})"

    def line(self) -> str:
        """The state in one line."""
        elapsed = time.perf_counter() - self._started
        done = self.states.total()
        causes = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common(3))
        rate = f", {done / elapsed * 3600:.0f} videos/h" if done else ""
        earlier = f", {self.before} from an earlier run" if self.before else ""
        return (
            f"[{elapsed:6.0f} s] {self.step}: {done + self.before} of {self.known} videos{earlier}, "
            f"{self.states['open']} with faces, {self.states['rejected']} rejected, "
            f"{self.states['failed']} failed, {self.frames} frames{rate}"
            + (f" ({causes})" if causes else "")
        )

    def _repeat(self) -> None:
        while not self._stop.wait(self.every_seconds):
            self.say(self.line())
