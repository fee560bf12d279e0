"""JSON objects that belong to models, read without believing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.safetensors_file import parse_object
from transformers_api.errors import ModelLoadFailed

MAX_JSON_BYTES = 100_000_000
MAX_PATH_BYTES = 255  # which any file system takes as one name


def is_path(text: str) -> bool:
    """True for a text that a file system takes as a path; one of a file may be anything."""
    return "\0" not in text and len(text.encode(errors="replace")) <= MAX_PATH_BYTES


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises ModelLoadFailed."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadFailed(f"{path} is larger than any such file should be")
        return parse_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelLoadFailed(f"{path} cannot be read: {error.strerror}") from error
