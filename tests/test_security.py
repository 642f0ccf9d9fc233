"""Nothing of what is shipped opens a door or holds a secret, and what a submitted job carries away is code.

That the running servers refuse who has no credentials is shown where they run: the dashboard in tests/test_submit.py, MLflow in
tests/test_many_nodes.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from tests.material import REPOSITORY

SHIPPED = ("*.yaml", "Dockerfile", "serve.sh", "*.md", "*.toml", "Makefile", "run")
FROM_ELSEWHERE = re.compile(r"\$\{?[A-Z_]+(:\?)?\}?|\$\(.*\)")
"""The value of a variable, or what a command printed."""
SECRET_NAME = re.compile(
    r"(?i)(password|passwd|secret_?key|secretaccesskey|access_?key(_?id)?|auth_token|api_?key)$"
)
LITERALS = {
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}\b"),
    "a password in a URL": re.compile(r"\w+://[^/\s:@'\"${}<]+:(?![A-Z]+@)[^/\s@'\"${}<]{3,}@"),
    "a token of Ray": re.compile(r"(?i)auth_token['\"]?\s*[:=]\s*['\"]?[0-9a-f]{32,}"),
}


def shipped() -> list[Path]:
    """What people start clusters and servers with, and read how to."""
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    names = [Path(name) for name in listed if not name.startswith("tests/")]
    return [name for name in names if any(name.match(pattern) for pattern in SHIPPED)]


def pairs(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key and plain value of a YAML document."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, dict | list):
                yield from pairs(value)
            else:
                yield str(key), value
    elif isinstance(node, list):
        for value in node:
            if isinstance(value, str) and "=" in value:  # -e NAME=VALUE
                name, _, text = value.removeprefix("-e ").partition("=")
                yield name, text
            else:
                yield from pairs(value)


def test_no_file_holds_a_secret() -> None:
    files = shipped()
    assert len(files) >= 15
    found = [
        f"{name}: {what}"
        for name in files
        for what, pattern in LITERALS.items()
        if pattern.search((REPOSITORY / name).read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "key: AKIAIOSFODNN7EXAMPLE",
        "uri: postgresql://mlflow:hunter22@database/mlflow",
        "RAY_AUTH_TOKEN=" + 8 * "0123abcd",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert any(pattern.search(text) for pattern in LITERALS.values())


def test_secrets_come_from_the_environment_or_secret_objects_only() -> None:
    checked = 0
    for name in shipped():
        if name.suffix != ".yaml":
            continue
        for document in yaml.safe_load_all((REPOSITORY / name).read_text()):
            for key, value in pairs(document):
                if SECRET_NAME.search(key) and not key.endswith("TOKEN_PATH"):
                    checked += 1
                    is_path = key.startswith("/") and str(value).startswith("~")
                    is_reference = value is None or FROM_ELSEWHERE.fullmatch(str(value))
                    assert is_reference or is_path, f"{name}: {key}"
    assert checked >= 5


def test_the_tracking_server_asks_who_is_there() -> None:
    folder = REPOSITORY / "infra" / "mlflow"
    script = (folder / "serve.sh").read_text()
    assert "--app-name basic-auth" in script
    assert "authenticate_request_basic_auth" in script
    assert "MLFLOW_HOST:-127.0.0.1" in script
    for name in ("ADMIN_PASSWORD", "FLASK_SERVER_SECRET_KEY", "BACKEND_STORE_URI"):
        assert re.search(rf"MLFLOW_(AUTH_)?{name}:\?", script), f"{name} must not have a default"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert "ports" not in services["database"]
    assert services["mlflow"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]


def test_on_kubernetes_only_who_has_the_token_gets_in() -> None:
    text = (REPOSITORY / "infra" / "kuberay" / "raycluster.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "headray-token"}
    assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for word in ("LoadBalancer", "NodePort", "hostPort", "hostNetwork: true", "privileged: true"):
        assert word not in text
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["envFrom"] == [{"secretRef": {"name": "headray-environment"}}]
            assert "env" not in container


CODE = ("jobs", "models", "pipelines")
PLANTED = (
    ".env", "infra/mlflow/headray-mlflow.env", "auth_token", "cookies.txt", "infra/cookies-me.txt", "me.pem", "infra/tls.key",
    "data/mine/dataset.json", "data/mine/shards/train-00000.tar", "runs/small/checkpoints/1.pt", "bundles/a/model.safetensors",
    "mlflow.db", "mlartifacts/1/picture.png", "demo/videos/a.mp4", ".venv/lib/module.py", "run.log", ".git/config",
    "tests/secret.py", "my_videos/anna/one.mp4", "vox2_meta.zip", "list.csv", "weights.json", "me.jpg", "secret.py", "id_rsa",
    ".aws/credentials", ".netrc", "venv/lib/module.py", "jobs/.env", "jobs/prod.env", "jobs/cookies.txt", "pipelines/me.pem",
    "models/model.safetensors", "models/frozen/vgg19-dcbb9e9d.pth", "jobs/out/dataset.json", "pipelines/anna.mp4",
)  # fmt: skip
"""What people have lying about in a tree in which they work."""


def test_what_a_job_carries_away_is_code(tmp_path: Path) -> None:
    """Ray's own packing of ``--working-dir .``, of a tree in which people work."""
    tree = tmp_path / "tree"
    for folder in (*CODE, "infra"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, tree / folder, ignore=ignored)
    for name in (".gitignore", ".rayignore", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(REPOSITORY / name, tree / name)
    for name in PLANTED:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("PLANTED")
    target = tmp_path / "upload.zip"
    create_package(str(tree), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        names = [name for name in package.namelist() if not name.endswith("/")]
        assert [name for name in names if package.read(name) == b"PLANTED"] == []
    wanted = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in CODE
        for pattern in ("*.py", "*.jinja")
        for path in (REPOSITORY / folder).rglob(pattern)
    }
    assert set(names) == wanted
    assert target.stat().st_size < 2 * 2**20
