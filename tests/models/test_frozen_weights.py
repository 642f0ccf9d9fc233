"""Where weights are looked for, and that nothing with another hash is ever used."""

import csv
import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.aligner import network
from models.frozen import (
    arcface,
    detector,
    identity,
    landmarks,
    parsing,
    perceptual,
    pupils,
    vgg,
    weights,
)  # fmt: skip
from models.frozen.weights import REGISTRY, MissingWeightsError, Weights, WeightsError, find, locate
from tests.material import SHARED, needs_shared

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home without weights; returns its cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(weights.FOLDER_VARIABLE, raising=False)
    return tmp_path / "home" / ".cache" / "headray"


@pytest.fixture
def site():
    """A real server: /right, /wrong, /short (breaks off); returns its address and the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/missing":
                self.send_error(404)
                return
            body = CONTENT[::-1] if self.path == "/wrong" else CONTENT
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if self.path == "/short" else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def entry(url: str = "http://127.0.0.1:9/nobody") -> Weights:
    return Weights(
        name="net", file="net.pth", url=url, sha256=SHA256, size=len(CONTENT), licence="MIT"
    )


def message(entry: Weights, *, missing: bool = False) -> str:
    with pytest.raises(WeightsError) as caught:
        locate(entry)
    assert isinstance(caught.value, MissingWeightsError) == missing
    text = str(caught.value)
    assert "\n" not in text
    assert "net.pth" in text
    return text


def test_the_given_folder_comes_before_the_cache(home, tmp_path, monkeypatch):
    home.mkdir(parents=True)
    (home / "net.pth").write_bytes(CONTENT)
    assert locate(entry()) == home / "net.pth"
    (tmp_path / "net.pth").write_bytes(CONTENT)
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    assert locate(entry()) == tmp_path / "net.pth"


def test_a_download_is_checked_and_made_once(home, site):
    address, asked = site
    path = locate(entry(f"{address}/right"))
    assert path == home / "net.pth"
    assert path.read_bytes() == CONTENT
    assert locate(entry(f"{address}/right")) == path
    assert asked == ["/right"]
    assert {p.name for p in home.iterdir()} == {"net.pth", ".lock"}


@pytest.mark.parametrize("page", ["wrong", "short"])
def test_a_download_with_another_hash_is_not_kept(home, site, page):
    address, _ = site
    text = message(entry(f"{address}/{page}"))
    assert SHA256[:12] in text
    assert [p.name for p in home.iterdir()] == [".lock"]


def test_a_file_nobody_has_says_what_to_put_where(home, site):
    address, _ = site
    text = message(entry(f"{address}/missing"), missing=True)
    for part in (str(home), weights.FOLDER_VARIABLE, SHA256, str(len(CONTENT)), "404"):
        assert part in text


def test_a_cache_that_cannot_be_made_is_a_file_nobody_has(home):
    home.parents[1].write_text("a file where the home should be")
    text = message(entry(), missing=True)
    for part in (str(home), "cannot be written to (Not a directory)", weights.FOLDER_VARIABLE):
        assert part in text


def test_a_wrong_local_file_is_never_used_and_never_skipped(home, tmp_path, monkeypatch):
    home.mkdir(parents=True)
    (home / "net.pth").write_bytes(CONTENT)
    (tmp_path / "net.pth").write_bytes(CONTENT[:-1])
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    assert str(tmp_path / "net.pth") in message(entry())
    (tmp_path / "net.pth").write_bytes(CONTENT)  # put right: noticed without a new process
    assert locate(entry()) == tmp_path / "net.pth"


@pytest.mark.usefixtures("home")
def test_files_in_a_wheel_are_found_without_importing_it():
    for name in ("dlib_landmarks", "dlib_mmod", "dlib_descriptor"):
        path = find(name)
        assert path.stat().st_size == REGISTRY[name].size
    assert "face_recognition_models" not in sys.modules


def test_a_wheel_that_is_not_installed_is_named():
    absent = Weights(
        name="net", file="net.pth", url="", sha256="", size=0, licence="", package="no_such_wheel"
    )
    assert "pip install no_such_wheel" in message(absent)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError, match=r"known: alexnet, bisenet, .*yunet"):
        find("arcface")


def test_every_network_loads_entries_that_exist_and_hashes_agree_with_file_names():
    named = {
        name
        for module in (
            detector,
            landmarks,
            identity,
            parsing,
            pupils,
            arcface,
            vgg,
            perceptual,
            network,
        )
        for names in module.WEIGHTS.values()
        for name in names
    }
    assert named == set(REGISTRY)
    for name in (
        "fan",
        "sfd",
        "vgg19",
        "alexnet",
        "inception",
    ):  # torch.hub's naming: the stem ends in the first digits of the hash
        stem = REGISTRY[name].file.split(".")[0]
        assert REGISTRY[name].sha256.startswith(stem.rsplit("-", 1)[1])
    whole = [entry.name for entry in REGISTRY.values() if len(entry.sha256) == 64]
    assert set(REGISTRY) - set(whole) == {"resnext50"}


@needs_shared
@pytest.mark.real
def test_the_shared_files_are_the_registered_ones(monkeypatch):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(SHARED / "weights"))
    with (SHARED / "weights" / "manifest.csv").open(newline="") as file:
        shared = {row["file"]: row for row in csv.DictReader(file)}
    here = [entry for entry in REGISTRY.values() if entry.file in shared]
    names = {"yunet", "retinaface", "mobilefacenet", "unet19", "vgg_normalised_conv3_1"}
    assert {entry.name for entry in here} == names
    for entry in here:
        assert find(entry.name) == SHARED / "weights" / entry.file
        assert shared[entry.file]["sha256"] == entry.sha256
        assert int(shared[entry.file]["bytes"]) == entry.size
