"""Where tests find the real clips, photos, lists and weights that stand beside the checkout."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "videos").is_dir(), reason=f"real test material not found at {SHARED}"
)
