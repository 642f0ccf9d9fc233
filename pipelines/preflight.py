"""What every machine of a cluster must be able to do before a run, tried out: jobs/doctor.py tells of it.

An :class:`Examiner` runs on each node, whatever its kind, and does there what a stage or a trainer will do: finds the weights,
opens the cookie file, writes to the output and reads what the driver wrote. GPUs are tried together, by an all-reduce over
NCCL between all of them. Nothing here raises for what is wrong with a machine: it becomes a :class:`Finding` with its cure.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.cookiejar import LoadError, MozillaCookieJar
from typing import TYPE_CHECKING, Any

from models.frozen import weights
from pipelines import nodes, storage, tracking
from pipelines.download import DownloadConfig, fetch_canary, find_cookies
from pipelines.output import WORK
from pipelines.schema import OFF_GPU_NODES, one_line

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "numpy",
    "opencv-python",
    "pyarrow",
    "mlflow",
    "s3fs",
    "yt-dlp",
)
"""Whose versions must be the driver's on every node: they decide pixels, or what can be unpickled."""
REDUCED_BYTES = 64 * 2**20
"""Of the all-reduce that is timed: about the gradients of one bucket."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was tried in one place."""

    place: str
    """Address and kind of a node, or ``cluster``."""
    what: str
    good: bool
    told: str
    """What was seen; of something bad with its cure."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of every node."""

    output: str
    weights: tuple[str, ...]
    """Names of :data:`models.frozen.weights.REGISTRY`."""
    download: DownloadConfig
    min_disk_gb: float
    token: str
    """What the driver has written below the output."""
    versions: Mapping[str, str]
    """Of the driver's Python and :data:`PACKAGES`."""


def versions() -> dict[str, str]:
    """Of Python and :data:`PACKAGES` in this process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def token_uri(output: str, name: str) -> str:
    """Of a file that only says that somebody could write it; the work folder may be there before a run."""
    return storage.join(output, WORK, f"doctor-{name}")


# --- one node -------------------------------------------------------------------------------------------------

Check = Callable[[Needs], tuple[bool, str]]


def check_versions(needs: Needs) -> tuple[bool, str]:
    """The same packages as on the head."""
    here = versions()
    differing = [
        f"{name} {here[name]} instead of {wanted}"
        for name, wanted in needs.versions.items()
        if here[name] != wanted
    ]
    if differing:
        return False, f"{', '.join(differing)}: start this node from the image of the head"
    return True, f"python {here['python']}, ray {here['ray']}, torch {here['torch']}"


def check_weights(needs: Needs) -> tuple[bool, str]:
    """Found, or downloaded into this node's cache, and what they should be."""
    missing = []
    for name in needs.weights:
        try:
            weights.find(name)
        except weights.WeightsError as error:
            missing.append(str(error))
    if missing:
        return False, "; ".join(missing)
    return True, f"{len(needs.weights)} files, hashes right"


def check_disk(needs: Needs) -> tuple[bool, str]:
    """Room for downloads, spilled blocks and copies of shards."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free / 1e9
    told = f"{free:,.0f} GB free in {place}"
    if free < needs.min_disk_gb:
        return False, f"{told}, {needs.min_disk_gb:,.0f} wanted: a larger disk, or another TMPDIR"
    return True, told


def check_output(needs: Needs) -> tuple[bool, str]:
    """Written, read back, and seen to be the same place as the driver's."""
    own = token_uri(needs.output, f"node-{uuid.uuid4().hex}")
    try:
        storage.write_atomic(own, needs.token.encode())
        back = storage.read_bytes(own)
        storage.remove(own)
    except Exception as error:  # every kind of storage has its own kinds
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        return (
            False,
            f"{needs.output} cannot be written: {reason}; give this node the right to, or another --output",
        )
    try:
        shared = storage.read_bytes(token_uri(needs.output, "driver")).decode() == needs.token
    except FileNotFoundError:
        shared = False
    if not shared or back.decode() != needs.token:
        return (
            False,
            f"{needs.output} is not the driver's here: give s3://..., or a folder that all nodes share",
        )
    return True, f"{needs.output} written and read"


def check_cookies(needs: Needs) -> tuple[bool, str]:
    """A Netscape file in which something is still valid. Its content is not told."""
    path = find_cookies(needs.download)
    if not path:
        return True, "none are used"
    jar = MozillaCookieJar(path)
    try:
        jar.load(ignore_discard=True, ignore_expires=True)
    except (OSError, LoadError) as error:
        reason = type(error).__name__
        return (
            False,
            f"{path}: no Netscape cookie file can be read there ({reason}): put it on every node",
        )
    valid = [cookie for cookie in jar if not cookie.is_expired()]
    if not valid:
        return (
            False,
            f"{path}: all {len(jar)} cookies have expired: export them from the browser again",
        )
    return True, f"{path}: {len(valid)} of {len(jar)} valid"


def check_tracking(_: Needs) -> tuple[bool, str]:
    """Rank 0 may run here and sends its records from here."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        return True, "no server is used"
    trouble = tracking.find_trouble(uri)
    return not trouble, trouble or "answers"


NODE_CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "weights": check_weights,
    "cookies": check_cookies,
    "disk": check_disk,
    "output": check_output,
    "mlflow": check_tracking,
}


class Examiner:
    """Actor: tries everything on the node where it lives."""

    def clock(self) -> float:
        """This node's time, seconds since 1970."""
        return time.time()

    def examine(self, needs: Needs) -> list[tuple[str, bool, str]]:
        """Name, outcome and what was seen of each of :data:`NODE_CHECKS`."""
        return [(name, *check(needs)) for name, check in NODE_CHECKS.items()]


def examine_nodes(needs: Needs, max_clock_seconds: float, patience_seconds: float) -> list[Finding]:
    """Examine every node that is alive, all at once. Ray must be connected.

    Args:
        needs: of the run.
        max_clock_seconds: that a node's clock may differ from the driver's.
        patience_seconds: after which a node that does not answer is told of.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(num_cpus=0)(Examiner)
    examiners = []
    for node in nodes.alive():
        place = f"{node['NodeManagerAddress']} ({nodes.pool_of(node)})"
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        examiners.append((place, actor.options(scheduling_strategy=there).remote()))
    running = [(place, examiner, examiner.examine.remote(needs)) for place, examiner in examiners]
    findings = []
    for place, examiner, told in running:
        try:
            seen = ray.get(told, timeout=patience_seconds)
            offset = clock_offset(partial(_ask_clock, examiner))
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 160)
            told_reason = f"does not answer ({reason}): end this node, another takes its place"
            findings.append(Finding(place=place, what="node", good=False, told=told_reason))
            continue
        findings += [
            Finding(place=place, what=what, good=good, told=text) for what, good, text in seen
        ]
        findings.append(judge_clock(place, offset, max_clock_seconds))
    return findings


def _ask_clock(examiner: Any) -> float:
    import ray

    told: float = ray.get(examiner.clock.remote())
    return told


def clock_offset(ask: Callable[[], float]) -> float:
    """Seconds by which another clock is ahead of ours at least, or behind (negative): 0 if the way there explains it."""
    best = float("inf")
    for _ in range(3):
        sent = time.time()
        there = ask()
        received = time.time()
        offset = max(0.0, there - received) or min(0.0, there - sent)
        best = min(best, offset, key=abs)
    return best


def judge_clock(place: str, offset: float, limit: float) -> Finding:
    """Signatures of object stores and the output's lock compare clocks."""
    if abs(offset) > limit:
        told = (
            f"{offset:+.1f} s from the driver's, {limit:g} allowed: start its time service (chrony)"
        )
        return Finding(place=place, what="clock", good=False, told=told)
    return Finding(place=place, what="clock", good=True, told=f"within {limit:g} s of the driver's")


# --- the cluster ----------------------------------------------------------------------------------------------


def examine_canary(config: DownloadConfig, patience_seconds: float) -> Finding:
    """One video fetched where all will be: on a node that is no GPU node, once it has a CPU for it."""
    import ray

    fetch = ray.remote(num_cpus=config.resources.num_cpus, label_selector=OFF_GPU_NODES)(
        fetch_canary
    )
    running = fetch.remote(config)
    try:
        canary = ray.get(running, timeout=patience_seconds)
    except (ray.exceptions.RayError, TimeoutError) as error:
        ray.cancel(running, force=True)
        reason = one_line(f"{type(error).__name__}: {error}", 160)
        told = (
            f"not fetched in {patience_seconds:.0f} s ({reason}): does the site answer, and has a node without a GPU "
            f"{config.resources.num_cpus:g} CPUs free (ray status)?"
        )
        return Finding(place="cluster", what="canary", good=False, told=told)
    if canary.live:
        told = f"{canary.url}: {canary.size / 1e6:.1f} MB, {canary.probe['height']} lines"
        return Finding(place="cluster", what="canary", good=True, told=told)
    told = (
        f"{canary.url}: {canary.cause} ({canary.detail}): update yt-dlp, give cookies or a proxy, wait, or another "
        "--download.canary"
    )
    return Finding(place="cluster", what="canary", good=False, told=told)


def await_workers(gpus: int, patience_seconds: float) -> Finding:
    """Ask for a CPU on a node that may hold videos, or for GPUs; an autoscaling cluster starts what is missing.

    The nodes stay until they have been idle for long enough, so what comes next finds them.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles: list[dict[str, float]] = [{"GPU": 1} for _ in range(gpus)] or [{"CPU": 1}]
    group = placement_group(
        bundles, bundle_label_selector=None if gpus else [OFF_GPU_NODES], strategy="PACK"
    )
    wanted = f"{gpus} GPUs" if gpus else "a CPU for downloads"
    started = time.perf_counter()
    try:
        ray.get(group.ready(), timeout=patience_seconds)
    except ray.exceptions.GetTimeoutError:
        here = ray.cluster_resources()
        told = (
            f"not there after {patience_seconds:.0f} s (now {here.get('CPU', 0):.0f} CPUs, {here.get('GPU', 0):.0f} "
            "GPUs): look at max_workers and quotas (ray status)"
        )
        return Finding(place="cluster", what=wanted, good=False, told=told)
    finally:
        remove_placement_group(group)
    told = f"there after {time.perf_counter() - started:.0f} s"
    return Finding(place="cluster", what=wanted, good=True, told=told)


class Rank:
    """Actor: one GPU of an all-reduce, or one process without."""

    def address(self) -> str:
        """A free port of this node, ``tcp://HOST:PORT``."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def reduce(self, rank: int, world_size: int, address: str, on_gpu: bool) -> tuple[str, float]:
        """:func:`all_reduce` here; on whose device, and its GB/s."""
        return all_reduce(rank, world_size, address, on_gpu)


def all_reduce(rank: int, world_size: int, address: str, on_gpu: bool) -> tuple[str, float]:
    """Sum a tensor over all ranks and look at the sum.

    Returns:
        the device's name, and gigabytes of the tensor a second, the median of five.

    Raises:
        RuntimeError: the sum is wrong, or the ranks do not reach each other.
    """
    import torch
    from torch import distributed

    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=address, rank=rank, world_size=world_size
    )
    try:
        seconds = []
        for _ in range(6):  # the first one also connects
            values = torch.full((REDUCED_BYTES // 4,), float(rank + 1), device=device)
            began = time.perf_counter()
            distributed.all_reduce(values)
            _finish(device)
            seconds.append(time.perf_counter() - began)
            wanted = world_size * (world_size + 1) / 2
            if not bool((values == wanted).all()):
                raise RuntimeError(
                    f"rank {rank}: an all-reduce gave {values[0].item()}, not {wanted}"
                )
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        return name, REDUCED_BYTES / 1e9 / sorted(seconds[1:])[2]
    finally:
        distributed.destroy_process_group()


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examine_links(num_ranks: int, on_gpu: bool, patience_seconds: float) -> Finding:
    """An all-reduce between all ranks of a training: NCCL between its GPUs, gloo between processes."""
    import ray

    what = "nccl" if on_gpu else "gloo"
    actor: Any = ray.remote(
        num_cpus=0 if on_gpu else 1, num_gpus=int(on_gpu), scheduling_strategy="SPREAD"
    )(Rank)
    ranks = [actor.remote() for _ in range(num_ranks)]
    try:
        address = ray.get(ranks[0].address.remote(), timeout=patience_seconds)
        told: Sequence[Any] = ray.get(
            [
                each.reduce.remote(rank, num_ranks, address, on_gpu)
                for rank, each in enumerate(ranks)
            ],
            timeout=patience_seconds,
        )
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = one_line(f"{type(error).__name__}: {getattr(error, 'cause', error)}", 200)
        text = (
            f"{num_ranks} ranks could not add up: {reason}; open all ports between the nodes, NCCL_SOCKET_IFNAME names the "
            "network, NCCL_DEBUG=INFO tells more"
        )
        return Finding(place="cluster", what=what, good=False, told=text)
    finally:
        for each in ranks:
            ray.kill(each)
    names = ", ".join(sorted({name for name, _ in told}))
    slowest = min(rate for _, rate in told)
    text = (
        f"{num_ranks} ranks ({names}) add up, {REDUCED_BYTES / 2**20:.0f} MiB at {slowest:.1f} GB/s"
    )
    return Finding(place="cluster", what=what, good=True, told=text)
