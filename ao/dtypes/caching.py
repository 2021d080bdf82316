"""Where ao keeps what it has measured or compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where what was measured or compiled is kept for later processes: $AO_CACHE_DIR, or ~/.cache/ao."""
    return Path(os.environ.get("AO_CACHE_DIR") or Path.home() / ".cache" / "ao")
