"""ray_cluster.yaml, as far as it can be proved without an account: Ray's own validator, and what must be true in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import runtime
from pipelines.schema import OFF_CPU_NODES, OFF_GPU_NODES
from pipelines.training import ClusterConfig
from tests.material import REPOSITORY


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The configuration with Ray's defaults filled in, past its validator."""
    config = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


def start_commands(cluster: dict[str, Any]) -> list[str]:
    """The lines that start Ray, head first."""
    lines = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [line for line in lines if "ray start" in line]


def test_nothing_runs_or_costs_while_nobody_asks(cluster: dict[str, Any]) -> None:
    workers = {
        name: kind
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }
    assert set(workers) == {"cpu", "gpu"}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert max(kind["max_workers"] for kind in workers.values()) <= cluster["max_workers"]
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    assert workers["cpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["gpu"]["resources"]["GPU"] >= 1


def test_only_who_has_the_token_gets_in(cluster: dict[str, Any]) -> None:
    options = " ".join(cluster["docker"]["run_options"])
    token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert token
    assert "RAY_AUTH_MODE=token" in options
    assert token[1] in cluster["file_mounts"]
    assert "RAY_AUTH_MODE" not in " ".join(start_commands(cluster))


def test_secrets_of_jobs_come_from_a_file_of_the_users(cluster: dict[str, Any]) -> None:
    """The account of MLflow, a proxy: in the environment of every process, and in no job's description."""
    assert cluster["file_mounts"]["/home/ray/headray/environment"] == "~/.ray/headray.env"
    for line in start_commands(cluster):
        assert ". /home/ray/headray/environment" in line


def test_videos_keep_off_gpu_nodes(cluster: dict[str, Any]) -> None:
    """The labels are those by which stages choose."""
    kinds = cluster["available_node_types"]
    assert {name: kinds[name]["labels"]["pool"] for name in ("cpu", "gpu")} == {
        "cpu": OFF_CPU_NODES["pool"].removeprefix("!"),
        "gpu": OFF_GPU_NODES["pool"].removeprefix("!"),
    }


def test_nothing_is_open_to_the_internet(cluster: dict[str, Any]) -> None:
    head, worker = start_commands(cluster)
    assert "--dashboard-host=127.0.0.1" in head
    assert "dashboard" not in worker
    assert "security_group" not in cluster["provider"]  # Ray's own group opens SSH to the world
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_machines_get_the_tested_versions(cluster: dict[str, Any]) -> None:
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    kinds = cluster["available_node_types"].values()
    images = [cluster["docker"]["image"]]
    images += [kind["docker"]["worker_image"] for kind in kinds if "docker" in kind]
    assert len(images) == 2
    for image in images:
        assert image.startswith(f"rayproject/ray:{pins['ray']}-py311-")
    for commands in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        assert "--constraint constraints.txt" in commands[-1]
    sources = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert sources == ["pyproject.toml", "constraints.txt"]
    assert all((REPOSITORY / path).is_file() for path in sources)


@pytest.mark.slow
def test_workers_elsewhere_need_a_tracking_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two real Ray nodes: files of one cannot be MLflow's store for the other. One node that holds all workers can."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    size = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        runtime.require_reach(ClusterConfig(num_workers=2))
        with pytest.raises(SystemExit) as ended:
            runtime.require_reach(ClusterConfig(num_workers=3))  # an autoscaler would start a node
        assert ended.value.code == runtime.USAGE
        cluster.add_node(**size)
        with pytest.raises(SystemExit) as ended:
            runtime.require_reach(ClusterConfig(num_workers=2))
        assert ended.value.code == runtime.USAGE
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in lines if "MLFLOW_TRACKING_URI is not set" in line]) == 2
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
        runtime.require_reach(ClusterConfig(num_workers=2))
    finally:
        ray.shutdown()
        cluster.shutdown()
