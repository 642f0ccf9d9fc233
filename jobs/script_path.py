"""Imported first by a job that runs as a script: the repository replaces ``jobs/`` at the head of ``sys.path``.

``python jobs/evaluate.py`` would otherwise let ``jobs/`` shadow packages of the same names, here and in Ray's workers.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
