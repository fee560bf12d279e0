"""The list of what transformers exports, which it makes of its 2,000 sources at every import.

While it is imported it reads each of them once and not twice, and none where a list from an earlier
time is on the disk. The list is of use to the very folder that it was made of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers_api.engine.platform.checked_file import (
    keep_newest,
    read_checked,
    write_checked,
)
from transformers_api.engine.platform.deferred_modules import Treating, replaced, treated

SCANNER = "transformers.utils.import_utils"
SCAN, EXPORTED, DEFINE = (
    *("create_import_structure_from_path", "fetch__all__"),
    "define_import_structure",
)
DIGITS = 32  # hexadecimal, of a digest
Exports = Mapping[frozenset[str], Mapping[str, set[str]]]  # by what they require: module to names


@contextmanager
def quick_scan(folder: Path | None) -> Iterator[None]:
    """While it lasts, transformers is imported without reading anything twice.

    ``folder``: where the list lies, or is put; None: nowhere.
    """
    with ExitStack() as scanning:

        def treat(loader: Any) -> _Quickly:
            return _Quickly(scanning, folder, loader)

        scanning.enter_context(treated(SCANNER, treat))
        yield


class _Quickly(Treating):
    """Executes transformers' ``import_utils``, and gives it a memory."""

    def __init__(self, scanning: ExitStack, folder: Path | None, loader: Any) -> None:
        super().__init__(loader)
        self.scanning, self.folder = scanning, folder

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        self.loader.exec_module(module)
        self.scanning.enter_context(scanning_once(module))
        if self.folder is not None:
            use_list(module, self.folder)


@contextmanager
def scanning_once(scanner: Any) -> Iterator[None]:
    """Give transformers, which looks through its models for what they export, a memory for it."""
    exported: Any = getattr(scanner, EXPORTED)
    cached = functools.cache(getattr(scanner, SCAN))

    def scan_folder(path: str | Path) -> Any:
        text = os.fspath(path)
        return cached(os.path.dirname(text) if os.path.isfile(text) else text)

    def find_exported(source: str) -> Any:  # the last line that begins with it counts
        return exported(source[source.rfind("\n__all__") + 1 :])

    with replaced(scanner, SCAN, scan_folder), replaced(scanner, EXPORTED, find_exported):
        yield


def use_list(scanner: Any, folder: Path) -> None:
    """Take what the models export from a list in ``folder``, which is written where it lacks.

    For good: transformers asks again when it imports its processors.
    """
    models = Path(scanner.__file__).parents[1] / "models"
    define: Any = getattr(scanner, DEFINE)

    @functools.cache
    def exports() -> Exports:
        path = folder / f"{_name(models)}.exports"
        if (stored := _read(path)) is not None:
            return stored
        made: Exports = define(os.fspath(models))
        _write(path, made)
        return made

    def quickly(path: str | Path, prefix: str | None = None) -> Exports:
        if Path(path) not in (models, models / "__init__.py"):
            scanned: Exports = define(path, prefix)
            return scanned
        start = "" if prefix is None else f"{prefix}."
        return {
            backends: {f"{start}{module}": set(names) for module, names in modules.items()}
            for backends, modules in exports().items()
        }

    setattr(scanner, DEFINE, quickly)


def _name(models: Path) -> str:
    """A digest of where transformers lies, of what it states about itself, and of its models.

    And of this module, which alone knows how the list is written.
    """
    files = *sorted(models.parent.glob("*.py")), Path(__file__)
    about = [models.stat(), *(file.stat() for file in files)]
    identity = os.fspath(models), [(each.st_ino, each.st_size, each.st_mtime_ns) for each in about]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:DIGITS]


def _read(path: Path) -> Exports | None:
    """The list; None where it is not there, or not whole."""
    content = read_checked(path)
    if content is None:
        return None
    return {
        frozenset(backends): {module: set(names) for module, names in modules.items()}
        for backends, modules in json.loads(content)
    }


def _write(path: Path, exports: Exports) -> None:
    """Store the list, if that is possible; those of other versions go."""
    lists = [
        [sorted(backends), {module: sorted(names) for module, names in modules.items()}]
        for backends, modules in exports.items()
    ]
    with suppress(OSError):
        write_checked(path, json.dumps(lists).encode())
        keep_newest(path.parent, "*.exports", 1)
