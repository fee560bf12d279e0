"""Fill-in-the-middle: prompts with a text before and a text after what is to be written.

Code models have tokens for it: ``<|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers_api.serving.text.control_tokens import BREAK, ControlTokens
from transformers_api.serving.text.tokenization import token_ids

# Before, after, and where the answer begins, as published models name them.
NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
# What such models write after an answer, besides their end of sequence.
_ENDS = (
    *("<|fim_pad|>", "<fim_pad>", "<fim-pad>", "▁<EOT>", "<EOT>", "<|endoftext|>"),
    *("<|repo_name|>", "<reponame>", "<|file_sep|>", "<file_sep>", "<|file_separator|>"),
)
_REPOSITORIES = ("<|repo_name|>", "<repo_name>", "<reponame>")
_FILES = ("<|file_sep|>", "<file_sep>")
_SNIPPET = "\n\n--- snippet ---\n\n"  # llama.cpp's, between files of models without a token for it


@dataclass(frozen=True)
class OtherFile:
    """A text that the answer may look at."""

    name: str
    text: str


class InfillTokens:
    """The tokens of one tokenizer for it; ``before``, ``after`` and ``middle`` are ids."""

    def __init__(self, tokenizer: Any, names: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self.before, self.after, self.middle = map(tokenizer.convert_tokens_to_ids, names)
        ids = (_id(tokenizer, name) for name in (*names, *_ENDS))
        self.ends = frozenset(token for token in ids if token is not None)  # of an answer
        self.repository = _first(tokenizer, _REPOSITORIES)
        self.file = _first(tokenizer, _FILES)
        listed = "\n".join((*names, *_ENDS, *_REPOSITORIES, *_FILES))
        self._control = ControlTokens(tokenizer, listed)

    def ids(self, text: str, *, begins: bool = False) -> list[int]:
        """The ids of ``text``, in which no token of these stands; ``begins``: as a text begins."""
        return self._control.ids(("" if begins else BREAK) + self._control.broken(text), False)

    @property
    def start(self) -> list[int]:
        """The token with which the model's texts begin, where they do."""
        begin = self._tokenizer.bos_token_id
        ids = token_ids(self._tokenizer, "", add_special_tokens=True)
        return [token for token in ids if token == begin][:1]


def infill_tokens(tokenizer: Any, vocab_size: int) -> InfillTokens | None:
    """The tokens of ``tokenizer`` that a model with ``vocab_size`` ids has; None: not all."""
    for names in NAMES:
        ids = [_id(tokenizer, name) for name in names]
        if all(token is not None and token < vocab_size for token in ids):
            return InfillTokens(tokenizer, names)
    return None


def encode(
    tokens: InfillTokens,
    before: str | Sequence[int],
    after: str,
    *,
    add_special_tokens: bool = True,
    files: Iterable[OtherFile] = (),
) -> list[int]:
    """The prompt that asks for what stands between ``before`` and ``after``."""
    own = tokens.ids(before, begins=True) if isinstance(before, str) else before
    return [
        *(tokens.start if add_special_tokens else ()),
        *_context(tokens, list(files)),
        tokens.before,
        *own,
        tokens.after,
        *tokens.ids(after),
        tokens.middle,
    ]


def _context(tokens: InfillTokens, files: Sequence[OtherFile]) -> list[int]:
    """Other files, as llama.cpp shows them to such a model."""
    ids: list[int] = []
    if files and tokens.repository is not None:
        ids += [tokens.repository, *tokens.ids("myproject\n")]
    for file in files:
        if tokens.file is None:
            ids += tokens.ids(_SNIPPET + file.text)
        else:
            ids += [tokens.file, *tokens.ids(f"{file.name}\n{file.text}")]
    if files and tokens.file is not None:
        ids += [tokens.file, *tokens.ids("filename\n")]
    return ids


def _first(tokenizer: Any, names: Iterable[str]) -> int | None:
    ids = (_id(tokenizer, name) for name in names)
    return next((token for token in ids if token is not None), None)


def _id(tokenizer: Any, name: str) -> int | None:
    """The id of a token by its exact name; None where there is none."""
    token = tokenizer.convert_tokens_to_ids(name)
    if not isinstance(token, int) or tokenizer.convert_ids_to_tokens(token) != name:
        return None
    return token
