"""Stage 9. Ledger, samples and manifest → one self-contained HTML page: what is in a dataset, what is not, and why. CPU.

Lists come from anywhere, so every text is escaped and no address becomes a link. Everything shown is capped and what
is capped says so: the page of a million videos is as long as that of a hundred.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.frozen.parsing import Labels, ParsingLabel
from pipelines import gallery, shards, snapshots, storage
from pipelines.annotate import decode_labels
from pipelines.gallery import some
from pipelines.schema import STAGES, npy_array
from pipelines.shelf import Shelf

PAGE = "report/index.html"

MAX_IDENTITIES = 20
TRACKS_PER_IDENTITY = 2
FRAMES_PER_TRACK = 6
THUMB_PX = 160
EXAMPLES = 3
"""Of each cause."""
MAX_CHARACTERS = 200
"""Of one text from a list or a tool."""
BINS = 30


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A score of tracks, and the threshold that judges it."""

    score: str
    title: str
    unit: str
    threshold: str
    """In the configuration; 0 there: everything passes, and no line is drawn."""
    axis: Literal["plain", "angle", "decades"] = "plain"
    """From zero; both ways from zero, the threshold too; logarithmic."""


# fmt: off
GATES = (
    Gate(score="window_side", title="Window side", unit="source pixels", threshold="crops.min_window"),
    Gate(score="inside", title="Share of the window inside the frame", unit="", threshold="crops.min_inside"),
    Gate(score="face_px", title="Face box", unit="source pixels, mean side", threshold="quality.min_face_px"),
    Gate(score="sharpness", title="Sharpness", unit="variance of the Laplacian", threshold="quality.min_sharpness", axis="decades"),
    Gate(score="yaw", title="Yaw", unit="degrees, positive to the picture's left", threshold="quality.max_yaw", axis="angle"),
    Gate(score="pitch", title="Pitch", unit="degrees, positive up", threshold="quality.max_pitch", axis="angle"),
    Gate(score="clip_change", title="Change within the clip", unit="grey levels; a still picture has almost none", threshold="quality.min_clip_change", axis="decades"),
    Gate(score="annotation_iou", title="Overlap with the annotation", unit="intersection over union", threshold="tracks.min_overlap"),
    Gate(score="same_person", title="Agreement of a track's frames on one person", unit="cosine", threshold="identities.min_frame_cosine"),
    Gate(score="box_score", title="Detector's score", unit="in its own units", threshold="quality.min_box_score"),
)
# fmt: on

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


def write(output: str, manifest: Mapping[str, Any]) -> None:
    """Make the page of a dataset that is being published.

    Args:
        output: dataset URI; its ledger is written, and its shards and index where anything is published.
        manifest: as ``dataset.json`` will hold it.
    """
    ledger = gallery.shelve_ledger(output)
    chosen = choose(ledger)
    choice = gallery.choose(output, ledger)
    album = gallery.gather(output, choice)
    gallery.write_album(output, album)
    samples = shards.index_rows(output, chosen) if manifest["shards"] else []
    sheets = contact_sheets(output, samples, chosen)
    _write_page(output, manifest, Found(ledger=ledger, choice=choice, album=album, sheets=sheets))


def rebuild(output: str) -> None:
    """Make the page of a published dataset again, from its manifest, index and ledger.

    Raises:
        shards.DatasetError: it is not a dataset, or one of these or a shard is missing or damaged.
    """
    manifest = shards.read_manifest(output)
    ledger = gallery.shelve_ledger(output)
    shards.read_index(output)  # whole, as the manifest says
    chosen = choose(ledger)
    choice, album = gallery.choose(output, ledger), gallery.read_album(output)
    sheets = contact_sheets(output, shards.index_rows(output, chosen), chosen)
    _write_page(output, manifest, Found(ledger=ledger, choice=choice, album=album, sheets=sheets))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything but the manifest that the page is made from."""

    ledger: Shelf
    """Of :func:`pipelines.gallery.shelve_ledger`."""
    choice: gallery.Choice
    album: pa.Table
    sheets: list[dict[str, Any]]
    """Of :func:`contact_sheets`."""


def _write_page(output: str, manifest: Mapping[str, Any], found: Found) -> None:
    import jinja2

    ledger, choice = found.ledger, found.choice
    pictures = gallery.as_pictures(found.album)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["short"] = _short
    environment.filters["letters"] = _letters
    page = environment.get_template("report.html.jinja").render(
        manifest=manifest,
        colours=STAGE_ORDER,
        bars=funnel(manifest["counts"]),
        causes=cause_tables(manifest["counts"]["causes"], ledger),
        histograms=histograms(output, manifest["config"]),
        sheets=found.sheets,
        legend=legend(found.sheets),
        strips=gallery.draw_strips(choice, pictures),
        num_strips=choice.num_strips,
        rejects=gallery.draw_rejects(choice, pictures, manifest["config"]),
        rejects_per_cause=gallery.PER_CAUSE,
        stages=stage_seconds(shards.ledger_batches(output, ["kind", "seconds"])),
        commit=_commit(output),
        versions=[_short(text) for text in itertools.islice(versions(output), 5)],
    )
    storage.write_atomic(storage.join(output, PAGE), page.encode())


def _commit(output: str) -> str:
    """Of the code that made the dataset; empty when its configuration does not say."""
    try:
        code = json.loads(storage.read_bytes(storage.join(output, "config.json")))["code"]
    except (FileNotFoundError, ValueError, KeyError):
        return ""
    return str(code["commit"]) + (" with changes" if code["dirty"] else "")


# --- what the ledger says -------------------------------------------------------------------------------------


def versions(output: str) -> Iterator[str]:
    """Each text of versions that some video has, once."""
    seen: set[str] = set()
    for batch in shards.ledger_batches(output, ["kind", "versions"]):
        own = batch.filter(pc.equal(batch["kind"], "video"))["versions"]
        for text in filter(None, own.unique().to_pylist()):
            if text not in seen:
                seen.add(text)
                yield text


def choose(ledger: Shelf) -> dict[str, int]:
    """The published samples that the page shows: a few of each of a few identities, from all splits.

    Returns:
        by key, the number of all published samples of the same identity.
    """
    is_shown = "FROM ledger WHERE kind = 'track' AND state = 'published'"
    query = f"SELECT DISTINCT split, identity {is_shown} ORDER BY split, identity"
    chosen: dict[str, int] = {}
    for _, identity in some(ledger, query, (), MAX_IDENTITIES):
        query = f"SELECT key, COUNT(*) OVER () {is_shown} AND identity = ? ORDER BY key"
        chosen |= dict(some(ledger, query, (identity,), TRACKS_PER_IDENTITY))
    return chosen


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of the funnel."""

    name: str
    total: int
    kept: int
    losses: list[tuple[str, int]]
    """(stage, count) of what was lost, in the order of the stages."""


STAGE_ORDER = STAGES


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
    causes: Mapping[str, Mapping[str, int]], ledger: Shelf
) -> dict[str, list[dict[str, Any]]]:
    """For videos, tracks and frames: each cause with its count and a few examples from all over the list."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for kind in ("videos", "tracks"):
        tables[kind] = []
        for cause, count in most_frequent(causes[kind]):
            stage, _, reason = cause.partition(": ")
            query = (
                "SELECT key, detail FROM ledger WHERE kind = ? AND state <> 'published' "
                "AND stage = ? AND cause = ? ORDER BY rowid"
            )
            examples = some(ledger, query, (kind.removesuffix("s"), stage, reason), EXAMPLES)
            tables[kind].append({"cause": cause, "count": count, "examples": examples})
    tables["frames"] = []
    for cause, count in most_frequent(causes["frames"]):
        query = "SELECT key, number FROM dropped WHERE cause = ? ORDER BY rowid"
        found = some(ledger, query, (cause,), EXAMPLES)
        examples = [(key, f"{number} frames") for key, number in found]
        tables["frames"].append({"cause": cause, "count": count, "examples": examples})
    return tables


def stage_seconds(batches: Iterable[pa.RecordBatch]) -> list[dict[str, Any]]:
    """Worker seconds of each stage over all videos of a ledger, the slowest stage first."""
    totals: dict[str, float] = {}
    videos: dict[str, int] = {}
    for batch in batches:
        told = batch.filter(pc.equal(batch["kind"], "video"))["seconds"]
        table = pa.table({"stage": told.keys, "seconds": told.items})
        sums = table.group_by("stage").aggregate([("seconds", "sum"), ("seconds", "count")])
        for row in sums.to_pylist():
            totals[row["stage"]] = totals.get(row["stage"], 0.0) + row["seconds_sum"]
            videos[row["stage"]] = videos.get(row["stage"], 0) + row["seconds_count"]
    total = sum(totals.values()) or 1.0
    rows = [
        {"stage": name, "seconds": seconds, "videos": videos[name], "share": seconds / total}
        for name, seconds in totals.items()
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
    thresholds: list[tuple[float, str]]
    """Where the configuration draws the line, and in words."""
    published: int
    others: int


def gate_scores(output: str, score: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One score of all tracks that have it: of the published, and of the others."""
    found: tuple[list[NDArray[np.float64]], ...] = ([np.zeros(0)], [np.zeros(0)])
    for batch in shards.ledger_batches(output, ["kind", "state", "scores"]):
        tracks = batch.filter(pc.equal(batch["kind"], "track"))
        is_published = pc.equal(tracks["state"], "published")
        for values, some_tracks in zip(found, (is_published, pc.invert(is_published)), strict=True):
            values.append(_scores(tracks.filter(some_tracks), score))
    published, others = map(np.concatenate, found)
    return published, others


def histograms(output: str, config: Mapping[str, Any]) -> list[Histogram]:
    """A histogram over all tracks for each of :data:`GATES` that any track has a score for; one at a time is in mind."""
    drawn = []
    for gate in GATES:
        published, others = gate_scores(output, gate.score)
        if published.size + others.size:
            threshold = float(config.get(gate.threshold, 0.0))
            drawn.append(histogram(gate, published, others, threshold))
    return drawn


def _scores(tracks: pa.RecordBatch, name: str) -> NDArray[np.float64]:
    values = pc.map_lookup(tracks["scores"], name, "first").drop_null()
    found = np.asarray(values.to_numpy(), dtype=np.float64)
    return found[np.isfinite(found)]


def histogram(
    gate: Gate, published: NDArray[np.float64], others: NDArray[np.float64], threshold: float
) -> Histogram:
    """Bins over all values; at least one value is needed."""
    values = np.concatenate([published, others])
    low, high, ticks = _axis(gate, values, threshold)

    def place(numbers: Any) -> NDArray[np.float64]:
        told = np.log10(np.maximum(numbers, 10**low)) if gate.axis == "decades" else numbers
        return np.clip((np.asarray(told) - low) / (high - low), 0, 1)

    counts = [np.histogram(place(some), bins=BINS, range=(0, 1))[0] for some in (published, others)]
    peak = int(np.sum(counts, axis=0).max())
    lines = [-threshold, threshold] if gate.axis == "angle" else [threshold]
    word = "at most" if gate.axis == "angle" else "at least"
    return Histogram(
        title=gate.title,
        unit=gate.unit,
        bars=[
            (index / BINS, int(counts[0][index]) / peak, int(counts[1][index]) / peak)
            for index in range(BINS)
        ],
        ticks=[(float(place(np.array([tick]))[0]), f"{tick:g}") for tick in ticks],
        peak=peak,
        thresholds=[
            (float(place(np.array([line]))[0]), f"{word} {threshold:g}" if line > 0 else "")
            for line in lines
            if threshold > 0
        ],
        published=published.size,
        others=others.size,
    )


def _axis(
    gate: Gate, values: NDArray[np.float64], threshold: float
) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of a drawing that holds all values and the threshold; low and high are powers for decades."""
    largest = max(float(np.abs(values).max()), threshold, 1e-6)
    if gate.axis == "decades":
        positive = np.append(values[values > 0], [threshold] if threshold > 0 else [])
        smallest = max(float(positive.min()) if positive.size else largest, largest * 1e-6)
        low, high = float(np.floor(np.log10(smallest))), float(np.ceil(np.log10(largest)))
        high = max(high, low + 1)
        return low, high, [10.0**power for power in np.arange(low, high + 0.5)]
    step = 10.0 ** np.floor(np.log10(largest))
    while largest / step < 4:
        step /= 2
    end = float(step * np.ceil(largest / step - 1e-9))
    ticks = [float(tick) for tick in np.arange(0, end + step / 2, step)]
    if gate.axis == "angle":
        return -end, end, [-tick for tick in ticks[:0:-1]] + ticks
    return min(0.0, float(values.min())), end, ticks


# --- pictures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A thumb as the page holds it: a twentieth of the pixels' bytes."""

    time: float
    """Seconds."""
    jpeg: str
    """Base64, for a ``data:`` address."""
    overlay_jpeg: str
    """The same of the frame with its labels; empty where there are none."""
    seen: frozenset[ParsingLabel]
    """Labels in ``overlay_jpeg``."""


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
    def shown(self) -> Shown:
        """Both pictures as JPEGs."""
        overlay = _jpeg(self.overlay) if self.overlay.size else ""
        return Shown(time=self.time, jpeg=_jpeg(self.image), overlay_jpeg=overlay, seen=self.seen)


def _jpeg(image: NDArray[np.uint8]) -> str:
    # full colour resolution: halved, thin lines lose their colour
    coded = snapshots.fit(image, (80, *snapshots.QUALITIES), cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    return base64.b64encode(coded).decode()


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

    def read(sample: Mapping[str, Any], labelled: bool) -> list[Shown]:
        return [thumb.shown for thumb in read_thumbs(output, sample, labelled)]

    with ThreadPoolExecutor(8) as pool:
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
        arrays = [name for name in ("landmarks.npy", "pupils.npy") if name in places]
        points = [npy_array(storage.read_bytes(uri, *places[name])) for name in arrays]
        landmarks = np.concatenate(points, axis=1)
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
    """A square picture (s, s, 3) made ``size`` wide, with lines through its landmarks (68 or more, 2), window pixels, and dots for
    pupils, the points after the 68th.
    """
    thumb: NDArray[np.uint8] = np.ascontiguousarray(
        cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    )
    # cv2 counts from the centre of the first pixel
    points = landmarks * (size / image.shape[0]) - 0.5
    fine = np.clip(np.round(points * 16), -(2**20), 2**20).astype(np.int32)
    for part, closed in PARTS:
        cv2.polylines(thumb, [fine[list(part)]], closed, LINE_RGB, 1, cv2.LINE_AA, shift=4)
    for pupil in fine[68:].tolist():
        cv2.circle(thumb, pupil, 16, LINE_RGB, -1, cv2.LINE_AA, shift=4)
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


def _letters(cause: str) -> str:
    """A cause as the name of a part of the page."""
    return "".join(letter if letter.isalnum() else "-" for letter in cause)


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
