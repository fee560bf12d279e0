"""GGUF models in several files, as llama-gguf-split names them: ``m-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers_api.errors import ModelLoadFailed

MOST_PARTS = 9_999
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file of this name is a part of; itself for others.

    ``name`` may be a path inside a repository. Raises ModelLoadFailed for numbers that cannot be.
    """
    if (match := _PART.fullmatch(name)) is None:
        return [name]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count <= MOST_PARTS:
        raise ModelLoadFailed(f"{name}: there is no part {number} of {count}")
    return [f"{match[1]}-{each:05d}-of-{count:05d}.gguf" for each in range(1, count + 1)]


def split_parts(path: Path) -> list[Path]:
    """The files of a model, by any of them. Raises ModelLoadFailed, naming a missing one."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = next((part for part in paths if not part.is_file()), None)
    if missing is not None and len(paths) > 1:
        raise ModelLoadFailed(
            f"{path.name} is one of {len(paths)} parts, and {missing.name} is missing in "
            f"{path.parent}"
        )
    return paths


def first_parts(names: Iterable[str]) -> list[str]:
    """Names without those of later parts whose first one is there, too."""
    every = set(names)
    matches = {name: _PART.fullmatch(name) for name in every}
    later = {
        name
        for name, match in matches.items()
        if match and int(match[2]) > 1 and f"{match[1]}-00001-of-{match[3]}.gguf" in every
    }
    return sorted(every - later)
