"""What every job does the same way: parse, print and record the configuration, connect to Ray, end with a code."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from models.frozen.weights import WeightsError
from pipelines import storage
from pipelines.download import public
from pipelines.output import CONFIG, ConfigError, NothingUsableError, flatten
from pipelines.shards import DatasetError
from pipelines.tracking import TrackingError
from pipelines.voxceleb import ListError

REPOSITORY = Path(__file__).resolve().parents[1]
DONE, FAULT, USAGE, NOTHING = 0, 1, 2, 3
USER_ERRORS = (ConfigError, DatasetError, ListError, TrackingError, WeightsError)

Config = TypeVar("Config")
console = Console(soft_wrap=True, highlight=False, markup=False)


def parse(presets: Mapping[str, Config], description: str) -> Config:
    """``JOB [PRESET] [--flag value ...]`` → the resolved configuration. ``-h`` explains every flag and exits.

    Args:
        presets: by name; the first is the default. Fields set to ``tyro.MISSING`` are required flags.
        description: shown by ``-h``; the presets are listed below it.
    """
    arguments = sys.argv[1:]
    names = list(presets)
    name = names[0]
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        if name not in presets:
            usage(f"preset {name!r} is unknown; the presets are {', '.join(names)}")
    default = presets[name]
    told = description
    if len(names) > 1:
        told += f"\n\nPresets: {', '.join(names)} (now: {name}; give it as the first word)."
    try:
        return tyro.cli(type(default), default=default, args=arguments, description=told)
    except ValueError as error:  # a check in __post_init__, which names the field and the value
        usage(str(error))


def location(flag: str, uri: str) -> str:
    """The value of a flag that names a file or folder, made absolute; one that nothing here can open is usage."""
    try:
        return storage.absolute(uri)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is missing
        usage(f"--{flag} {uri}: {error}")


def usage(message: str) -> NoReturn:
    """One readable line on stderr, exit code 2."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {message}")
    raise SystemExit(USAGE)


def main(job: Callable[[], None]) -> None:
    """Run a job and end the process with the code of docs/formats.md: 0 done, 2 usage, 3 nothing usable, 1 our fault."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        job()
    except USER_ERRORS as error:
        usage(str(error))
    except NothingUsableError as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"nothing usable: {error}")
        raise SystemExit(NOTHING) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues from here")
        raise SystemExit(130) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(FAULT) from None


def record(config: Any, output: str) -> dict[str, Any]:
    """Print the resolved configuration and write it with the code's version as ``OUTPUT/config.json``, without secrets.

    Returns:
        the flat configuration (``download.min_height``), for MLflow.
    """
    nested = public(dataclasses.asdict(config))
    flat = flatten(nested)
    console.print("configuration")
    own = {name: value for name, value in nested.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in nested.items() if isinstance(value, Mapping)}
    for group, values in [("", own), *groups.items()]:
        told = " ".join(f"{name}={value!r}" for name, value in flatten(values).items())
        console.print(f"  {group + ': ' if group else ''}{told}")
    content = {"config": nested, "code": code_version()}
    data = json.dumps(content, indent=1, sort_keys=True).encode()
    storage.write_atomic(storage.join(output, CONFIG), data)
    return flat


def code_version() -> dict[str, Any]:
    """Git commit and whether the tree differs from it.

    A submitted job runs in a copy without ``.git``; there ``HEADRAY_COMMIT`` of the job's environment is taken.
    """
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:
        return {"commit": os.environ.get("HEADRAY_COMMIT", "unknown"), "dirty": None}
    if head.returncode:
        return {"commit": os.environ.get("HEADRAY_COMMIT", "unknown"), "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(state.stdout.strip())}


def submitted() -> bool:
    """Whether Ray runs this process as the driver of a submitted job (in a temporary copy of the tree)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def require_answer(address: str) -> None:
    """End with 2 when nothing listens at ``HOST:PORT``: Ray itself would try for minutes and leave a page of stack."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto"
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), 10).close()
    except OSError as error:
        usage(f"RAY_ADDRESS={address}: no cluster there ({error}); unset it to use this machine")


def connect(minimum_cpus: float) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, else start a private one on this machine.

    Args:
        minimum_cpus: logical CPUs that the plan needs to run at all; a smaller machine is told it has that many.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # an "error" for each actor pool that is none
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    )
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # A token of this run only: other users of the machine cannot drive our workers, and nothing is written to ~/.ray.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if submitted():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    elif address != "local":
        environment = {
            "working_dir": str(REPOSITORY),
            "excludes": [".git", ".venv", "demo", "mlartifacts", "mlflow.db"],
        }
        require_answer(address)
        ray.init(
            address=address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(minimum_cpus + 0.999)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
