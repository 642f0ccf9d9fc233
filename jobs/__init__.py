"""The command line.

Arrow takes its memory from the C library. Its own pool keeps some MiB for each thread that ever used it (18 in the driver of 1,000 videos,
docs/log.md), and which pool it is, is settled when pyarrow is imported. Workers of a private cluster inherit it.
"""

import os

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
