"""Frames whose face is followed → the same frames with another head: steps 3 to 7 of a swap, in batches.

Align (the Aligner makes the source's head in the target's motion), parse both, let labels vote over three frames, blend, compose
with a feather, paste back at the frame's own resolution. A frame without a face goes through untouched. At most three batches
of frames are held at once, however long the video.

Only the painted region and its feather come from the window; every other pixel stays the frame's. Batches are filled up, so a
frame's pixels depend on its two neighbours' labels and on nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.aligner import augment
from models.aligner.network import Aligner
from models.blender.network import Blender, feathered
from models.frozen.parsing import Labels, Parser
from models.updates import Precision, autocast
from pipelines.annotate import frame_mask
from pipelines.geometry import Floats, Image, paste_back, transform, warp
from pipelines.samples import pictures
from pipelines.samples_aligner import expression_matrix

BORDER, BORDER_FEATHER = 10.0, 5.0
"""Nothing is pasted from so near a window's edge, and so far in it fades; pixels of a 512 px window (GHOST 2.0)."""
FOREGROUND = 0.5
"""Of the Aligner's mask, from which on it is the person."""
STEPS = ("decode", "crop", "align", "parse", "blend", "paste", "encode")
"""Whose seconds are counted; the first and the last by whoever decodes and encodes."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shot:
    """A frame of the target, and where its face is."""

    index: int
    """In the video."""
    frame: Image
    """(h, w, 3) RGB."""
    matrix: Floats | None
    """(2, 3) frame → window; None where there is no face."""
    landmarks: Floats | None
    """(68, 2) pixels of the frame."""


@dataclass(frozen=True)
class Drawn:
    """A window of the target and the head that is to replace its own."""

    window: Image
    """(S, S, 3) RGB of the target, black outside the frame."""
    inside: NDArray[np.bool_]
    """(S, S) False outside the frame."""
    animated: Tensor
    """(3, S, S) in [-1, 1], of the Aligner."""
    animated_labels: Labels
    """(S, S)."""
    labels: Labels
    """(S, S) of the target."""


@dataclass(frozen=True)
class Swapped:
    """A frame of the output, and how it came about."""

    shot: Shot
    image: Image
    """(h, w, 3): the frame itself where there is no face."""
    drawn: Drawn | None
    painted: Image | None
    """(S, S, 3) what the Blender made; worth something where ``alpha`` is above 0."""
    alpha: NDArray[np.float32] | None
    """(S, S) in [0, 1]: how much of it was pasted."""


class Clock:
    """Adds up what each step takes."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what happens inside as this step's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def taking(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; waiting for each counts as this step's."""
        iterator = iter(items)
        while True:
            with self.step(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class Swapper:
    """The networks, and one person's code."""

    def __init__(
        self,
        aligner: Aligner,
        blender: Blender,
        parser: Parser,
        code: Tensor,
        *,
        batch: int,
        precision: Precision = "fp32",
    ) -> None:
        """Take networks in eval mode, on the device of ``code``; windows must be of one size.

        Args:
            aligner: makes heads.
            blender: paints them into the scene.
            parser: labels windows.
            code: (1, d1 + d2) of the source.
            batch: frames worked on at once.
            precision: of convolutions.
        """
        assert aligner.config.size == blender.config.size, "pipelines.swap refuses such bundles"
        self.size = aligner.config.size
        self.clock = Clock()
        self._aligner, self._blender, self._parser = aligner, blender, parser
        self._code, self._batch, self._precision = code, batch, precision
        self._border = window_border(self.size)

    def swap(self, shots: Iterable[Shot]) -> Iterator[Swapped]:
        """Every frame, in order."""
        drawn = (pair for group in together(shots, self._batch) for pair in self._draw(group))
        for group in together(vote(drawn), self._batch):
            yield from self._paint(group)

    def _draw(self, shots: Sequence[Shot]) -> list[tuple[Shot, Drawn | None]]:
        """Windows, heads and labels of a batch."""
        found = [shot for shot in shots if shot.matrix is not None]
        if not found:
            return [(shot, None) for shot in shots]
        size, clock = self.size, self.clock
        with clock.step("crop"):
            windows = [warp(shot.frame, known(shot.matrix), (size, size)) for shot in found]
            points = np.stack([transform(known(s.matrix), known(s.landmarks)) for s in found])
            inside = [
                frame_mask(known(s.matrix), (s.frame.shape[1], s.frame.shape[0]), size)
                for s in found
            ]
        with clock.step("align"):
            animated, masks = self._align(windows, points)
            images = to_pictures(animated)
        with clock.step("parse"):
            labels = self._parser.parse(windows, points, inside)
            own = self._parser.parse(images, points, masks)
        made = iter(
            Drawn(*parts) for parts in zip(windows, inside, animated, own, labels, strict=True)
        )
        return [(shot, None if shot.matrix is None else next(made)) for shot in shots]

    @torch.inference_mode()
    def _align(
        self, windows: Sequence[Image], points: Floats
    ) -> tuple[Tensor, list[NDArray[np.bool_]]]:
        """Heads (n, 3, S, S) for windows, and where the person is in each."""
        config, device = self._aligner.config, self._code.device
        target = pictures(windows)
        reduced = F.avg_pool2d(target, self.size // config.encoder_size)
        faces = torch.cat(
            [
                augment.resample(
                    image[None],
                    torch.from_numpy(expression_matrix(face, config.encoder_size)),
                    config.encoder_size,
                )
                for image, face in zip(target, points, strict=True)
            ]
        )
        with autocast(device, self._precision):
            motion = self._aligner.encode_motion(
                self._filled(reduced).to(device), self._filled(faces).to(device)
            )
            portrait = self._aligner.generate(self._code.expand(len(motion), -1), motion)
        heads = portrait.image[: len(windows)].float()
        if portrait.mask is None:
            return heads, [np.ones((self.size, self.size), bool)] * len(windows)
        masks = (portrait.mask[: len(windows), 0] > FOREGROUND).cpu().numpy()
        return heads, list(masks)

    @torch.inference_mode()
    def _paint(self, group: Sequence[tuple[Shot, Drawn | None]]) -> Iterator[Swapped]:
        """Blend a batch, compose and paste back."""
        found = [drawn for _, drawn in group if drawn is not None]
        images: list[Image] = []
        alphas: list[NDArray[np.float32]] = []
        if found:
            with self.clock.step("blend"):
                images, alphas = self._blend(found)
        made = iter(zip(images, alphas, strict=True))
        for shot, drawn in group:
            if drawn is None:
                yield Swapped(shot, shot.frame, None, None, None)
                continue
            painted, alpha = next(made)
            with self.clock.step("paste"):
                image = paste_back(shot.frame, painted, known(shot.matrix), alpha)
            yield Swapped(shot, image, drawn, painted, alpha)

    def _blend(self, drawn: Sequence[Drawn]) -> tuple[list[Image], list[NDArray[np.float32]]]:
        """Pictures (S, S, 3) and alphas (S, S) of windows."""
        device = self._code.device

        def labels(maps: Sequence[Labels]) -> Tensor:
            return self._filled(torch.from_numpy(np.stack(maps))[:, None]).to(device)

        inside = np.stack([each.inside for each in drawn])
        with autocast(device, self._precision):
            image, painted = self._blender.repaint(
                self._filled(torch.stack([each.animated for each in drawn])).to(device),
                labels([each.animated_labels for each in drawn]),
                self._filled(pictures([each.window for each in drawn])).to(device),
                labels([each.labels for each in drawn]),
                self._filled(torch.from_numpy(inside)[:, None].float()).to(device),
            )
        region = feathered(painted, self._blender.config.feather)[: len(drawn), 0].cpu().numpy()
        # where a window shows nothing of the frame there is nothing to paste: without this, its black would bleed in
        alphas = list(region * inside * self._border)
        return to_pictures(image[: len(drawn)]), alphas

    def _filled(self, rows: Tensor) -> Tensor:
        """As many rows as a batch has, the last one repeated."""
        missing = self._batch - len(rows)
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def known(array: Floats | None) -> Floats:
    """What a shot with a face has."""
    assert array is not None
    return array


def to_pictures(images: Tensor) -> list[Image]:
    """(n, 3, h, w) in [-1, 1] to n RGB pictures."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return list(levels.permute(0, 2, 3, 1).cpu().contiguous().numpy())


def window_border(size: int) -> NDArray[np.float32]:
    """(size, size) 1 inside, fading to 0 towards the edges."""
    unit = size / 512
    place = np.arange(size) + 0.5
    depth = np.minimum(place, size - place)
    ramp = np.clip((depth / unit - BORDER) / BORDER_FEATHER, 0, 1)
    return np.minimum.outer(ramp, ramp).astype(np.float32)


def together(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """The items in lists of ``count``; the last may be shorter."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def vote(
    pairs: Iterable[tuple[Shot, Drawn | None]],
) -> Iterator[tuple[Shot, Drawn | None]]:
    """The same, each label map by majority with the frame before and the frame after; less flicker.

    A frame whose neighbour has no face keeps its labels.
    """
    before: Drawn | None = None  # as parsed, not as voted: a vote looks at three frames only
    now: tuple[Shot, Drawn | None] | None = None
    for following in pairs:
        if now is not None:
            yield now[0], _voted(before, now[1], following[1])
            before = now[1]
        now = following
    if now is not None:
        yield now


def _voted(before: Drawn | None, now: Drawn | None, after: Drawn | None) -> Drawn | None:
    if before is None or now is None or after is None:
        return now
    return replace(
        now,
        labels=majority(before.labels, now.labels, after.labels),
        animated_labels=majority(
            before.animated_labels, now.animated_labels, after.animated_labels
        ),
    )


def majority(before: Labels, now: Labels, after: Labels) -> Labels:
    """What two of three label maps (h, w) agree on; the middle one where none do."""
    return np.where(before == after, before, now)


def strip(swapped: Swapped, source: Image | None, height: int) -> Image:
    """Source, target, aligned, swapped side by side, (height, height x columns, 3); without a source the last three."""
    drawn = swapped.drawn
    assert drawn is not None
    size = drawn.window.shape[0]
    after = warp(swapped.image, known(swapped.shot.matrix), (size, size))
    columns = [drawn.window, to_pictures(drawn.animated[None])[0], after]
    if source is not None:
        columns.insert(0, source)
    how = cv2.INTER_AREA if size >= height else cv2.INTER_CUBIC
    resized = [cv2.resize(image, (height, height), interpolation=how) for image in columns]
    return np.asarray(np.hstack(resized), np.uint8)
