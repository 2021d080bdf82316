"""Writing a file so that nobody ever reads half of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then put it in its place."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        part.write_text(text, encoding="utf-8")  # with the mode that the umask gives, unlike files of tempfile
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
