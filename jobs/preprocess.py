#!/usr/bin/env python
"""List of videos → published dataset of face crops. Killed or interrupted, the same command goes on.

    python jobs/preprocess.py --input my_videos/ --output data/mine
    python jobs/preprocess.py voxceleb2 --input vox2_meta.zip --output data/vox2
    ray job submit --working-dir . -- python jobs/preprocess.py voxceleb2 --input s3://... --output s3://...

laptop keeps videos of any height and needs no downloaded weights; voxceleb2 wants 1080 lines and heads that are well
inside the frame. For the motion model: motion makes clips at the videos' own rate of any list, voxceleb1 wants what its paper
had, and faceforensics takes a folder of files that each show another person. --input and --output are all that is needed.
docs/formats.md has an example of each form of list.

Exit codes: 0 done, 2 wrong arguments or list, 3 nothing usable came out, 1 our fault.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import hashlib
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import tyro
from rich.table import Table

from jobs import runtime
from pipelines import forecast, memory, nodes, preprocess, replay, report, shards, storage, tracking
from pipelines.annotate import AnnotateConfig
from pipelines.crops import CropsConfig
from pipelines.download import DownloadConfig, manners_towards
from pipelines.forecast import Forecast, Range
from pipelines.identities import IdentitiesConfig, advise_test_share
from pipelines.limiter import find_pauses
from pipelines.listing import shown
from pipelines.output import NothingUsableError, OutputLock
from pipelines.preprocess import Outcome, PreprocessConfig
from pipelines.progress import Progress
from pipelines.quality import QualityConfig
from pipelines.schema import Video
from pipelines.shards import ShardsConfig
from pipelines.tracking import DatasetEntry
from pipelines.tracks import TracksConfig

# Clips for the motion model: every frame, one fixed upright square for a whole clip, steady landmarks, no labels. Frames that
# repeat the one before stay, or a clip would have holes.
MOTION = PreprocessConfig(
    input=tyro.MISSING,
    output=tyro.MISSING,
    tracks=TracksConfig(frames_per_second=0, max_frames_per_track=1024, min_frames=32),
    crops=CropsConfig(
        crop_rule="fomm", size=256, smooth=True, min_window=192, min_inside=0.5, min_frames=32
    ),
    quality=QualityConfig(min_frame_change=0, min_frames=32),
    annotate=AnnotateConfig(parser="none"),
    shards=ShardsConfig(target_mb=256.0),
)

PRESETS = {
    # Reads clips of any height; thresholds that suit webcams and phones. No download of weights: dlib's are in a wheel.
    "laptop": PreprocessConfig(
        input=tyro.MISSING,
        output=tyro.MISSING,
        shards=ShardsConfig(target_mb=256.0),
    ),
    # The paper's dataset: 1080 lines or nothing, and heads that are inside the frame.
    "voxceleb2": PreprocessConfig(
        input=tyro.MISSING,
        output=tyro.MISSING,
        download=DownloadConfig(min_height=1080),
        crops=CropsConfig(min_inside=0.6),
    ),
    # Any list: clips of at least 32 frames.
    "motion": MOTION,
    # VoxCeleb1's own metadata or first order model's vox-metadata.csv: clips of 64 to 1024 frames, as in the latter.
    "voxceleb1": replace(
        MOTION,
        tracks=replace(MOTION.tracks, min_frames=64),
        crops=replace(MOTION.crops, min_frames=64),
        quality=replace(MOTION.quality, min_frames=64),
        shards=ShardsConfig(),
    ),
    # A flat folder of files. A tenth of the 1,000 is for testing, as in Global-Flow-Local-Attention's split.
    "faceforensics": replace(
        MOTION, input_format="files", identities=IdentitiesConfig(test_share=0.1)
    ),
}


def connect(config: PreprocessConfig) -> PreprocessConfig:
    """Join or start Ray; the configuration with the pools that fit it."""
    if cores := runtime.own_cores():
        config = preprocess.on_one_machine(config, cores)
    runtime.connect(config.minimum_cpus)
    if not nodes.may_grow():
        wanted = sum(preprocess.gpus_needed(config).values())
        nodes.become(lambda: nodes.gpus() >= wanted, runtime.patience())
        preprocess.require_gpus(config, nodes.gpus())
        if not cores:
            config = preprocess.on_fixed_cluster(config, nodes.rooms())
    return config


def job() -> None:
    """Parse, check, connect, run, summarise."""
    config = runtime.parse(PRESETS, __doc__ or "")
    config = replace(
        config,
        input=runtime.location("input", config.input),
        output=runtime.location("output", config.output),
    )
    if archive := config.download.from_downloads:
        absolute = replace(config.download, from_downloads=storage.absolute(archive))
        config = replace(config, download=absolute)
    if config.plan:
        show_plan(config)
    elif config.replay:
        show_replay(config)
    else:
        make(config)


def make(config: PreprocessConfig) -> None:
    """Check everything, lock the output, record, and make the dataset or the rows of one stage."""
    memory.hold_little()
    preprocess.check(config)
    videos = tell_of_split(config, preprocess.open_list(config))
    with OutputLock(config.output):
        flat = runtime.record(config, config.output)
        if config.stop_after:
            save_rows(config, videos)
            return
        outcome, places = publish(config, videos, flat)
    summarise(config, outcome, places)


def tell_of_split(config: PreprocessConfig, videos: Iterator[Video]) -> Iterator[Video]:
    """The same videos; warns before any work when all people of a short list would be on one side of the split."""
    first = list(itertools.islice(videos, preprocess.VIDEOS_AT_ONCE))
    if len(first) < preprocess.VIDEOS_AT_ONCE and not any(video.split for video in first):
        share = config.identities.test_share
        names = {video.identity for video in first if video.state != "rejected"}
        advised = advise_test_share(names, share)
        if advised is not None:
            runtime.console.print(
                f"warning: all {len(names)} people fall on one side of the split (by hash of their names, "
                f"--identities.test-share {share:g}). Trainings evaluate on split test, and jobs/evaluate.py scores it: "
                f"--identities.test-share {advised:g} splits these people; a dataset's split cannot be changed afterwards"
            )
    return itertools.chain(first, videos)


def publish(
    config: PreprocessConfig, videos: Iterator[Video], flat: dict[str, Any]
) -> tuple[Outcome, list[str]]:
    """Connect and run; MLflow keeps the flat configuration, series, what came out, lineage and the report.

    Returns:
        what the run made, and lines that say how MLflow shows it.
    """
    store = tracking.find_store(config.output, runtime.submitted())
    place = shown(config.output)
    tags = tracking.run_tags(
        runtime.run_name(place),
        "jobs/preprocess.py",
        runtime.code_version()["commit"],
        dataset=place,
    )
    manners = manners_towards("", config.download)
    with tracking.open_run(store, "headray-preprocess", flat, tags) as run:
        config = connect(config)
        with (
            nodes.Timeline(runtime.console.print),
            Progress(
                runtime.console.print, record=run.series, watch=partial(find_pauses, manners)
            ) as progress,
        ):
            try:
                outcome = preprocess.run(config, videos, progress)
            except NothingUsableError as error:
                log_report(run, config.output)
                run.note(f"**Nothing was published.** {error}")
                raise
        run.metrics(metrics(outcome))
        log_lineage(run, config, outcome.manifest)
        run.note(note(config, outcome))
        run.record(outcome.manifest, "dataset.json")
        log_report(run, config.output)
    places = [store.show, tracking.run_address(store, run)]
    if run.trouble:
        places.append(f"it did not take all of this run: {run.trouble}")
    return outcome, places


def dataset_name(uri: str) -> str:
    """The last part of a URI: what a dataset or a list is called in MLflow."""
    return uri.rstrip("/").rpartition("/")[2] or uri


def log_lineage(run: tracking.Run, config: PreprocessConfig, manifest: Mapping[str, Any]) -> None:
    """The list that went in and the dataset that came out, by digest; trainings log the same name and digest."""
    counts = manifest["counts"]
    content = storage.read_bytes(storage.join(config.output, shards.MANIFEST))
    sha256 = hashlib.sha256(content).hexdigest()
    published = {
        kind: counts[kind].get("published", 0)
        for kind in ("identities", "videos", "tracks", "frames")
    }
    place = shown(config.output)
    run.dataset(
        DatasetEntry(
            name=dataset_name(place),
            digest=f"v{manifest['dataset_version']}-{sha256[:12]}",
            uri=place,
            context="published",
            profile=published | {"splits": manifest["splits"], "sha256": sha256},
            columns=shards.INDEX_SCHEMA,
        )
    )
    listed = shown(config.input)
    run.dataset(
        DatasetEntry(
            name=dataset_name(listed),
            digest=manifest["list_sha256"],
            uri=listed,
            context="list",
            profile={kind: counts[kind]["listed"] for kind in ("identities", "videos")},
        )
    )
    run.tags({"dataset_version": str(manifest["dataset_version"]), "dataset_sha256": sha256})


def note(config: PreprocessConfig, outcome: Outcome) -> str:
    """The summary in Markdown, for the run's page."""
    manifest = outcome.manifest
    counts = manifest["counts"]
    size = sum(shard["bytes"] for shard in manifest["shards"])
    lines = [
        f"**{runtime.run_name(shown(config.output))}, version {manifest['dataset_version']}**: "
        f"{counts['frames']['published']:,} frames of {counts['identities']['published']:,} people in "
        f"{len(manifest['shards'])} shards, {size / 2**20:,.1f} MiB, made in {outcome.seconds:,.0f} s. "
        "The report with pictures and reasons is in *Artifacts*, `report/index.html`; how it went over time in "
        f"*Model metrics*, `progress` and `stage`. The dataset is at `{shown(config.output)}`.",
        "",
        "| | in | out |",
        "|---|---:|---:|",
        *(f"| {name} | {went_in} | {came_out} |" for name, went_in, came_out in funnel(counts)),
    ]
    for kind, causes in counts["causes"].items():
        if causes:
            lines += ["", f"| {kind} not in the dataset | |", "|---|---:|"]
            lines += [f"| {cause} | {count:,} |" for cause, count in list(causes.items())[:10]]
    return "\n".join(lines)


def funnel(counts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, what went in and what came out."""
    frames = counts["frames"]
    return [
        ("identities", *_pair(counts["identities"], "listed")),
        ("videos", *_pair(counts["videos"], "listed")),
        ("tracks", *_pair(counts["tracks"], "found")),
        ("frames", f"{sum(frames.values()):,}", f"{frames['published']:,}"),
    ]


def log_report(run: tracking.Run, output: str) -> None:
    """Give the page to MLflow; a run that its canary stopped has written none."""
    uri = storage.join(output, report.PAGE)
    if storage.exists(uri):
        with storage.local_file(uri) as page:
            run.file(page, "report")


def show_plan(config: PreprocessConfig) -> None:
    """Forecast the run from a sample of its list; writes nothing to the output."""
    say = runtime.console.print
    videos = preprocess.open_list(config)
    say(f"asking about {config.plan_videos} videos of the list (no video is fetched)")
    told = forecast.plan(videos, config)
    table = Table(title="forecast", title_justify="left")
    for column in ("", "expected", "95 % of samples say"):
        table.add_column(column, justify="left" if not column else "right")
    for name, expected, between in plan_rows(told):
        table.add_row(name, expected, between)
    say(table)
    for cause, count in sorted(told.causes.items()):
        say(f"  {count} of the sample: {cause}")
    say(
        f"{told.num_asked} sampled videos answered. Frames, bytes and CPU-hours are of all that can be fetched: at most, "
        "since what faces reject is known only from the pictures. CPU-hours are from rates in pipelines/forecast.py, "
        "measured on another machine with the networks that come in wheels; nothing was timed here."
    )
    if told.num_sizes_assumed:
        rate = forecast.ASSUMED_BITS_PER_SECOND / 1e6
        say(
            f"{told.num_sizes_assumed} sites told neither size nor rate: {rate:g} Mbit/s taken for them"
        )


def plan_rows(told: Forecast) -> list[tuple[str, str, str]]:
    """Name, expected value and interval of each line of the forecast."""

    def line(name: str, values: Range, scale: float = 1.0, digits: int = 0) -> tuple[str, str, str]:
        low, expected, high = (
            f"{value / scale:,.{digits}f}" for value in (values.low, values.expected, values.high)
        )
        return name, expected, f"{low} to {high}"

    return [
        ("videos in the list", f"{told.num_videos:,}", ""),
        ("  usable by their entry in it", f"{told.num_usable:,}", ""),
        line("videos that can be fetched", told.survivors),
        line("to download, GB", told.download_bytes, 1e9, 2),
        (
            "hours for one address",
            f"{told.address_hours:,.2f}",
            f"{forecast.VIDEOS_PER_HOUR} videos/h",
        ),
        line("frames, at most", told.frames),
        line("dataset, GB, at most", told.dataset_bytes, 1e9, 2),
        line("disk for OUTPUT/work, GB", told.work_bytes, 1e9, 2),
        line("CPU-hours", told.cpu_hours, 1, 2),
    ]


def save_rows(config: PreprocessConfig, videos: Iterator[Video]) -> None:
    """Run up to a stage and save the rows that enter the next; the output is locked."""
    config = connect(config)
    with Progress(runtime.console.print) as progress:
        folder = replay.stop_after(config, videos, progress)
    say = runtime.console.print
    say(progress.line())
    say(f"rows     {folder}")
    say(f"next     {runtime.again('replay', replay.stage_after(config), without='stop-after')}")


def show_replay(config: PreprocessConfig) -> None:
    """Run one stage on saved rows and print what it changed, video by video."""
    preprocess.check_weights(config)
    keys = replay.saved_keys(config)
    with OutputLock(config.output):
        config = connect(config)
        show_changes(config, keys)


def show_changes(config: PreprocessConfig, keys: list[str]) -> None:
    """Replay on the rows of these videos; the output is locked."""
    say = runtime.console.print
    differing = compared = 0
    for told in replay.replay(config, keys):
        say(f"{told['key']}  {told['seconds']:.2f} s")
        for change in told["changes"] or ["nothing changed"]:
            say(f"  {change}")
        if told["since"] is not None:
            compared += 1
            differing += bool(told["since"])
            for change in told["since"]:
                say(f"  since the last replay: {change}")
    say(f"{len(keys)} videos through {config.replay}")
    if compared:
        say(f"{differing} of {compared} are not what the last replay made of them")


def metrics(outcome: Outcome) -> dict[str, float]:
    """Counts and times for MLflow, which shows sections by name: after ``progress``, before ``stage``."""
    counts = outcome.manifest["counts"]
    values: dict[str, float] = {"seconds": outcome.seconds, "new_videos": outcome.new_videos}
    for kind in ("identities", "videos", "tracks", "frames"):
        values |= {f"{kind}/{state}": count for state, count in counts[kind].items()}
    for kind, causes in counts["causes"].items():
        for cause, count in causes.items():
            values[f"{kind}_lost/{cause.replace(': ', '_').replace(' ', '_')}"] = count
    values |= {f"stage_seconds/{name}": value for name, value in outcome.stage_seconds.items()}
    return {f"result/{name}": value for name, value in values.items()}


def summarise(config: PreprocessConfig, outcome: Outcome, places: list[str]) -> None:
    """What was kept, what was rejected and why, where to look (``places``: in MLflow), what to run next."""
    say = runtime.console.print
    manifest = outcome.manifest
    counts = manifest["counts"]
    table = Table(title=f"dataset version {manifest['dataset_version']}", title_justify="left")
    for column in ("", "in", "out"):
        table.add_column(column, justify="left" if not column else "right")
    for row in funnel(counts):
        table.add_row(*row)
    for split, numbers in manifest["splits"].items():
        table.add_row(
            f"  {split}", "", f"{numbers['videos']:,} videos / {numbers['identities']:,} identities"
        )
    say(table)
    for kind, causes in counts["causes"].items():
        if causes:
            reasons = Table(title=f"{kind} not in the dataset, by cause", title_justify="left")
            reasons.add_column("cause")
            reasons.add_column(kind, justify="right")
            for cause, count in causes.items():
                reasons.add_row(cause, f"{count:,}")
            say(reasons)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    say(f"{len(manifest['shards'])} shards, {size / 2**20:,.1f} MiB, in {outcome.seconds:,.0f} s")
    if outcome.retryable:
        say(
            f"{outcome.retryable} failed for reasons that may pass; the same command tries them again "
            f"(the work folder stays until then: {storage.join(config.output, 'work')})"
        )
    if "test" not in manifest["splits"]:
        say(
            "nobody is in split test: trainings want --held-out.split train, which scores people they were trained on; "
            "a new --output with a larger --identities.test-share has somebody to test on"
        )
    say(f"dataset  {config.output}")
    say(f"report   {storage.join(config.output, report.PAGE)}")
    for place in places:
        say(f"mlflow   {place}")
    say(f"next     python jobs/dataset.py verify --dataset {shlex.quote(config.output)}")


def _pair(counts: dict[str, Any], total: str) -> tuple[str, str]:
    return f"{counts[total]:,}", f"{counts.get('published', 0):,}"


if __name__ == "__main__":
    runtime.main(job)
