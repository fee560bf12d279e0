"""Turn a GGUF file or a seed system's checkpoint into a folder in the transformers format, once.

::

    python -m transformers_api.checkpoints.convert SOURCE FOLDER

Of a GGUF file all but the weights: they stay in the file, and ``weights.json`` says where.

Always a process of its own: a running engine keeps its threads, and the memory that unpacking
takes goes back when the process ends. Standard output carries lines ``progress 0.35 what`` and
``warning what``.

The folder appears by one rename, complete and with the checksums of its files in
``conversion.json``, and with the version of this program: what an earlier one has made is made
anew. A killed conversion leaves only a hidden ``.*.partial`` folder, which the next
one removes. Processes that want the same folder wait for each other.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from transformers_api.config.settings import Settings
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.errors import ApiError, InsufficientStorage, ModelLoadFailed

MANIFEST = "conversion.json"
TABLE = "weights.json"  # of a GGUF file: where its weights are
VERSION = 3  # one more whenever the result for some source is another; serving's store has it too
RESERVE_BYTES = 1 << 30  # left free on the disk for everybody else
NO_ROOM_EXIT = 28  # ENOSPC's number

Report = Callable[[float, str], None]
Warn = Callable[[str], None]


def main(arguments: list[str]) -> int:
    """Convert; 0 when FOLDER is complete, NO_ROOM_EXIT when the disk is full, else 1."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m transformers_api.checkpoints.convert SOURCE FOLDER\n")
        return 2
    import_torch(lazy=Settings.from_env().lazy_torch, transformers=True)
    try:
        convert(Path(arguments[0]), Path(arguments[1]), _print_progress, warn=_print_warning)
    except InsufficientStorage as error:
        sys.stderr.write(f"{error.message}\n")
        return NO_ROOM_EXIT
    except ApiError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return NO_ROOM_EXIT if error.errno == errno.ENOSPC else 1
    return 0


def convert(
    source: Path,
    folder: Path,
    report: Report,
    family: str | None = None,
    config_file: Path | None = None,
    warn: Warn = lambda what: None,
) -> None:
    """Make ``folder`` from ``source``; nothing to do when it is there and intact.

    ``source`` is a GGUF file, or what ``checkpoints.read_checkpoint`` reads: ``family`` and
    ``config_file`` are for that. Raises ModelLoadFailed, InsufficientStorage.
    """
    source, folder = source.resolve(), folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, report):
        if is_intact(folder):
            return
        _sweep(folder.parent)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            if source.suffix == ".gguf":
                _write_gguf(source, partial, report, warn)
            else:
                _write_checkpoint(source, partial, report, family, config_file)
            _seal(source, partial, report)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged earlier one
            partial.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_intact(folder: Path) -> bool:
    """True where every file of a converted model has the checksum of its conversion.

    False for what an earlier version has made.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        return (
            manifest.get("version") == VERSION
            and all(_sha256(folder / name) == digest for name, digest in files.items())
            and all(map(_is_unchanged, _weight_files(folder)))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _weight_files(folder: Path) -> list[dict[str, Any]]:
    """The files that a folder's weights lie in, where these are others."""
    table = folder / TABLE
    return json.loads(table.read_bytes())["files"] if table.is_file() else []


def _is_unchanged(file: Mapping[str, Any]) -> bool:
    stat = os.stat(file["path"])
    return (stat.st_size, stat.st_mtime_ns) == (file["bytes"], file["mtime_ns"])


@contextmanager
def _locked(folder: Path, report: Report) -> Iterator[None]:
    """Hold ``folder``'s lock. The kernel gives it back when the process dies."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        if not _try_lock(lock):
            report(0.0, "waiting for another process that converts this model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(store: Path) -> None:
    """Remove what killed conversions of other models left behind."""
    for partial in store.glob(".*.partial"):
        with partial.with_suffix(".lock").open("w") as lock:
            if _try_lock(lock):
                shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(
    source: Path, folder: Path, report: Report, family: str | None, config_file: Path | None
) -> None:
    report(0.0, "starting")
    from transformers_api.checkpoints.read import read_checkpoint

    report(0.2, "reading the checkpoint")
    checkpoint = read_checkpoint(source, family, config_file)
    _check_room(folder, checkpoint.parameters)
    report(0.6, "writing")
    checkpoint.save(folder)


def _write_gguf(source: Path, folder: Path, report: Report, warn: Warn) -> None:
    """Write all but the weights, and a table of where they are: they stay where they lie."""
    report(0.0, "starting")
    from transformers_api.checkpoints import gguf_tokenizer
    from transformers_api.checkpoints.gguf_config import IN_CONFIG, read_config
    from transformers_api.checkpoints.gguf_weights import weight_table
    from transformers_api.checkpoints.headers.gguf_file import read_gguf_files

    model = read_gguf_files(source)
    metadata = model.metadata
    try:
        warning = gguf_tokenizer.check(metadata)
        if warning:
            warn(f"{source.name}: {warning}")
        report(0.1, "reading the configuration")
        config, fields = read_config(metadata, model.tensors, _floats(model, IN_CONFIG))
        table = weight_table(model.files, metadata["general.architecture"], config, fields)
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"{source.name}: {error.message}") from None
    report(0.4, "reading the vocabulary")
    with _alone(model.files[0][0], folder) as origin:
        options = {"gguf_file": model.files[0][0].name, "local_files_only": True}
        tokenizer = gguf_tokenizer.build(metadata) or _tokenizer(origin, options)
    report(0.8, "writing")
    _save_config(config, table, metadata, folder)
    tokenizer.save_pretrained(folder)
    (folder / TABLE).write_text(json.dumps(table))


def _floats(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The numbers of small tensors in float32, by name."""
    import numpy

    return {
        tensor.name: numpy.fromfile(path, numpy.float32, tensor.elements, offset=tensor.offset)
        for path, tensors in model.files
        for tensor in tensors
        if tensor.name in names and tensor.bytes == 4 * tensor.elements
    }


def _tokenizer(origin: Path, options: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(origin, **options)


def _save_config(
    config: Any, table: Mapping[str, Any], metadata: Mapping[str, Any], folder: Path
) -> None:
    import transformers

    new_generation_config: Any = transformers.GenerationConfig
    config.architectures = [table["class"]]
    config.eos_token_id = _end_tokens(metadata) or config.eos_token_id
    config.save_pretrained(folder)
    new_generation_config(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)


def _end_tokens(metadata: Mapping[str, Any]) -> int | list[int] | None:
    """The ids that end an answer: of the text, of a chat turn, of a message."""
    named = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ids = list(dict.fromkeys(int(index) for index in named if index is not None))
    return ids[0] if len(ids) == 1 else ids or None


def _check_room(folder: Path, parameters: int) -> None:
    needed = int(parameters) * 4 + RESERVE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InsufficientStorage(
            f"Converting needs {needed / 1e9:.1f} GB in {folder.parent}, "
            f"{free / 1e9:.1f} GB are free"
        )


@contextmanager
def _alone(source: Path, folder: Path) -> Iterator[Path]:
    origin = folder / "origin"
    origin.mkdir()
    (origin / source.name).symlink_to(source)
    yield origin
    shutil.rmtree(origin)


def _seal(source: Path, folder: Path, report: Report) -> None:
    """Add the manifest and force everything to the disk, so that the rename publishes it whole."""
    report(0.9, "checking sums")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "version": VERSION,
        "source": source.name,
        "source_bytes": source.stat().st_size,
        "files": {path.name: _sha256(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, folder / MANIFEST):
        path.chmod(0o644)  # safetensors writes for the owner only; a service may run as another
        _sync(path)
    _sync(folder)
    report(1.0, "converted")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _print_warning(what: str) -> None:
    sys.stdout.write(f"warning {' '.join(what.split())}\n")
    sys.stdout.flush()


def _print_progress(share: float, what: str) -> None:
    sys.stdout.write(f"progress {share:.3f} {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
