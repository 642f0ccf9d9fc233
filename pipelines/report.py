"""Stage 9. Ledger, samples and manifest → one self-contained HTML page: what is in a dataset, what is not, and why. CPU.

Lists come from anywhere, so every text is escaped and no address becomes a link. Everything shown is capped and what
is capped says so: the page of a million videos is as long as that of a hundred.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.frozen.parsing import Labels, ParsingLabel
from pipelines import shards, storage
from pipelines.annotate import decode_labels
from pipelines.schema import npy_array
from pipelines.timemap import Relation

PAGE = "report/index.html"

MAX_IDENTITIES = 20
TRACKS_PER_IDENTITY = 2
FRAMES_PER_TRACK = 6
THUMB_PX = 160
EXAMPLES = 3
"""Of each cause."""
MAX_ROWS = 40
"""Of the tables of time maps and of rejected tracks."""
MAX_CHARACTERS = 200
"""Of one text from a list or a tool."""
BINS = 30

# fmt: off
COLUMNS = [
    "kind", "key", "identity", "split", "state", "stage", "cause", "detail", "frames", "dropped", "scores", "start",
    "end", "seconds", "versions",
]
# fmt: on
"""Of the ledger; its long texts are read on their own."""

GATES = (
    ("window_side", "Window side", "source pixels, median of a track", "crops.min_window"),
    ("inside", "Share of the window inside the frame", "median of a track", "crops.min_inside"),
)
"""(score, title, unit, the configuration's threshold) of each histogram."""

# fmt: off
PARTS = (
    (range(17), False), (range(17, 22), False), (range(22, 27), False),      # jaw, brows
    (range(27, 31), False), (range(31, 36), False),                         # nose
    (range(36, 42), True), (range(42, 48), True),                           # eyes
    (range(48, 60), True), (range(60, 68), True),                           # mouth
)
# fmt: on
"""iBUG 68: points of each facial part in drawing order, and whether its line closes."""
LINE_RGB = (0, 255, 140)

LABEL_RGB = {
    ParsingLabel.SKIN: (255, 176, 120),
    ParsingLabel.L_BROW: (150, 90, 40),
    ParsingLabel.R_BROW: (110, 60, 20),
    ParsingLabel.L_EYE: (0, 200, 255),
    ParsingLabel.R_EYE: (0, 130, 255),
    ParsingLabel.GLASSES: (255, 255, 255),
    ParsingLabel.L_EAR: (255, 120, 180),
    ParsingLabel.R_EAR: (210, 70, 140),
    ParsingLabel.EARRING: (255, 230, 0),
    ParsingLabel.NOSE: (120, 220, 90),
    ParsingLabel.MOUTH: (90, 0, 0),
    ParsingLabel.UPPER_LIP: (230, 30, 60),
    ParsingLabel.LOWER_LIP: (180, 0, 40),
    ParsingLabel.NECK: (200, 150, 255),
    ParsingLabel.NECKLACE: (255, 200, 0),
    ParsingLabel.CLOTH: (60, 110, 220),
    ParsingLabel.HAIR: (150, 60, 200),
    ParsingLabel.HAT: (0, 150, 130),
}
"""Colour of each label of a window; the background has none."""


def write(output: str, manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """Make the page of a dataset that is being published.

    Args:
        output: dataset URI; its ledger is written.
        manifest: as ``dataset.json`` will hold it.
        records: of :func:`pipelines.shards.pack`, whose shards are written; empty when nothing is published.
    """
    ledger = shards.read_ledger(output, COLUMNS)
    chosen = choose(ledger)
    samples = [
        {**sample, "shard": record["name"], "split": record["split"]}
        for record in records
        for sample in record["samples"]
        if sample["key"] in chosen
    ]
    _write_page(output, manifest, ledger, contact_sheets(output, samples, chosen))


def rebuild(output: str) -> None:
    """Make the page of a published dataset again, from its manifest, index and ledger.

    Raises:
        shards.DatasetError: it is not a dataset, or one of these or a shard is missing or damaged.
    """
    manifest = shards.read_manifest(output)
    ledger = shards.read_ledger(output, COLUMNS)
    index = shards.read_index(output)
    chosen = choose(ledger)
    wanted = pa.array(sorted(chosen), pa.string())
    samples = index.filter(pc.is_in(index["key"], wanted)).to_pylist()
    _write_page(output, manifest, ledger, contact_sheets(output, samples, chosen))


def _write_page(
    output: str, manifest: Mapping[str, Any], ledger: pa.Table, sheets: list[dict[str, Any]]
) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["short"] = _short
    page = environment.get_template("report.html.jinja").render(
        manifest=manifest,
        colours=STAGE_ORDER,
        bars=funnel(manifest["counts"]),
        causes=cause_tables(manifest["counts"]["causes"], ledger),
        histograms=histograms(ledger, manifest["config"]),
        sheets=sheets,
        legend=legend(sheets),
        time_maps=time_maps(output),
        rejected=rejected_tracks(ledger),
        stages=stage_seconds(ledger),
        versions=[_short(text) for text in _column(ledger, "versions").unique().to_pylist()[:5]],
    )
    storage.write_atomic(storage.join(output, PAGE), page.encode())


# --- what the ledger says -------------------------------------------------------------------------------------


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` indices, evenly spaced from the first to the last of ``count`` things."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, limit)).round()]


def _rows(ledger: pa.Table, kind: str, published: bool) -> pa.Table:
    is_published = pc.equal(ledger["state"], "published")
    state = is_published if published else pc.invert(is_published)
    return ledger.filter(pc.and_(pc.equal(ledger["kind"], kind), state))


def _column(ledger: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of the rows of videos, without empty texts."""
    column = ledger.filter(pc.equal(ledger["kind"], "video"))[name]
    return column.filter(pc.not_equal(column, ""))


def _some(table: pa.Table, limit: int) -> list[dict[str, Any]]:
    places = pa.array(spread(table.num_rows, limit), pa.int64())
    return list(table.take(places).to_pylist())


def choose(ledger: pa.Table) -> dict[str, int]:
    """The published samples that the page shows: a few of each of a few identities, from all splits.

    Returns:
        by key, the number of all published samples of the same identity.
    """
    tracks = _rows(ledger, "track", published=True).select(["split", "identity", "key"])
    names = tracks.group_by(["split", "identity"]).aggregate([])
    names = names.sort_by([("split", "ascending"), ("identity", "ascending")])
    chosen: dict[str, int] = {}
    for name in _some(names, MAX_IDENTITIES):
        own = tracks.filter(pc.equal(tracks["identity"], name["identity"])).sort_by("key")
        chosen |= {row["key"]: own.num_rows for row in _some(own, TRACKS_PER_IDENTITY)}
    return chosen


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of the funnel."""

    name: str
    total: int
    kept: int
    losses: list[tuple[str, int]]
    """(stage, count) of what was lost, in the order of the stages."""


STAGE_ORDER = ("list", "download", "video", "timeline", "annotation", "track", "crop", "identity")


def funnel(counts: Mapping[str, Any]) -> list[Bar]:
    """What went in and what came out, by the counts of the manifest."""
    identities, videos, tracks, frames = (
        counts[kind] for kind in ("identities", "videos", "tracks", "frames")
    )
    gone = identities["listed"] - identities["published"]
    frame_losses = _by_stage(counts["causes"]["frames"])
    if frames["in_rejected_tracks"]:
        frame_losses.append(("of rejected tracks", frames["in_rejected_tracks"]))
    return [
        Bar(
            name="identities",
            total=identities["listed"],
            kept=identities["published"],
            losses=[("without a published track", gone)] if gone else [],
        ),
        Bar(
            name="videos",
            total=videos["listed"],
            kept=videos.get("published", 0),
            losses=_by_stage(counts["causes"]["videos"]),
        ),
        Bar(
            name="tracks",
            total=tracks["found"],
            kept=tracks.get("published", 0),
            losses=_by_stage(counts["causes"]["tracks"]),
        ),
        Bar(
            name="frames",
            total=sum(frames.values()),
            kept=frames["published"],
            losses=frame_losses,
        ),
    ]


def _by_stage(causes: Mapping[str, int]) -> list[tuple[str, int]]:
    stages: dict[str, int] = {}
    for cause, count in causes.items():
        stage = cause.partition(": ")[0]
        stages[stage] = stages.get(stage, 0) + count
    order = {name: place for place, name in enumerate(STAGE_ORDER)}
    return sorted(stages.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def most_frequent(causes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Causes and counts, the most frequent first."""
    return sorted(causes.items(), key=lambda item: (-item[1], item[0]))


def cause_tables(
    causes: Mapping[str, Mapping[str, int]], ledger: pa.Table
) -> dict[str, list[dict[str, Any]]]:
    """For videos, tracks and frames: each cause with its count and a few examples from all over the list."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for kind in ("videos", "tracks"):
        rows = _rows(ledger, kind.removesuffix("s"), published=False)
        tables[kind] = []
        for cause, count in most_frequent(causes[kind]):
            stage, _, reason = cause.partition(": ")
            same = pc.and_(pc.equal(rows["stage"], stage), pc.equal(rows["cause"], reason))
            examples = [(row["key"], row["detail"]) for row in _some(rows.filter(same), EXAMPLES)]
            tables[kind].append({"cause": cause, "count": count, "examples": examples})
    rows = ledger.filter(pc.equal(ledger["kind"], "track"))
    tables["frames"] = []
    for cause, count in most_frequent(causes["frames"]):
        numbers = pc.map_lookup(rows["dropped"], cause, "first")
        some = rows.append_column("number", numbers).filter(pc.is_valid(numbers))
        examples = [(row["key"], f"{row['number']} frames") for row in _some(some, EXAMPLES)]
        tables["frames"].append({"cause": cause, "count": count, "examples": examples})
    return tables


def time_maps(output: str) -> dict[str, Any]:
    """The most doubtful time maps: videos with the lowest median overlap of annotation and detection first.

    Returns:
        ``rows`` (key, state, cause, ``shift``, ``overlays``) and ``total``, the number of all maps.
    """
    total = 0
    worst = None
    columns = ["key", "state", "stage", "cause", "shift"]
    for batch in shards.ledger_batches(output, columns):  # all these texts together are large
        videos = pa.Table.from_batches([batch]).filter(pc.not_equal(batch["shift"], ""))
        total += videos.num_rows
        found = pc.extract_regex(videos["shift"], r'"median_iou": (?P<overlap>[0-9][0-9.e+-]*)')
        overlap = pc.cast(pc.struct_field(found, "overlap"), pa.float64())
        # null, and so last, where nothing was compared
        videos = videos.append_column("overlap", overlap)
        candidates = pa.concat_tables([worst, videos]) if worst else videos
        ordered = candidates.sort_by([("overlap", "ascending"), ("key", "ascending")])
        worst = ordered.slice(0, MAX_ROWS)
    rows = worst.to_pylist() if worst else []
    for row in rows:
        row["shift"] = json.loads(row["shift"])
        row["overlays"] = overlays(row["shift"])
    return {"rows": rows, "total": total}


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """One frame of a time map's proof; rectangles are (left, top, width, height) in source pixels."""

    time: float
    view: tuple[float, ...]
    """Square around all boxes."""
    annotated: tuple[float, ...]
    """As the list gave it."""
    expected: tuple[float, ...]
    """Where the detector should find the annotated face."""
    detected: tuple[float, ...]
    """Empty where no face was found."""


def overlays(shift: Mapping[str, Any]) -> list[Overlay]:
    """What to draw of a time map's ``strip`` of frames with an annotated and a detected box."""
    relation = Relation(**shift.get("relation", {}))
    drawn = []
    for frame in shift.get("strip", []):
        annotated = np.asarray(frame["annotated"], dtype=np.float64)
        known = [annotated, relation.expect(annotated), frame["detected"]]
        boxes = np.array([box for box in known if len(box)])
        low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        side = 1.3 * float((high - low).max())
        corner = (low + high - side) / 2
        rectangles = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(1)
        drawn.append(
            Overlay(
                time=float(frame["time"]),
                view=(*corner.round(1).tolist(), round(side, 1), round(side, 1)),
                annotated=tuple(rectangles[0].tolist()),
                expected=tuple(rectangles[1].tolist()),
                detected=tuple(rectangles[2].tolist()) if frame["detected"] else (),
            )
        )
    return drawn


def rejected_tracks(ledger: pa.Table) -> dict[str, Any]:
    """Some of the tracks that are not in the dataset, from all over the list, and the number of all."""
    tracks = _rows(ledger, "track", published=False)
    rows = _some(tracks, MAX_ROWS)
    for row in rows:
        row["scores"] = dict(row["scores"])
    return {"rows": rows, "total": tracks.num_rows}


def stage_seconds(ledger: pa.Table) -> list[dict[str, Any]]:
    """Worker seconds of each stage over all videos, the slowest stage first."""
    videos = ledger.filter(pc.equal(ledger["kind"], "video"))
    chunks = videos["seconds"].chunks
    if not chunks:
        return []
    table = pa.table(
        {
            "stage": pa.chunked_array([chunk.keys for chunk in chunks], pa.string()),
            "seconds": pa.chunked_array([chunk.items for chunk in chunks], pa.float64()),
        }
    )
    sums = table.group_by("stage").aggregate([("seconds", "sum"), ("seconds", "count")])
    total = pc.sum(sums["seconds_sum"]).as_py() or 1.0
    rows = [
        {
            "stage": row["stage"],
            "seconds": row["seconds_sum"],
            "videos": row["seconds_count"],
            "share": row["seconds_sum"] / total,
        }
        for row in sums.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["seconds"], row["stage"]))


# --- histograms -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Numbers of a drawn histogram; lengths are shares of the drawing, 0 to 1."""

    title: str
    unit: str
    bars: list[tuple[float, float, float]]
    """(left, height of the published, height of the others on top) of each bin."""
    ticks: list[tuple[float, str]]
    peak: int
    """Tracks in the fullest bin."""
    threshold: tuple[float, str] | None
    published: int
    others: int


def histograms(ledger: pa.Table, config: Mapping[str, Any]) -> list[Histogram]:
    """A histogram over all tracks for each of :data:`GATES` that any track has a score for."""
    drawn = []
    for score, title, unit, threshold in GATES:
        published, others = (
            _scores(_rows(ledger, "track", published=state), score) for state in (True, False)
        )
        if published.size + others.size:
            drawn.append(histogram(title, unit, published, others, float(config[threshold])))
    return drawn


def _scores(tracks: pa.Table, name: str) -> NDArray[np.float64]:
    values = pc.map_lookup(tracks["scores"], name, "first").drop_null()
    return np.asarray(values.to_numpy(), dtype=np.float64)


def histogram(
    title: str,
    unit: str,
    published: NDArray[np.float64],
    others: NDArray[np.float64],
    threshold: float,
) -> Histogram:
    """Bins from zero to a round number above the largest value and the threshold."""
    largest = max(float(np.concatenate([published, others, [threshold]]).max()), 1e-6)
    step = 10.0 ** np.floor(np.log10(largest))
    while largest / step < 4:
        step /= 2
    end = step * np.ceil(largest / step - 1e-9)
    counts = [np.histogram(values, bins=BINS, range=(0, end))[0] for values in (published, others)]
    peak = int(np.sum(counts, axis=0).max())
    return Histogram(
        title=title,
        unit=unit,
        bars=[
            (index / BINS, int(counts[0][index]) / peak, int(counts[1][index]) / peak)
            for index in range(BINS)
        ],
        ticks=[(place / end, f"{place:g}") for place in np.arange(0, end + step / 2, step)],
        peak=peak,
        threshold=(threshold / end, f"at least {threshold:g}") if threshold > 0 else None,
        published=published.size,
        others=others.size,
    )


# --- pictures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Thumb:
    """A small picture of one frame with its landmarks drawn."""

    image: NDArray[np.uint8]
    """(size, size, 3) RGB."""
    time: float
    """Seconds."""
    overlay: NDArray[np.uint8]
    """(size, size, 3) RGB, the frame with its labels in colour; (0, 0, 3) where it has none or they are not shown."""
    seen: frozenset[ParsingLabel]
    """Labels in ``overlay``."""

    @property
    def jpeg(self) -> str:
        """Base64 of ``image`` as a JPEG, for a ``data:`` address."""
        return _jpeg(self.image)

    @property
    def overlay_jpeg(self) -> str:
        """Base64 of ``overlay``; empty where there is none."""
        return _jpeg(self.overlay) if self.overlay.size else ""


def _jpeg(image: NDArray[np.uint8]) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # full colour resolution: halved, thin lines lose their colour
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 80, *sampling])[1]
    return base64.b64encode(coded.tobytes()).decode()


def legend(sheets: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, CSS colour) of every label that some overlay shows, in their order."""
    seen = {
        label
        for sheet in sheets
        for track in sheet["tracks"]
        for thumb in track["thumbs"]
        for label in thumb.seen
    }
    return [
        (label.name.lower().replace("_", " "), "rgb({}, {}, {})".format(*LABEL_RGB[label]))
        for label in sorted(seen)
    ]


def contact_sheets(
    output: str, samples: Iterable[Mapping[str, Any]], chosen: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Samples grouped by identity, each with thumbs of a few of its frames, the first of each identity with labels.

    Args:
        output: dataset URI.
        samples: rows of the index (``key``, ``identity``, ``split``, ``shard``, members and where they lie).
        chosen: of :func:`choose`.
    """
    ordered = sorted(
        samples, key=lambda sample: (sample["split"], sample["identity"], sample["key"])
    )
    names = [sample["identity"] for sample in ordered]
    first = [name not in names[:place] for place, name in enumerate(names)]
    with ThreadPoolExecutor(8) as pool:
        read = partial(read_thumbs, output)
        pictures = list(pool.map(read, ordered, first))
    sheets: dict[str, dict[str, Any]] = {}
    for sample, thumbs in zip(ordered, pictures, strict=True):
        sheet = sheets.setdefault(
            sample["identity"],
            {
                "identity": sample["identity"],
                "split": sample["split"],
                "total": chosen[sample["key"]],
                "tracks": [],
            },
        )
        track = {**sample, "scores": dict(sample["scores"]), "thumbs": thumbs}
        sheet["tracks"].append(track)
    return list(sheets.values())


def read_thumbs(
    output: str,
    sample: Mapping[str, Any],
    labelled: bool = False,
    limit: int = FRAMES_PER_TRACK,
    size: int = THUMB_PX,
) -> list[Thumb]:
    """Some frames of a published sample, evenly spaced in time, by range reads.

    Args:
        output: dataset URI.
        sample: a row of the index.
        labelled: draw the labels, too, where the sample has any.
        limit: most frames.
        size: of a thumb, pixels.

    Raises:
        shards.DatasetError: the shard is missing, or what the index points at is not there.
    """
    uri = storage.join(output, "shards", sample["shard"])
    places = {
        name: (offset, offset + length)
        for name, offset, length in zip(
            sample["members"], sample["offsets"], sample["sizes"], strict=True
        )
    }
    try:
        times = np.asarray(json.loads(storage.read_bytes(uri, *places["json"]))["times"])
        landmarks = npy_array(storage.read_bytes(uri, *places["landmarks.npy"]))
        frames = [name for name in sample["members"] if name.endswith(".jpg")]
        wanted = np.linspace(times[0], times[-1], min(limit, len(times)))
        chosen = np.unique(np.abs(times[:, None] - wanted).argmin(axis=0))
        thumbs = []
        for index in chosen:
            image = decode(storage.read_bytes(uri, *places[frames[index]]))
            drawn = draw_landmarks(image, landmarks[index], size)
            overlay, seen = np.zeros((0, 0, 3), dtype=np.uint8), frozenset[ParsingLabel]()
            png = frames[index].removesuffix(".jpg") + ".png"
            if labelled and png in places:
                labels = decode_labels(storage.read_bytes(uri, *places[png]))
                overlay = draw_labels(image, labels, size)
                seen = frozenset(ParsingLabel(int(value)) for value in np.unique(labels) if value)
            thumbs.append(Thumb(image=drawn, time=float(times[index]), overlay=overlay, seen=seen))
    except (OSError, EOFError, ValueError, LookupError) as error:
        raise shards.DatasetError(
            f"{uri}: sample {sample['key']} cannot be read ({type(error).__name__}: {error}); "
            "run jobs/dataset.py verify"
        ) from error
    return thumbs


def decode(jpeg: bytes) -> NDArray[np.uint8]:
    """A JPEG as RGB (h, w, 3). Raises ``ValueError`` when it is none."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) if jpeg else None
    if image is None:
        raise ValueError(f"{len(jpeg)} bytes are not a JPEG")
    return np.asarray(image, dtype=np.uint8)


def draw_landmarks(
    image: NDArray[np.uint8], landmarks: NDArray[np.floating], size: int
) -> NDArray[np.uint8]:
    """A square picture (s, s, 3) made ``size`` wide, with lines through its landmarks (68, 2), window pixels."""
    thumb: NDArray[np.uint8] = np.ascontiguousarray(
        cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    )
    # cv2 counts from the centre of the first pixel
    points = landmarks * (size / image.shape[0]) - 0.5
    fine = np.clip(np.round(points * 16), -(2**20), 2**20).astype(np.int32)
    for part, closed in PARTS:
        cv2.polylines(thumb, [fine[list(part)]], closed, LINE_RGB, 1, cv2.LINE_AA, shift=4)
    return thumb


def draw_labels(image: NDArray[np.uint8], labels: Labels, size: int) -> NDArray[np.uint8]:
    """A square picture (s, s, 3) with the colours of its labels (s, s) over it, made ``size`` wide."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    for label, colour in LABEL_RGB.items():
        palette[label] = colour
    share = np.where(labels > 0, 0.6, 0.0)[..., None]
    mixed = image * (0.8 - share * 0.8) + palette[labels] * share  # what has no label is dimmed
    return np.asarray(
        cv2.resize(mixed.astype(np.uint8), (size, size), interpolation=cv2.INTER_AREA),
        dtype=np.uint8,
    )


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
