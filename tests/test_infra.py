"""infra/, as far as it can be proved without a cluster or Docker: schemas, linters, and what must be true in it."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as derive_autoscaling_config,
)
from ray.autoscaler._private.util import validate_config

from jobs import runtime
from pipelines.schema import OFF_GPU_NODES
from tests.material import REPOSITORY

INFRA = REPOSITORY / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
DOCKERFILES = sorted(INFRA.rglob("Dockerfile"))
KUBERNETES = "1.31"
SCHEMAS = json.loads((REPOSITORY / "tests" / "assets" / "kuberay_schema.json").read_text())


def load(path: Path) -> dict[str, Any]:
    """The one document of a manifest."""
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


CLUSTER = load(INFRA / "kuberay" / "raycluster.yaml")
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_manifests_are_what_kuberay_accepts(path: Path) -> None:
    """KubeRay's own schema, closed: a field that it does not know is an error."""
    document = load(path)
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document, SCHEMAS[document["kind"]])


def test_the_schema_refuses_what_kuberay_would() -> None:
    for change in (
        {"rayVersion": 2.6},
        {"enableInTreeAutoscalling": True},
        {"workerGroupSpecs": [{}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(CLUSTER | {"spec": CLUSTER["spec"] | change}, SCHEMAS["RayCluster"])


@pytest.mark.parametrize("name", ["head", *GROUPS])
def test_pods_are_what_kubernetes_accepts(name: str) -> None:
    group = CLUSTER["spec"]["headGroupSpec"] if name == "head" else GROUPS[name]
    template = group["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = template["spec"]["containers"]
    wrong = template["spec"] | {"containers": [container | {"imagee": "x"}]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod | {"spec": wrong}, KUBERNETES, strict=True)


def test_the_network_lets_in_the_operator_alone() -> None:
    rules = CLUSTER["spec"]["networkPolicy"]["head"]["ingressRules"]
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "head"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": rules},
    }
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    (rule,) = rules
    (sender,) = rule["from"]
    assert sender["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


def test_rays_autoscaler_reads_the_cluster_as_it_is_meant() -> None:
    """As the autoscaler does in its pod, then Ray's validator: both kinds of workers start at none, labels arrive."""
    cluster = CLUSTER | {"metadata": CLUSTER["metadata"] | {"namespace": "headray"}}
    config = derive_autoscaling_config(cluster)
    validate_config(config)
    kinds = config["available_node_types"]
    assert config["idle_timeout_minutes"] == 5
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    for name, kind in kinds.items():
        assert kind["min_workers"] == 0, name
    assert kinds["cpu"]["resources"]["CPU"] == 15  # a machine of 16 has no room for a pod of 16
    assert "GPU" not in kinds["cpu"]["resources"]
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["labels"]["pool"] == "gpu"
    assert kinds["cpu"]["labels"]["pool"] == "cpu"
    assert OFF_GPU_NODES == {"pool": "!gpu"}


def entrypoints() -> dict[str, str]:
    """Command of each RayJob by file."""
    return {
        path.stem: load(path)["spec"]["entrypoint"] for path in KUBERAY if "rayjob" in path.stem
    }


def commands() -> list[str]:
    """Every ``python jobs/NAME.py ...`` of the manifests and of infra/README.md, as a shell would have it."""
    text = (INFRA / "README.md").read_text().replace("\\\n", " ").replace("$BUCKET", "bucket")
    shown = re.findall(r"-- python (jobs/\w+\.py .*?)(?: *#.*)?$", text, re.MULTILINE)
    return [*shown, *(each.removeprefix("python ") for each in entrypoints().values())]


def test_every_job_for_a_cluster_has_a_manifest() -> None:
    wanted = {"preprocess", "train_aligner", "train_blender", "train_motion", "doctor"}
    assert {each.split()[1] for each in entrypoints().values()} == {f"jobs/{name}.py" for name in wanted}  # fmt: skip
    assert {each.split()[0] for each in commands()} >= {f"jobs/{name}.py" for name in wanted}
    for path in KUBERAY:
        if path.stem in entrypoints():
            spec = load(path)["spec"]
            environment = yaml.safe_load(spec["runtimeEnvYAML"])
            assert set(environment) == {"working_dir", "env_vars"}
            assert spec["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}
            assert not spec["shutdownAfterJobFinishes"]  # KubeRay refuses it with clusterSelector


@pytest.mark.parametrize("command", commands())
def test_commands_are_what_the_jobs_take(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset and flags, by the job's own parser; and what a job refuses before it looks at anything else."""
    name, *words = shlex.split(command)
    job = importlib.import_module(f"jobs.{Path(name).stem}")
    monkeypatch.setattr(sys, "argv", [name, *words])
    config = runtime.parse(job.PRESETS, "")
    assert "bucket" in config.output.lower()
    if name == "jobs/train_blender.py":
        assert config.learner.perceptual == "none" or config.calibration
    if name == "jobs/train_motion.py":
        assert config.learner.stage == 1 or config.init_from


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_images_hold_the_tested_dependencies_and_no_code() -> None:
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert len(DOCKERFILES) == 2
    for path in DOCKERFILES:
        text = path.read_text()
        assert "--constraint constraints.txt" in text
        copied = [
            word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()
        ]
        sources = {word for word in copied if not word.startswith("--") and word != "./"}
        assert sources <= {
            "pyproject.toml", "constraints.txt", "infra/mlflow/requirements.txt", "infra/mlflow/serve.sh",
        }  # fmt: skip
        allowed = (REPOSITORY / ".dockerignore").read_text()
        assert all(f"!{source}\n" in allowed for source in sources)
        assert re.search(r"^USER [1-9]", text, re.MULTILINE)
    image = (INFRA / "docker" / "Dockerfile").read_text()
    assert f"rayproject/ray:{pins['ray']}-py311-${{VARIANT}}" in image
    assert CLUSTER["spec"]["rayVersion"] == pins["ray"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "ray[data,default,train]>=2.60,<2.64" in project["dependencies"]
    for line in (INFRA / "mlflow" / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or line.lower().partition("[")[0] in pins


def test_the_servers_script_is_shell() -> None:
    done = subprocess.run(["sh", "-n", str(INFRA / "mlflow" / "serve.sh")], capture_output=True)
    assert done.returncode == 0, done.stderr
    nothing = subprocess.run(
        ["sh", str(INFRA / "mlflow" / "serve.sh")],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert nothing.returncode != 0
    assert "MLFLOW_BACKEND_STORE_URI" in nothing.stderr
