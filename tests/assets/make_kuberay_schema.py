"""KubeRay's definitions of RayCluster and RayJob → kuberay_schema.json, which tests/test_infra.py validates manifests with.

    python -m tests.assets.make_kuberay_schema kuberay/ray-operator/config/crd/bases

Made from KubeRay v1.7.0 (Apache-2.0). Descriptions are left out, and pod templates: those are Kubernetes' own, for which there
is a package. Objects are closed, as the API server's strict validation has them: a misspelt field is an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

POD_TEMPLATES = ("template", "submitterPodTemplate")
KINDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def close(schema: Any, name: str = "") -> Any:
    """A part of a CRD's schema without descriptions and pod templates, its objects closed."""
    if name in POD_TEMPLATES:
        return {"type": "object"}
    kept = {
        key: value
        for key, value in schema.items()
        if key in ("type", "enum", "required", "minimum", "maximum", "pattern", "minLength")
    }
    if "properties" in schema:
        kept["properties"] = {
            key: close(value, key) for key, value in schema["properties"].items() if key != "status"
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = close(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = close(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    return kept


def main(folder: Path) -> None:
    """Write the asset."""
    schemas = {}
    for kind, file in KINDS.items():
        definition = yaml.safe_load((folder / file).read_text())
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[kind] = close(schema)
    target = Path(__file__).with_name("kuberay_schema.json")
    target.write_text(json.dumps(schemas, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
