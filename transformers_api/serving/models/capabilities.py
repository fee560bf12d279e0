"""Capabilities and size of a model, by its registry entry and the small ones of its files.

Nothing is loaded and nobody is asked: of a model that has to be fetched the entry is all there is.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_file import file_type, read_gguf_header
from transformers_api.checkpoints.headers.weight_table import TABLE
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.headers import read_object
from transformers_api.serving.models.preflight import MODULES, weight_files
from transformers_api.serving.models.processors import processor_template
from transformers_api.serving.models.sidecars import is_sidecar, read_stored_tensors
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.text.infilling import NAMES

MOST_TOKENIZER_BYTES = 64 << 20
CONTEXT_FIELDS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    *("block_size", "context_length"),
)
_TOOLS = re.compile(r"\btools\b")
_THOUGHT = re.compile(r"enable_thinking|reasoning_content|</?think\w*>|\[/?THINK\]|<\|channel\|>")
_TEMPLATES = (
    *("tokenizer_config.json", "chat_template.jinja"),
    *("chat_template.json", "processor_config.json"),
)
_UNREADABLE = (ModelLoadFailed, OSError, ValueError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The facts of a model's files that say what can be asked of it."""

    size_bytes: int | None = None  # of the weights as they are stored
    template: str = ""  # for chats
    has_infill: bool = False  # tokens for a text in the middle
    is_encoder: bool = False  # of sentences
    file_type: str = ""  # of a GGUF file: the name of its quantisation


def read_facts(path: Path) -> FileFacts:
    """The facts of a folder, or of one file to convert; read again when it has changed."""
    try:
        names = (path, *(path / name for name in _TEMPLATES))
        stats = [each.stat() for each in names if each.exists()]
        return _read(path, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))
    except OSError:
        return FileFacts()


@functools.lru_cache(maxsize=256)
def _read(path: Path, _stamp: tuple[tuple[int, int], ...]) -> FileFacts:
    if path.is_dir():
        return FileFacts(
            _weight_bytes(path),
            _template(path),
            _has_infill(path),
            (path / MODULES).is_file(),
            _file_type(path),
        )
    size = path.stat().st_size
    return _of_gguf(path, size) if path.suffix == ".gguf" else FileFacts(size)


def _file_type(folder: Path) -> str:
    """The file type of a sidecar; of an earlier version's the type of most weights."""
    if not is_sidecar(folder):
        return ""
    try:
        named = read_object(folder / TABLE).get("file_type")
        return named if isinstance(named, str) else next(iter(read_stored_tensors(folder).types))
    except (*_UNREADABLE, StopIteration):
        return ""


def _weight_bytes(folder: Path) -> int | None:
    try:
        return sum(file.stat().st_size for file in weight_files(folder))
    except (ModelLoadFailed, OSError):
        return None


def _template(folder: Path) -> str:
    """The chat template; of several the text of all of them."""
    try:
        beside = folder / "chat_template.jinja"
        if beside.is_file():
            return beside.read_text(errors="replace")
        if template := processor_template(folder):
            return template
        return _joined(read_object(folder / "tokenizer_config.json").get("chat_template"))
    except _UNREADABLE:
        return ""


def _joined(template: Any) -> str:
    if isinstance(template, list):
        return "\n".join(str(each["template"]) for each in template)
    return template if isinstance(template, str) else ""


def _has_infill(folder: Path) -> bool:
    try:
        file = folder / "tokenizer.json"
        if not file.is_file() or file.stat().st_size > MOST_TOKENIZER_BYTES:
            return False
        text = file.read_bytes()
    except OSError:
        return False
    return any(all(_is_named(name, text) for name in names) for names in NAMES)


def _is_named(token: str, text: bytes) -> bool:
    """True where a file of JSON has the string, with or without escapes."""
    return any(json.dumps(token, ensure_ascii=way).encode() in text for way in (False, True))


def _of_gguf(path: Path, size: int) -> FileFacts:
    try:
        header = read_gguf_header(path)
        metadata, kind = header.metadata, file_type(header)
    except _UNREADABLE:
        return FileFacts(size)
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = frozenset(tokens) if isinstance(tokens, list) else frozenset()
    has_infill = any(vocabulary.issuperset(names) for names in NAMES)
    template = _joined(metadata.get("tokenizer.chat_template"))
    return FileFacts(size, template, has_infill, file_type=kind)


def context_length(spec: ModelSpec, config: Any) -> int | None:
    """Tokens that the model sees, by its configuration and its entry; None: nothing says so."""
    text = config.get("text_config")
    sizes = [{**config, **(text if isinstance(text, dict) else {})}.get(n) for n in CONTEXT_FIELDS]
    own = [size for size in sizes if type(size) is int and size > 0][:1]
    limits = own + ([spec.max_context_tokens] if spec.max_context_tokens else [])
    return min(limits, default=None)


def capabilities(
    spec: ModelSpec, facts: FileFacts, *, refused: bool, embeds: bool, inspects: bool
) -> list[str]:
    """Return what can be asked of a model here, in a fixed order.

    ``refused``: it writes no text. ``embeds``: /v1/embeddings is served; ``inspects``: traces are.
    ``tools`` are those that its own template shows, where calls are to be written so; ``reasoning``
    is by the marks of its entry or those of its template.
    """
    if spec.upstream is not None:  # as far as that can do it
        return ["chat", "completion", *(["embedding"] if embeds else []), "tools"]
    is_encoder = spec.encoder is not None or (facts.is_encoder and not spec.registered)
    writes = not refused and not is_encoder
    chats = writes and spec.chat != "off"
    by_template = chats and spec.chat in (None, "template")
    shows_calls = by_template and spec.tools == "template"
    thinks = chats and spec.reasoning is not None
    thinks = thinks or (by_template and _THOUGHT.search(facts.template) is not None)
    scores = embeds and (is_encoder or spec.embedding is not None)
    scores = scores and not (spec.encoder == "cross_encoder" and refused)
    can = {
        "chat": chats,
        "completion": writes,
        "embedding": scores and spec.encoder != "cross_encoder",
        "rerank": scores,
        "tools": shows_calls and _TOOLS.search(facts.template) is not None,
        "reasoning": thinks,
        "trace": writes and inspects,
        "fill-in-the-middle": writes and facts.has_infill,
    }
    return [name for name, is_there in can.items() if is_there]
