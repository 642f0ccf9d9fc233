#!/usr/bin/env python
"""The whole path on real pictures in minutes, without a GPU and without the internet.

A public-domain portrait (astronaut Eileen Collins, NASA, shipped by scikit-image) is moved by known motions into a
small corpus of videos, good and bad. The corpus is served on loopback and goes through the same jobs a user runs: from
a VoxCeleb2-style list to a verified WebDataset, a short training of each of the three models at toy size, their bundles in
MLflow's registry, and with those a head swap and an animation. Two hundred steps teach little: toy models make toy
pictures. What the demo shows is that every part works on this machine.
"""

from __future__ import annotations

if not __package__:
    import script_path  # noqa: F401

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jobs import runtime
from pipelines import report, shards, storage, video
from pipelines.output import NothingUsableError

FACE = (163.0, 62.0, 285.0, 184.0)
"""Square around the face in the portrait, pixels, as an annotator would draw it: (left, top, right, bottom)."""
FACE_CENTRE = (224.0, 123.0)
ABOVE = 400
"""Rows of backdrop added above the portrait."""
CAMERA_DISTANCE = 900.0
"""Of the camera that sees the portrait turn, portrait pixels."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Make a small corpus, serve it on loopback, preprocess it, verify the result."""

    output: str = "demo"
    """Folder that receives everything; an earlier demo in it is replaced."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One video of the corpus."""

    identity: str
    video: str
    size: tuple[int, int] = (1280, 720)
    """(width, height), pixels."""
    rate: Fraction = Fraction(25)
    """Frames per second."""
    seconds: float = 3.0
    scale: float = 2.2
    """Size of the portrait; 1 is 512 pixels."""
    seed: int = 0
    """Of the motion."""
    mirrored: bool = False
    what: str = "portrait"
    """``portrait``, ``cut`` (portrait, then a cup of coffee, then the portrait) or ``coffee`` (no face)."""
    damage: str = ""
    """``truncated``: the file is cut at 60 %. ``missing``: listed but not on the server."""
    wanted: str = ""
    """What the job is expected to say: empty for published, else the cause."""


CORPUS = (
    Clip(identity="id00001", video="astronautA1", size=(1920, 1080), scale=2.6, seed=1),
    Clip(identity="id00001", video="astronautA2", rate=Fraction(30000, 1001), seed=2),
    Clip(identity="id00001", video="astronautA3", rate=Fraction(50), seconds=2.4, seed=3),
    Clip(
        identity="id00001", video="astronautA4", size=(720, 1280), rate=Fraction(24000, 1001), seed=4
    ),
    Clip(identity="id00001", video="astronautA5", what="cut", seconds=6.0, seed=5),
    Clip(identity="id00002", video="mirroredB-1", mirrored=True, seed=6),
    Clip(identity="id00002", video="mirroredB_2", mirrored=True, rate=Fraction(30), seed=7),
    Clip(
        identity="id00001", video="coffee-cup1", what="coffee", wanted="track: no face"
    ),
    Clip(
        identity="id00001", video="truncated_1", seed=8, damage="truncated",
        wanted="download: truncated",
    ),
    Clip(
        identity="id00001", video="toosmall--1", size=(320, 180), scale=0.55, seed=9,
        wanted="crop: small window",
    ),
    Clip(
        identity="id00001", video="goneforever", damage="missing", wanted="download: not found"
    ),
)  # fmt: skip


MOVING = ("astronautA4", "mirroredB-1")
"""Clips for the motion model; the first is also what is swapped into and what drives."""
SAMPLES = 400
"""What each model is trained on: two minutes for all three."""


def motion(clip: Clip, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the portrait is at each time: head turns as planar homographies, with drift and nods.

    Args:
        clip: its size, scale, seed and mirroring decide the path.
        times: (n,) seconds.

    Returns:
        (n, 3, 3) homographies, portrait pixels → frame pixels (pixel centres at integers, as OpenCV has them).
    """
    random = np.random.default_rng(clip.seed)
    phase = random.uniform(0, 2 * np.pi, 5)
    speed = random.uniform(1.2, 2.4, 5)
    wave = np.sin(times[:, None] * speed + phase)  # (n, 5)
    roll, yaw, pitch = (
        np.deg2rad(6) * wave[:, 0],
        np.deg2rad(14) * wave[:, 1],
        np.deg2rad(6) * wave[:, 2],
    )
    width, height = clip.size
    centre = np.array([width / 2, height * 0.45]) + wave[:, 3:5] * (0.04 * width, 0.03 * height)
    flip = np.diag([-1.0 if clip.mirrored else 1.0, 1.0, 1.0])
    origin = np.array([[1, 0, -FACE_CENTRE[0]], [0, 1, -FACE_CENTRE[1]], [0, 0, 1.0]])
    out = np.empty((len(times), 3, 3))
    for i in range(len(times)):
        turn = (
            cv2.Rodrigues(np.array([0.0, 0.0, roll[i]]))[0]
            @ cv2.Rodrigues(np.array([0.0, yaw[i], 0.0]))[0]
            @ cv2.Rodrigues(np.array([pitch[i], 0.0, 0.0]))[0]
        )
        view = np.array(  # the turned plane seen from CAMERA_DISTANCE
            [
                [CAMERA_DISTANCE * turn[0, 0], CAMERA_DISTANCE * turn[0, 1], 0],
                [CAMERA_DISTANCE * turn[1, 0], CAMERA_DISTANCE * turn[1, 1], 0],
                [turn[2, 0], turn[2, 1], CAMERA_DISTANCE],
            ]
        )
        place = np.array([[clip.scale, 0, centre[i, 0]], [0, clip.scale, centre[i, 1]], [0, 0, 1]])
        out[i] = place @ view @ flip @ origin
        out[i] /= out[i, 2, 2]
    return out


def picture(
    clip: Clip,
    portrait: NDArray[np.uint8],
    coffee: NDArray[np.uint8],
    homography: NDArray[np.float64],
    share: float,
) -> NDArray[np.uint8]:
    """One frame, (height, width, 3) RGB; ``share`` is the part of the clip that has passed, 0..1."""
    if clip.what == "coffee" or (clip.what == "cut" and 0.45 <= share < 0.55):
        shift = np.array([[3.2, 0, -200 * share], [0, 3.2, -100 * share]])
        return np.asarray(
            cv2.warpAffine(
                coffee, shift, clip.size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
            ),
            np.uint8,
        )
    # Mirroring the portrait upwards would put a second head there: the backdrop is stretched instead.
    above = cv2.GaussianBlur(
        cv2.copyMakeBorder(portrait[:8], ABOVE - 8, 0, 0, 0, cv2.BORDER_REPLICATE), (0, 0), 6
    )
    tall = np.concatenate([above, portrait])
    raised = homography @ np.array([[1, 0, 0], [0, 1, -ABOVE], [0, 0, 1.0]])
    flags = cv2.INTER_AREA if clip.scale < 1 else cv2.INTER_CUBIC
    warped = cv2.warpPerspective(
        tall, raised, clip.size, flags=flags, borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(warped, np.uint8)


def frame_times(clip: Clip) -> NDArray[np.float64]:
    """(n,) presentation times, seconds."""
    count = round(clip.seconds * clip.rate)
    return np.arange(count) / float(clip.rate)


def annotation(clip: Clip) -> str:
    """The clip's text file in VoxCeleb2's own form: boxes every 1/25 s, fractions, moving in coarse steps."""
    frames = np.arange(2, int(clip.seconds * 25) - 2)
    homographies = motion(clip, frames / 25)
    left, top, right, bottom = FACE
    corners = np.array([[left, top, 1], [right, top, 1], [left, bottom, 1], [right, bottom, 1]])
    width, height = clip.size
    lines = [
        f"Identity  : \t{clip.identity}",
        f"Reference : \t{clip.video}",
        "Offset    : \t1",
        "FV Conf   : \t20.000\t(1)",
        "ASD Conf  : \t4.000",
        "",
        "FRAME \tX \tY \tW \tH ",
    ]
    for frame, homography in zip(
        frames, homographies[frames - frames[0] - (frames - frames[0]) % 3], strict=True
    ):
        projected = corners @ homography.T
        points = projected[:, :2] / projected[:, 2:]
        side = max(np.ptp(points[:, 0]), np.ptp(points[:, 1]))
        x, y = points.mean(0) - side / 2
        box = (x / width, y / height, side / width, side / height)
        lines.append(f"{frame:06d} \t" + " \t".join(f"{value:.3f}" for value in box) + " ")
    return "\n".join(lines) + "\n"


def make_corpus(folder: Path, clips: Sequence[Clip] = CORPUS) -> None:
    """Write ``videos/<video>.mp4`` and the list ``list/txt/...`` with ``vox2_meta.csv`` for the clips."""
    import skimage.data

    portrait, coffee = skimage.data.astronaut(), skimage.data.coffee()
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for clip in clips:
        text = folder / "list" / "txt" / clip.identity / clip.video / "00001.txt"
        text.parent.mkdir(parents=True)
        text.write_text(annotation(clip))
        if clip.damage == "missing":
            continue
        times = frame_times(clip)
        pictures = (
            picture(clip, portrait, coffee, homography, i / len(times))
            for i, homography in enumerate(motion(clip, times))
        )
        path = videos / f"{clip.video}.mp4"
        video.encode(path, pictures, clip.rate)
        if clip.damage == "truncated":
            with path.open("rb+") as file:
                file.truncate(int(path.stat().st_size * 0.6))
    meta = "VoxCeleb2 ID ,VGGFace2 ID ,Gender ,Set \nid00001 ,n000001 ,f ,dev \nid00002 ,n000002 ,f ,test \n"
    (folder / "list" / "vox2_meta.csv").write_text(meta)


class Server(http.server.ThreadingHTTPServer):
    """Says nothing when a client hangs up early, as yt-dlp does after its first look at a file."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing for a connection that was reset; the usual report for anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without writing a line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The folder on a free port of 127.0.0.1; yields ``http://127.0.0.1:PORT``."""
    handler = functools.partial(Handler, directory=str(folder))
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_job(name: str, *arguments: str) -> int:
    """Run another job as a user would; returns its exit code."""
    command = [sys.executable, str(runtime.REPOSITORY / "jobs" / f"{name}.py"), *arguments]
    runtime.console.print(f"\n$ python jobs/{name}.py {' '.join(arguments)}")
    return subprocess.run(command).returncode


def job() -> None:
    """Corpus, server, preprocess, verify, and whether each video ended as it should."""
    config = runtime.parse({"default": DemoConfig()}, __doc__ or "")
    folder = Path(config.output).resolve()
    if folder.exists() and not (folder / "demo.txt").exists():
        runtime.usage(f"--output {folder}: exists and is not an earlier demo; give another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "demo.txt").write_text("made by jobs/demo.py; replaced by its next run\n")
    say = runtime.console.print
    say(f"drawing {len(CORPUS)} videos into {folder / 'videos'}")
    make_corpus(folder)
    dataset = str(folder / "dataset")
    with serve(folder / "videos") as url:
        code = run_job(
            "preprocess",
            "laptop",
            f"--input={folder / 'list'}",
            f"--output={dataset}",
            f"--download.url-template={url}/{{video}}.mp4",
            "--identities.min-twin-cosine=1",  # all its people are one portrait
        )
    if code:
        raise SystemExit(code)
    code = run_job("dataset", "verify", f"--dataset={dataset}")
    if code:
        raise SystemExit(code)
    wrong = unexpected(dataset)
    for line in wrong:
        say(f"unexpected: {line}")
    if wrong:
        raise NothingUsableError("the demo's videos did not all end as they should (see above)")
    say(
        f"\nall {len(CORPUS)} videos ended as they should; look at {storage.join(dataset, report.PAGE)}"
    )
    train(folder, dataset)
    say(
        f"\nthe models have seen {SAMPLES} samples each and are a thousandth of their real size: what they make below has the place, "
        "outline and colours of a head and no face, which is all that toy models can do"
    )
    use(folder)
    say(f"\neverything is in {folder}; the pictures to look at:")
    say(f"  {folder / 'swapped.mp4.preview.png'}")
    say(f"  {folder / 'animated.mp4'}")
    say("your own list: python jobs/preprocess.py -h")


def must_run(name: str, *arguments: str) -> None:
    """:func:`run_job`, whose failure is ours."""
    code = run_job(name, *arguments)
    if code:
        raise SystemExit(code)


def train(folder: Path, dataset: str) -> None:
    """Bundles of all three models, registered in MLflow, from the dataset and from clips for the motion model."""
    moving = folder / "moving"
    for clip in CORPUS:
        if clip.video in MOVING:
            (moving / clip.identity).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "videos" / f"{clip.video}.mp4", moving / clip.identity)
    clips = str(folder / "clips")
    must_run(
        "preprocess",
        "motion",
        f"--input={moving}",
        f"--output={clips}",
        "--identities.min-twin-cosine=1",
    )
    # the averages of the presets are made for days: a few hundred steps would hardly move them
    for name, data, average in (
        ("aligner", dataset, ["--learner.ema-decay=0.95"]),
        ("blender", dataset, ["--learner.ema=0.95"]),
        ("motion", clips, []),
    ):
        must_run(
            f"train_{name}",
            "smoke",
            f"--dataset={data}",
            f"--output={folder / name}",
            "--held-out.split=train",  # two people are too few for another
            f"--training.samples={SAMPLES}",
            f"--training.evaluate-every={SAMPLES // 2}",
            f"--training.checkpoint-every={SAMPLES // 2}",
            "--training.log-every=20",
            "--learner.lr=0.001",
            *average,
        )


def use(folder: Path) -> None:
    """A head swap and an animation with the bundles just trained (``models:/headray-aligner@candidate`` is the same one)."""
    import skimage.data

    portrait = folder / "portrait.png"
    cv2.imwrite(str(portrait), np.ascontiguousarray(skimage.data.astronaut()[:300, :, ::-1]))
    clip = folder / "videos" / f"{MOVING[0]}.mp4"
    must_run(
        "swap",
        f"--aligner={folder / 'aligner' / 'bundle'}",
        f"--blender={folder / 'blender' / 'bundle'}",
        f"--source={portrait}",
        f"--target={clip}",
        f"--output={folder / 'swapped.mp4'}",
        "--preview",
    )
    must_run(
        "animate",
        f"--motion={folder / 'motion' / 'bundle'}",
        f"--source={portrait}",
        f"--driving={clip}",
        f"--output={folder / 'animated.mp4'}",
    )


def unexpected(dataset: str) -> list[str]:
    """Videos of the corpus whose row in the ledger is not the wanted one, a line each."""
    rows = {
        row["video"]: row
        for row in shards.read_ledger(dataset).to_pylist()
        if row["kind"] == "video"
    }
    wrong = []
    for clip in CORPUS:
        row = rows[clip.video]
        found = "" if row["state"] == "published" else f"{row['stage']}: {row['cause']}"
        if found != clip.wanted:
            wrong.append(
                f"{clip.video}: {found or 'published'}, should be {clip.wanted or 'published'} ({row['detail']})"
            )
    return wrong


if __name__ == "__main__":
    runtime.main(job)
