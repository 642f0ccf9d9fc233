"""What is tried on every machine before a run: each check says what is wrong, and how to mend it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import preflight, storage, tracking
from pipelines.download import DownloadConfig
from pipelines.preflight import Needs
from tests.clusters import free_ports

COOKIES = "# Netscape HTTP Cookie File\n.youtube.com\tTRUE\t/\tTRUE\t{expires}\tSID\t{value}\n"


@pytest.fixture
def needs(tmp_path: Path) -> Needs:
    """Of a run whose driver has written its token."""
    output = str(tmp_path / "out")
    storage.write_atomic(preflight.token_uri(output, "driver"), b"0815")
    return Needs(
        output=output,
        weights=("dlib_landmarks", "dlib_mmod"),
        download=DownloadConfig(),
        min_disk_gb=0.001,
        token="0815",
        versions=preflight.versions(),
    )


def test_a_machine_on_which_all_is_well(needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("HEADRAY_COOKIES", raising=False)
    told = preflight.Examiner().examine(needs)
    assert [name for name, _, _ in told] == [
        "versions",
        "weights",
        "cookies",
        "disk",
        "output",
        "mlflow",
    ]
    assert [text for _, good, text in told if not good] == []
    assert storage.names_below(needs.output) == ["work/doctor-driver"]


def test_other_versions_are_named(needs: Needs) -> None:
    good, told = preflight.check_versions(
        replace(needs, versions=dict(needs.versions) | {"ray": "1.0"})
    )
    assert not good
    assert told.startswith(f"ray {needs.versions['ray']} instead of 1.0: ")


def test_missing_weights_are_named_with_their_address(
    needs: Needs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HEADRAY_WEIGHTS", raising=False)
    monkeypatch.setattr(
        "models.frozen.weights._fetch", lambda *_: (_ for _ in ()).throw(OSError("no way there"))
    )
    good, told = preflight.check_weights(replace(needs, weights=("vgg19", "dlib_mmod", "ir_se50")))
    assert not good
    assert "vgg19-dcbb9e9d.pth" in told
    assert "recognition_arcface_ir_se50.pth" in told, "all that is missing, not the first"
    assert "HEADRAY_WEIGHTS" in told


def test_a_full_disk_is_told(needs: Needs) -> None:
    good, told = preflight.check_disk(replace(needs, min_disk_gb=1e9))
    assert not good
    assert "TMPDIR" in told


def other_token(needs: Needs, _: Path) -> Needs:
    return replace(needs, token="4711")


def unshared(needs: Needs, folder: Path) -> Needs:
    return replace(needs, output=str(folder / "elsewhere"))


def not_a_folder(needs: Needs, folder: Path) -> Needs:
    (folder / "file").write_text("")
    return replace(needs, output=str(folder / "file"))


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (other_token, "is not the driver's here: give s3://"),
        (unshared, "is not the driver's here: give s3://"),
        (not_a_folder, "cannot be written: "),
    ],
)
def test_an_output_that_is_not_the_drivers_is_told(
    change: Callable[[Needs, Path], Needs], cure: str, needs: Needs, tmp_path: Path
) -> None:
    good, told = preflight.check_output(change(needs, tmp_path))
    assert not good
    assert cure in told


@pytest.mark.parametrize(
    ("content", "good", "words"),
    [
        (COOKIES.format(expires=4_000_000_000, value="hush5"), True, "1 of 1 valid"),
        (COOKIES.format(expires=1_000_000_000, value="hush5"), False, "have expired: export them"),
        ("hush5 is no cookie file", False, "no Netscape cookie file"),
        (None, False, "put it on every node"),
    ],
)
def test_cookies_are_read_and_never_told(
    content: str | None,
    good: bool,
    words: str,
    needs: Needs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "cookies.txt"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("HEADRAY_COOKIES", str(path))
    found, told = preflight.check_cookies(needs)
    assert found == good
    assert words in told
    assert "hush5" not in told


def test_a_tracking_server_that_is_away_is_told(
    needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hush5@127.0.0.1:{port}")
    good, told = preflight.check_tracking(needs)
    assert not good
    assert "MLFLOW_TRACKING_PASSWORD" in told
    assert "hush5" not in told + tracking.find_trouble(f"http://me:hush5@127.0.0.1:{port}")


@pytest.mark.parametrize("ahead", [0.0, 90.0, -90.0])
def test_a_clock_is_wrong_only_by_what_the_way_does_not_explain(ahead: float) -> None:
    def ask() -> float:
        time.sleep(0.02)
        told = time.time() + ahead
        time.sleep(0.02)
        return told

    began = time.monotonic()
    offset = preflight.clock_offset(ask)
    assert offset == pytest.approx(ahead, abs=time.monotonic() - began)
    finding = preflight.judge_clock("here", offset, 5.0)
    assert finding.good == (ahead == 0)
    if ahead:
        assert f"{offset:+.1f} s from the driver's" in finding.told


def _reduce(rank: int, world_size: int, port: int, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    answers.put(preflight.all_reduce(rank, world_size, f"tcp://127.0.0.1:{port}", on_gpu=False))


@pytest.mark.slow
def test_ranks_add_up() -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    (port,) = free_ports(1)
    ranks = [context.Process(target=_reduce, args=(rank, 2, port, answers)) for rank in range(2)]
    for each in ranks:
        each.start()
    told = [answers.get(timeout=90) for _ in ranks]
    for each in ranks:
        each.join()
    assert [name for name, _ in told] == ["cpu", "cpu"]
    assert all(rate > 0 for _, rate in told)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_adds_up() -> None:
    (port,) = free_ports(1)
    name, rate = preflight.all_reduce(0, 1, f"tcp://127.0.0.1:{port}", on_gpu=True)
    assert name == torch.cuda.get_device_name(0)
    assert rate > 0
