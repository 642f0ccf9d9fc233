"""Imported first by a job that runs as a script: the repository replaces ``jobs/`` at the head of ``sys.path``.

``python jobs/evaluate.py`` would otherwise let ``jobs/`` shadow packages of the same names, here and in Ray's workers. And Ctrl-C
during the seconds of imports, where nothing catches it, would be a page of stack: it ends the process until
:func:`jobs.runtime.main` takes over.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def leave(*_: Any) -> None:
    """End at once; nothing was begun."""
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it
    signal.signal(signal.SIGINT, leave)
