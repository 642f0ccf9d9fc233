"""The command line, and what must be settled before the libraries that it uses are imported.

Arrow takes its memory from the C library. Its own pool keeps some MiB for each thread that ever used it (18 in the driver of 1,000 videos,
docs/log.md), and which pool it is, is settled when pyarrow is imported. Workers of a private cluster inherit it.

A private cluster has a token of this run only: other users of the machine cannot drive our workers, and nothing is written to
``~/.ray`` (docs/decisions/0003). Whether there is one, is settled when Ray is imported, which trainings do at their top.
"""

import os
import secrets
import sys

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

IS_PRIVATE = (
    os.environ.get("RAY_ADDRESS", "local") == "local"
    and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
)
if IS_PRIVATE and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
