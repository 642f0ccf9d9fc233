"""What rank 0 of a training writes down: metrics, previews, warnings, checkpoints, the bundle, and how far it is.

``OUTPUT/progress.json`` is for the person who waits: the driver, on whatever machine, reads it and tells.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from models import bundle
from pipelines import checkpoints, health, storage, tracking

if TYPE_CHECKING:
    from pipelines.training import Learner, Training

PROGRESS = "progress.json"
BUNDLE = "bundle"


class Journal:
    """Of one run of rank 0. What a resumed run must know of the ones before it travels in the checkpoint's notes."""

    def __init__(self, training: Training, notes: Mapping[str, Any], samples_seen: int) -> None:
        """Args:
        training: what is trained.
        notes: of the checkpoint this run goes on from; empty at the start.
        samples_seen: so far.
        """
        self.training = training
        self.values: dict[str, float] = dict(notes.get("values", {}))
        """Last record of every metric."""
        self._history: list[dict[str, float]] = list(notes.get("history", []))
        self._seconds_before = float(notes.get("seconds", 0.0))
        self._preview: Tensor = notes.get("preview", torch.zeros(1, 1, 3, dtype=torch.uint8))
        self._warnings: dict[str, str] = {}
        self._started = time.perf_counter()
        self._told = 0.0
        store = training.store
        self._tracker = tracking.Tracker(training.output, store) if store else None
        self._tell(samples_seen, at_once=True)

    def write(
        self,
        samples_seen: int,
        values: Mapping[str, float],
        evaluated: Mapping[str, float],
        preview: Tensor | None,
        columns: tuple[str, ...],
    ) -> None:
        """Record metrics at ``samples_seen``, those of an evaluation, and its preview (b, 3, h, w * k) in [-1, 1]."""
        record = {"samples": float(samples_seen), **values, **evaluated}
        self._history = [*self._history, record][-health.REMEMBERED :]
        findings = health.examine(self._history, self.training.health)
        self._warnings |= {finding.kind: finding.message for finding in findings}
        self.values |= {**values, **evaluated}
        if preview is not None:
            self._preview = torch.from_numpy(picture(preview, columns))
        if self._tracker:
            gauges = health.gauges(findings)
            if values:
                told = {**values, **gauges, **tracking.system_metrics()}
                self._tracker.metrics(told, samples_seen)
            if evaluated:
                self._tracker.metrics(evaluated, samples_seen, kind="eval")
            if preview is not None:
                self._tracker.image(_png(self._preview.numpy()), samples_seen)
            if self._tracker.problem:
                self._warnings["tracking"] = self._tracker.problem
        self._tell(samples_seen, at_once=bool(evaluated))

    def film(self, learner: Learner[Any], device: torch.device, samples_seen: int) -> None:
        """Record the film of an evaluation, where the training has one."""
        if self._tracker and self.training.film:
            self._tracker.film(self.training.film(learner=learner, device=device), samples_seen)

    def checkpoint(self, learner: Learner[Any], samples_seen: int) -> None:
        """Everything recorded so far is on disk by now, so that nothing before this checkpoint is lost."""
        notes = {
            "values": self.values,
            "history": self._history,
            "seconds": self._seconds,
            "preview": self._preview,
        }
        keep = self.training.config.keep_checkpoints
        checkpoints.write(self.training.output, learner, samples_seen, notes, keep)

    def export(self, learner: Learner[Any], samples_seen: int) -> None:
        """The trained network as ``OUTPUT/bundle``, and a version of the registered model."""
        uri = storage.join(self.training.output, BUNDLE)
        sha256 = save_bundle(
            learner, uri, self.training.card, samples_seen, self.values, self._preview
        )
        if self._tracker:
            self._tracker.bundle(uri, self.training.model_name, sha256, samples_seen)
            self._tracker.end("FINISHED", samples_seen)
        self._tell(samples_seen, at_once=True)

    def close(self) -> None:
        """Send what is left to MLflow."""
        if self._tracker:
            self._tracker.close()

    @property
    def _seconds(self) -> float:
        """Of this run and those before it, up to their checkpoints."""
        return self._seconds_before + time.perf_counter() - self._started

    def _tell(self, samples_seen: int, at_once: bool) -> None:
        now = time.perf_counter()
        if not at_once and now - self._told < 1.0:
            return
        self._told = now
        cluster, total = self.training.cluster, self.training.config.samples
        speed = self.values.get("speed/samples_per_second", 0.0)
        seconds = self._seconds
        content = {
            "samples_seen": samples_seen,
            "samples": total,
            "values": self.values,
            "warnings": self._warnings,
            "seconds": seconds,
            "eta_seconds": health.eta_seconds(max(total - samples_seen, 0), speed)
            if speed
            else None,
            "cost": health.cost(seconds, cluster.num_workers, cluster.price_per_worker_hour),
        }
        uri = storage.join(self.training.output, PROGRESS)
        storage.write_atomic(uri, json.dumps(content, indent=1).encode(), durable=False)


def save_bundle(
    learner: Learner[Any],
    uri: str,
    card: Mapping[str, Any],
    samples_seen: int,
    values: Mapping[str, float],
    preview: Tensor,
) -> str:
    """Write what a learner exports; returns the sha256 of its tensors.

    Args:
        learner: trained, or with a checkpoint in it.
        uri: folder or URI.
        card: dataset and commit.
        samples_seen: how long it was trained.
        values: scores, by metric.
        preview: (h, w, 3) uint8 RGB.
    """
    scores = {name: value for name, value in values.items() if not name.startswith("speed/")}
    told = {**card, "samples_seen": samples_seen, "scores": scores}
    return bundle.save(learner.export(), uri, told, preview.numpy())


def picture(preview: Tensor, columns: tuple[str, ...]) -> NDArray[np.uint8]:
    """(b, 3, h, w * k) in [-1, 1] → one RGB picture, a row for each sample, the columns named above them."""
    images = ((preview.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = np.concatenate(list(images.permute(0, 2, 3, 1).numpy()), axis=0)  # (b * h, w * k, 3)
    width = rows.shape[1] // max(len(columns), 1)
    if width < 64:
        return np.ascontiguousarray(rows)
    head = np.full((20, rows.shape[1], 3), 255, np.uint8)
    for number, name in enumerate(columns):
        _write_name(head[:, number * width : (number + 1) * width], name)
    return np.concatenate([head, rows], axis=0)


def _write_name(head: NDArray[np.uint8], name: str) -> None:
    """A column's name in its head, (20, w, 3): on two lines, smaller, where one is too narrow; never beyond the column."""
    font, black = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
    if cv2.getTextSize(name, font, 0.4, 1)[0][0] <= head.shape[1] - 8:
        cv2.putText(head, name, (4, 14), font, 0.4, black, 1, cv2.LINE_AA)
        return
    first, _, rest = name.partition(" ")
    for line, bottom in ((first, 8), (rest, 18)):
        fits = (head.shape[1] - 4) / max(cv2.getTextSize(line, font, 1.0, 1)[0][0], 1)
        cv2.putText(head, line, (2, bottom), font, min(0.34, fits), black, 1, cv2.LINE_AA)


def _png(image: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())


def read_progress(output: str) -> dict[str, Any]:
    """``progress.json`` of an output; empty before the first step."""
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(storage.join(output, PROGRESS)))
    except FileNotFoundError:
        return {}
    return content


class Watch:
    """Tells a person how a training is going: a bar on a terminal, else a line every 30 seconds; each warning once."""

    def __init__(
        self, output: str, priced: bool, say: Callable[[str], None], every_seconds: float = 30.0
    ) -> None:
        self.output = output
        self.priced = priced
        self.say = say
        self.every_seconds = every_seconds
        self._known: set[str] = set()
        self._started = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Watch:
        storage.remove(storage.join(self.output, PROGRESS))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._warn(read_progress(self.output))

    def line(self, progress: Mapping[str, Any]) -> str:
        """The state in one line."""
        begin = f"[{time.perf_counter() - self._started:6.0f} s]"
        if not progress:
            return f"{begin} waiting for workers"
        seen, total, values = progress["samples_seen"], progress["samples"], progress["values"]
        parts = [f"{seen:,} of {total:,} samples"]
        if "speed/samples_per_second" in values:
            parts.append(f"{values['speed/samples_per_second']:.1f} samples/s")
            parts.append(f"{values['speed/data_wait']:.0%} waiting for data")
        if "memory/gpu_gib" in values:
            parts.append(f"{values['memory/gpu_gib']:.1f} GiB of GPU memory")
        losses = [(name, value) for name, value in values.items() if name.startswith("loss/")]
        parts += [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in losses[:4]]
        if progress["eta_seconds"] is not None:
            parts.append(f"{_duration(progress['eta_seconds'])} left")
        if self.priced:
            parts.append(f"cost {progress['cost']:.2f}")
        return f"{begin} {', '.join(parts)}"

    def _warn(self, progress: Mapping[str, Any]) -> None:
        for kind, message in progress.get("warnings", {}).items():
            if kind not in self._known:
                self._known.add(kind)
                self.say(f"warning: {message}")

    def _repeat(self) -> None:
        if os.isatty(1):
            self._draw()
            return
        while not self._stop.wait(self.every_seconds):
            progress = read_progress(self.output)
            self._warn(progress)
            self.say(self.line(progress))

    def _draw(self) -> None:
        text = TextColumn("{task.description}", markup=False)
        with Progress(BarColumn(), text, console=Console(), transient=True) as bar:
            task = bar.add_task("waiting for workers", total=None)
            while not self._stop.wait(1.0):
                progress = read_progress(self.output)
                self._warn(progress)
                bar.update(
                    task,
                    completed=progress.get("samples_seen", 0),
                    total=progress.get("samples"),
                    description=self.line(progress),
                )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
