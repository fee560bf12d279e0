"""Turn a GGUF file or a seed system's checkpoint into a folder in the transformers format, once.

::

    python -m transformers_api.checkpoints.convert SOURCE FOLDER

Always a process of its own: a running engine keeps its threads, and the memory that unpacking
takes goes back when the process ends. Standard output carries lines ``progress 0.35 what`` and
``warning what``.
"""

from __future__ import annotations

import errno
import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.publish import Report, publishing
from transformers_api.config.settings import Settings
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.errors import ApiError, InsufficientStorage, ModelLoadFailed

RESERVE_BYTES = 1 << 30  # left free on the disk for everybody else
NO_ROOM_EXIT = 28  # ENOSPC's number

Warn = Callable[[str], None]


def main(arguments: list[str]) -> int:
    """Convert; 0 when FOLDER is complete, NO_ROOM_EXIT when the disk is full, else 1."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m transformers_api.checkpoints.convert SOURCE FOLDER\n")
        return 2

    def work() -> None:
        import_torch(lazy=Settings.from_env().lazy_torch, transformers=True)
        convert(Path(arguments[0]), Path(arguments[1]), print_progress, warn=print_warning)

    return exit_status(work)


def exit_status(work: Callable[[], None]) -> int:
    """Run a process's work; 0 when it is done, NO_ROOM_EXIT when the disk is full, else 1."""
    try:
        work()
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
    source = source.resolve()
    with publishing(folder, source, report) as partial:
        if partial is None:
            return
        if source.suffix == ".gguf":
            _write_gguf(source, partial, report, warn)
        else:
            _write_checkpoint(source, partial, report, family, config_file)


def _write_checkpoint(
    source: Path, folder: Path, report: Report, family: str | None, config_file: Path | None
) -> None:
    report(0.0, "starting")
    from transformers_api.checkpoints.read import read_checkpoint

    report(0.2, "reading the checkpoint")
    checkpoint = read_checkpoint(source, family, config_file)
    _check_room(folder, checkpoint.parameters, None)
    report(0.6, "writing")
    checkpoint.save(folder)


def _write_gguf(source: Path, folder: Path, report: Report, warn: Warn) -> None:
    report(0.0, "starting")
    from transformers_api.checkpoints import gguf_texts, gguf_tokenizer
    from transformers_api.checkpoints.headers.gguf_adapter import read_model_header

    header = read_model_header(source)
    if len(header.files) > 1:
        raise ModelLoadFailed(f"{source.name}: join its parts with llama-gguf-split --merge")
    try:
        warning = gguf_tokenizer.check(header.metadata)
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"{source.name}: {error.message}") from None
    if warning:
        warn(f"{source.name}: {warning}")
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, gguf_texts.stored_dtype(header))
    _check_room(folder, sum(tensor.elements for tensor in header.tensors), dtype)
    report(0.1, "reading the vocabulary")
    tokenizer = gguf_tokenizer.build(header.metadata)
    _share_reader(_open(source), report)
    with gguf_texts.alone(source, folder) as origin:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            origin,
            gguf_file=source.name,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
        )
    model, info = loaded
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ModelLoadFailed(f"{source.name}: the weights do not fit the architecture: {wrong}")
    report(0.8, "writing")
    # as if the weights had never been quantised
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = gguf_texts.end_answers(model.config, header.metadata)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _open(source: Path) -> Any:
    """Open ``source`` with gguf's reader; its memory map as a plain array is four times as fast."""
    import gguf
    import numpy

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(numpy.ndarray)

    try:
        return Reader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelLoadFailed(f"{source.name} is not a sound GGUF file: {error}") from error


def _share_reader(reader: Any, report: Report) -> None:
    """Let transformers use one reader and one map of names, and report what it unpacks.

    Patching is safe here because this process does nothing else.
    """
    import gguf

    unpack, count = gguf.dequantize, len(reader.tensors)
    done = iter(range(1, count + 1))

    def unpack_and_report(data: Any, kind: Any) -> Any:
        report(0.2 + 0.6 * next(done, count) / count, "converting weights")
        return unpack(data, kind)

    patched: Any = gguf
    patched.GGUFReader = lambda path: reader
    patched.dequantize = unpack_and_report
    patched.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def _check_room(folder: Path, parameters: int, dtype: Any) -> None:
    needed = int(parameters) * (dtype.itemsize if dtype else 4) + RESERVE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InsufficientStorage(
            f"Converting needs {needed / 1e9:.1f} GB in {folder.parent}, "
            f"{free / 1e9:.1f} GB are free"
        )


def print_warning(what: str) -> None:
    """Write a line that serving's store understands."""
    sys.stdout.write(f"warning {' '.join(what.split())}\n")
    sys.stdout.flush()


def print_progress(share: float, what: str) -> None:
    """Write a line that serving's store understands."""
    sys.stdout.write(f"progress {share:.3f} {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
