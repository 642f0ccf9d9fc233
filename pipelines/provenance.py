"""What a file that was made says about itself: that it is synthetic, and which networks made it.

In the container (the comment that players show, and IPTC's digital source type), in the JSON beside the file, and, where the
library of the C2PA is installed and there is a certificate to sign with, as a signed manifest. Nobody can make such a mark
unremovable; it is for those who have no reason to remove it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import bundle
from pipelines import storage
from pipelines.download import public_url
from pipelines.output import ConfigError

COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for a recording into which a trained network has painted."""
CERTIFICATE, KEY = "HEADRAY_C2PA_CERTIFICATE", "HEADRAY_C2PA_KEY"
"""Environment: files of the certificate chain (PEM) and its private key (PEM, ES256) that sign manifests."""


def describe_bundle(uri: str) -> dict[str, Any]:
    """Which network a bundle holds: where it is, its class, the sha256 of its tensors, its dataset and commit."""
    card = bundle.read_card(uri)
    told = json.loads(storage.read_bytes(storage.join(uri, bundle.CONFIG)))
    tensors = storage.read_bytes(storage.join(uri, bundle.MODEL))
    return {
        "uri": public_url(uri),
        "class": told["class"],
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "dataset": card.get("dataset", {}),
        "git_commit": card.get("code", {}).get("commit", ""),
    }


def statement(what: str, bundles: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence for people.

    Args:
        what: was done, such as ``the head in this video was replaced``.
        bundles: :func:`describe_bundle` by role.
    """
    made_by = ", ".join(f"{role} {each['sha256'][:16]}" for role, each in bundles.items())
    return f"Synthetic media: {what} by neural networks (HeadRay; {made_by})."


def container_metadata(what: str, bundles: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Keys and values for a container."""
    return {
        "comment": statement(what, bundles),
        "digital_source_type": COMPOSITE,
        "synthetic_media": "true",
        "made_with": "HeadRay",
        **{f"bundle_{role}_sha256": each["sha256"] for role, each in bundles.items()},
    }


def can_sign() -> str:
    """Why no C2PA manifest will be written; empty when one will."""
    if importlib.util.find_spec("c2pa") is None:
        return "the package c2pa-python is not installed"
    missing = [name for name in (CERTIFICATE, KEY) if not os.environ.get(name)]
    return f"{' and '.join(missing)} not set" if missing else ""


def sign(path: Path, statement_: str, bundles: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a signed C2PA manifest to an mp4, in place.

    Raises:
        ConfigError: certificate or key cannot be used.
    """
    import c2pa

    manifest = {
        "claim_generator_info": [{"name": "HeadRay"}],
        "title": path.name,
        "format": "video/mp4",
        "assertions": [
            {
                "label": "c2pa.actions",
                "data": {
                    "actions": [
                        {
                            "action": "c2pa.created",
                            "digitalSourceType": COMPOSITE,
                            "description": statement_,
                            "parameters": {
                                f"bundle_{role}": each["sha256"] for role, each in bundles.items()
                            },
                        }
                    ]
                },
            }
        ],
    }
    signed = path.with_name(f"signed-{path.name}")
    try:
        settings = c2pa.C2paSignerInfo(
            alg=c2pa.C2paSigningAlg.ES256,
            sign_cert=Path(os.environ[CERTIFICATE]).read_bytes(),
            private_key=Path(os.environ[KEY]).read_bytes(),
            ta_url=None,
        )
        with c2pa.Signer.from_info(settings) as signer, c2pa.Builder(manifest) as builder:
            builder.sign_file(str(path), str(signed), signer)
    except (OSError, c2pa.C2paError) as error:
        raise ConfigError(f"{CERTIFICATE}, {KEY}: no manifest could be signed: {error}") from error
    signed.replace(path)
