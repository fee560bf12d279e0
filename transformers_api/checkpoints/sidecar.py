"""The sidecar of a GGUF model: what a server needs besides the file's own weights, a few MB.

::

    python -m transformers_api.checkpoints.sidecar SOURCE FOLDER

A folder in the transformers format, but for the weights: ``weights.json`` says where they lie in
the file (``gguf_weights``). It is made of the file's header alone, in about a second. Standard
output of the process carries lines ``progress 0.35 what`` and ``warning what``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers_api.checkpoints import convert
from transformers_api.checkpoints.headers.gguf_adapter import read_model_header
from transformers_api.checkpoints.headers.gguf_file import GgufHeader
from transformers_api.checkpoints.headers.weight_table import TABLE
from transformers_api.checkpoints.publish import Report, publishing
from transformers_api.config.settings import Settings
from transformers_api.engine.platform.lazy_torch import import_torch
from transformers_api.errors import ModelLoadFailed

Shapes = Callable[[Any], Mapping[str, tuple[int, ...]]]


def main(arguments: list[str]) -> int:
    """Make a sidecar; the exit status is that of ``convert``."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m transformers_api.checkpoints.sidecar SOURCE FOLDER\n")
        return 2
    source, folder = map(Path, arguments)

    def work() -> None:
        import_torch(lazy=Settings.from_env().lazy_torch, transformers=True)
        write_sidecar(source, folder, convert.print_progress, convert.print_warning)

    return convert.exit_status(work)


def write_sidecar(
    source: Path,
    folder: Path,
    report: Report,
    warn: Callable[[str], None] = lambda what: None,
    shapes: Shapes | None = None,
) -> None:
    """Make ``folder`` of a GGUF file, or of any part of one; nothing to do where it is there.

    ``shapes(config)`` gives the shapes of a model's parameters, which takes torch; by default it is
    asked in this thread. Raises ModelLoadFailed, OSError.
    """
    from transformers_api.checkpoints.gguf_weights import file_stamps

    report(0.0, "reading the header")
    header = read_model_header(source.absolute())  # a link's own name says which part it is
    notes = {"weights": file_stamps(header)}
    with _naming(source), publishing(folder, source, report, notes) as partial:
        if partial is not None:
            _write(header, partial, report, warn, shapes)


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    try:
        yield
    except ModelLoadFailed as error:
        raise ModelLoadFailed(f"{source.name}: {error.message}") from None


def _shapes(config: Any) -> Mapping[str, tuple[int, ...]]:
    from transformers_api.checkpoints.parameter_shapes import parameter_shapes

    return parameter_shapes(config)


def _write(
    header: GgufHeader,
    folder: Path,
    report: Report,
    warn: Callable[[str], None],
    shapes: Shapes | None,
) -> None:
    from transformers_api.checkpoints import gguf_config, gguf_texts, gguf_weights
    from transformers_api.checkpoints.gguf_tokenizer import check

    if warning := check(header.metadata):
        warn(f"{header.files[0].name}: {warning}")
    config = gguf_config.build(header)
    report(0.1, "mapping the weights")
    table = gguf_weights.build(header, config, (shapes or _shapes)(config))
    (folder / TABLE).write_text(json.dumps(table) + "\n")
    report(0.3, "reading the vocabulary")
    gguf_texts.write_texts(header, config, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
