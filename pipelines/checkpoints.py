"""What continues a training: one file in ``OUTPUT/checkpoints`` for each number of samples seen.

Written aside and renamed, so that a name that is there is a whole checkpoint, on a disk or in a bucket, whoever was
killed when. Read with ``weights_only=True``: a file from elsewhere cannot run code. Random numbers are not in it, since the
loop draws them anew from (seed, samples_seen, rank). docs/decisions/0005 says why these are not Ray Train's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines import storage
from pipelines.output import ConfigError
from pipelines.schema import one_line

if TYPE_CHECKING:
    from pipelines.training import Learner

FOLDER = "checkpoints"


def write(
    output: str, learner: Learner[Any], samples_seen: int, notes: dict[str, Any], keep: int
) -> str:
    """Write a checkpoint and delete all but the newest ``keep``.

    Args:
        output: of the job.
        learner: whose networks and optimizers are kept.
        samples_seen: by all ranks together.
        notes: numbers, text, lists and dictionaries of the loop's own.
        keep: how many stay.

    Returns:
        its URI.
    """
    content = {
        "samples_seen": samples_seen,
        "networks": learner.networks.state_dict(),
        "optimizers": {name: each.state_dict() for name, each in learner.optimizers.items()},
        "notes": notes,
    }
    uri = uri_of(output, samples_seen)
    if storage.is_local(uri):
        with (
            storage.local_aside(Path(storage.filesystem(uri)[1])) as aside,
            aside.open("wb") as file,  # torch refuses names that begin with a dot
        ):
            torch.save(content, file)
    else:
        with tempfile.TemporaryDirectory(prefix="headray-") as folder:
            made = Path(folder, "checkpoint.pt")
            torch.save(content, made)
            storage.put_file(made, uri)
    for name in listed(output)[:-keep]:
        storage.remove(storage.join(output, FOLDER, name))
    return uri


def uri_of(output: str, samples_seen: int) -> str:
    """Of the checkpoint of so many samples."""
    return storage.join(output, FOLDER, f"{samples_seen:015d}.pt")


def listed(output: str) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    names = storage.names_below(storage.join(output, FOLDER))
    return [name for name in names if name.endswith(".pt") and "/" not in name]


def newest(output: str) -> str:
    """URI of the newest checkpoint; empty when there is none."""
    names = listed(output)
    return storage.join(output, FOLDER, names[-1]) if names else ""


def samples_of(uri: str) -> int:
    """Samples seen, by the name of a checkpoint; 0 for none."""
    return int(Path(uri).stem) if uri else 0


def read(uri: str) -> dict[str, Any]:
    """A checkpoint, its tensors on the CPU.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    try:
        with storage.local_file(uri) as path:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{uri}: no checkpoint there") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = one_line(f"{type(error).__name__}: {error}", 120)
        raise ConfigError(
            f"{uri}: not a checkpoint, or damaged ({reason}); without it, the one before is taken"
        ) from None
    return content


def restore(content: dict[str, Any], learner: Learner[Any]) -> None:
    """Put a checkpoint into a learner of the same configuration. Raises ``RuntimeError`` naming tensors that do not fit."""
    learner.networks.load_state_dict(content["networks"])
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
