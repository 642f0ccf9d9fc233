"""Scores of single pictures → tables, one page to look at, and files to go on with.

``scores.json`` (means by study, line and score), ``rows.csv`` (every generated picture), ``STUDY-N.png`` (what was made) and
``index.html`` (all of it in one self-contained page).
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import jinja2
import numpy as np

from pipelines import storage
from pipelines.evaluation import Found, Row, Sheet, Whole

SCORES, ROWS, PAGE = "scores.json", "rows.csv", "index.html"
MAX_SHEET_PX = 2400
"""Longer side of a picture in the page; the PNG beside it is whole."""


@dataclass(frozen=True)
class Meaning:
    """What a column says."""

    title: str
    better: Literal["higher", "lower", ""]
    text: str
    digits: int = 3


# fmt: off
MEANINGS: dict[str, Meaning] = {
    "csim": Meaning("CSIM", "higher", "cosine of identity vectors: generated picture, mean of the person's real pictures (latent pose reenactment)"),
    "csim_of_driver": Meaning("CSIM of the driver", "", "the same of the real driving frame: of one's own the ceiling, of somebody else's the floor"),
    "csim_driver": Meaning("CSIM with the driver", "", "cosine with the real driving frame, which is the one that was to be made"),
    "leakage": Meaning("leakage", "lower", "cosine with the driver minus CSIM: above 0 it is the driver who is seen (ours, after GHOST 2.0's remark)"),
    "pose": Meaning("pose error", "lower", "mean distance of 68 landmarks to the driver's, in distances of the outer eye corners (latent pose reenactment)"),
    "pose_fitted": Meaning("pose error, fitted", "lower", "the same after the best scale and shift"),
    "head_pose": Meaning("head pose", "lower", "mean difference of yaw, pitch and roll to the driver's, degrees, from landmarks", 2),
    "psnr": Meaning("PSNR", "higher", "dB; an Aligner with a mask is compared with the person before black, a Blender where it painted", 2),
    "psnr_head": Meaning("PSNR, head", "higher", "dB, where the head is painted", 2),
    "psnr_inpainted": Meaning("PSNR, inpainted", "higher", "dB, where the surroundings are painted", 2),
    "ssim": Meaning("SSIM", "higher", "structural similarity of the whole window"),
    "lpips": Meaning("LPIPS", "lower", "distance, as people see it, of the pictures that SSIM compares: AlexNet, version 0.1 (Zhang et al. 2018)"),
    "skin_delta_e": Meaning("skin ΔE", "lower", "CIEDE2000 between mean skin colours of result and truth", 2),
    "skin_delta_e_before": Meaning("skin ΔE before", "", "of the head before it was painted", 2),
    "hair_delta_e": Meaning("hair ΔE", "lower", "the same of hair", 2),
    "hair_delta_e_before": Meaning("hair ΔE before", "", "of the head before it was painted", 2),
    "l1": Meaning("L1", "lower", "mean absolute difference of pixels, [0, 1] (first order model)", 4),
    "l1_source": Meaning("L1 of the source", "", "had nothing moved", 4),
    "akd": Meaning("AKD", "lower", "mean absolute difference of a landmark's coordinate, pixels of 256 (pose-evaluation); pictures without a face are left out", 2),
    "akd_source": Meaning("AKD of the source", "", "had nothing moved", 2),
    "aed": Meaning("AED", "lower", "squared distance of unit identity vectors to the driving frame's; not OpenFace's, so not comparable with published ones"),
    "found": Meaning("faces found", "higher", "share of generated pictures in which the detector finds a face, of those whose driver has one", 2),
    "fid": Meaning("FID", "lower", "Fréchet distance of Inception's features between all n generated pictures and the n real frames that drive them, as the network is to make them. Far too high where n is small: compare equal n only, publish from thousands (--samples)", 2),
}
# fmt: on
CURVES = ("csim", "pose_fitted")
"""Drawn against K, as in HeSer's Figure 2."""


@dataclass(frozen=True)
class Mean:
    """Of one score over the pictures of a line."""

    value: float
    deviation: float | None
    """Standard, of the pictures; None: it is one number for all of them."""
    count: int
    """Pictures that have the score."""


@dataclass(frozen=True)
class Line:
    """Of a study's table."""

    setting: str
    pictures: int
    means: dict[str, Mean]


@dataclass
class Scores:
    """Everything that was found, in order."""

    rows: list[Row] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)

    def add(self, found: Found) -> None:
        """Keep it."""
        match found:
            case Row():
                self.rows.append(found)
            case Sheet():
                self.sheets.append(found)
            case Whole():
                self.wholes.append(found)

    def tables(self) -> dict[str, list[Line]]:
        """By study."""
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            grouped.setdefault((row.study, row.setting), []).append(row)
        tables: dict[str, list[Line]] = {}
        for (study, setting), rows in grouped.items():
            names = list(dict.fromkeys(name for row in rows for name in row.values))
            means = {
                name: mean_of(row.values.get(name, math.nan) for row in rows) for name in names
            } | {
                whole.name: Mean(whole.value, None, whole.pictures)
                for whole in self.wholes
                if (whole.study, whole.setting) == (study, setting)
            }
            tables.setdefault(study, []).append(Line(setting, len(rows), means))
        return tables

    def flat(self) -> dict[str, float]:
        """``study/setting/score`` → mean, for MLflow; without those that no picture has."""
        return {
            f"{study}/{setting.replace(' = ', '').replace(', ', '_').replace(' ', '_')}/{name}": mean.value
            for study, lines in self.tables().items()
            for line in lines
            for setting in [line.setting]
            for name, mean in line.means.items()
            if mean.count
        }


def mean_of(values: Iterable[float]) -> Mean:
    """Over the numbers that are there."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    return Mean(float(np.mean(known)), float(np.std(known)), len(known))


def write(output: str, scores: Scores, about: Mapping[str, Any]) -> None:
    """All files; the page last.

    Args:
        output: folder or URI.
        scores: found.
        about: what was scored: dataset, bundles, settings, commit; JSON.
    """
    tables = scores.tables()
    content = {
        "about": about,
        "scores": {
            study: {
                line.setting: {name: vars(mean) for name, mean in line.means.items() if mean.count}
                for line in lines
            }
            for study, lines in tables.items()
        },
    }
    storage.write_atomic(storage.join(output, SCORES), json.dumps(content, indent=1).encode())
    storage.write_atomic(storage.join(output, ROWS), as_csv(scores.rows).encode())
    shown = []
    numbers: Counter[str] = Counter()
    for sheet in scores.sheets:
        name = f"{sheet.study}-{numbers[sheet.study]}.png"
        numbers[sheet.study] += 1
        storage.write_atomic(storage.join(output, name), encoded(sheet, ".png"))
        shown.append((sheet, name, base64.b64encode(encoded(small(sheet), ".jpg")).decode()))
    page = render(tables, shown, curves(tables.get("aligner", [])), about)
    storage.write_atomic(storage.join(output, PAGE), page.encode())


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each picture."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["study", "setting", "key", "driver", *names])
    for row in rows:
        values = [row.values.get(name, math.nan) for name in names]
        told = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
        table.writerow([row.study, row.setting, row.key, row.driver, *told])
    return text.getvalue()


def small(sheet: Sheet) -> Sheet:
    """At most ``MAX_SHEET_PX`` on its longer side."""
    factor = MAX_SHEET_PX / max(sheet.image.shape[:2])
    if factor >= 1:
        return sheet
    image = cv2.resize(sheet.image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return Sheet(study=sheet.study, title=sheet.title, image=np.asarray(image, np.uint8))


def encoded(sheet: Sheet, kind: Literal[".png", ".jpg"]) -> bytes:
    """An image file."""
    return bytes(cv2.imencode(kind, sheet.image[:, :, ::-1])[1].tobytes())


@dataclass(frozen=True)
class Curve:
    """A score against K, in a drawing of 100 x 60."""

    meaning: Meaning
    lines: dict[str, list[tuple[float, float, str]]]
    """Protocol → (x, y, what a pointer is told) of each point."""
    ticks: list[tuple[float, str]]
    """(x, K)."""
    low: float
    high: float


def curves(lines: Sequence[Line]) -> list[Curve]:
    """Of :data:`CURVES`, where there is more than one K."""
    points: dict[tuple[str, int], Line] = {}
    for line in lines:
        protocol, _, number = line.setting.partition(", K = ")
        points[protocol, int(number)] = line
    shots = sorted({number for _, number in points})
    if len(shots) < 2:
        return []
    place = {number: 14 + 80 * index / (len(shots) - 1) for index, number in enumerate(shots)}
    drawn = []
    for name in CURVES:
        means = {key: line.means[name] for key, line in points.items() if line.means[name].count}
        if not means:
            continue
        values = [mean.value for mean in means.values()]
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        found: dict[str, list[tuple[float, float, str]]] = {}
        for (protocol, shot), mean in sorted(means.items()):
            y = 52 - 44 * (mean.value - low) / span
            told = f"{protocol}, K = {shot}: {mean.value:.3f} ± {mean.deviation or 0:.3f}"
            found.setdefault(protocol, []).append((place[shot], y, told))
        ticks = [(x, str(shot)) for shot, x in place.items()]
        drawn.append(Curve(MEANINGS[name], found, ticks, low, high))
    return drawn


def render(
    tables: Mapping[str, Sequence[Line]],
    sheets: Sequence[tuple[Sheet, str, str]],
    drawn: Sequence[Curve],
    about: Mapping[str, Any],
) -> str:
    """The page. Names come from a dataset, so every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("scores.html.jinja").render(
        tables=tables, sheets=sheets, curves=drawn, about=about, meanings=MEANINGS
    )
