"""The files of a processor, which stand beside those of a tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object

_FILES = ("chat_template.json", "processor_config.json")


def processor_template(folder: Path) -> str:
    """The chat template of a processor; empty where it has none, or in a file of its own."""
    for name in _FILES:
        if not (folder / name).is_file():
            continue
        try:
            template = read_object(folder / name).get("chat_template")
        except ModelLoadFailed:
            continue
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            return template
    return ""
