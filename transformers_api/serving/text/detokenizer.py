"""Token ids as they come, to text that is safe to send."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from transformers_api.serving.text.common_prefix import common_prefix
from transformers_api.serving.text.vocabulary import Vocabulary

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_MAX_PARTIAL = 3  # a character has at most 4 bytes, so an unfinished one at most 3
_CONTEXT_IDS = 8  # context that a decode sees before the newest token
_MAX_IDS = 24

# SentencePiece shows each byte that is not text as one character; UTF-8 decoders show a
# sequence that breaks off as one.
_EACH_BYTE = "transformers_api.each_byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _UNREADABLE * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _each_byte)


class Detokenizer(Protocol):
    """The text of one sequence, token by token.

    All that ``push`` and ``flush`` return, joined, is what ``tokenizer.decode`` adds for these
    tokens after the prompt. No piece ends inside a character, and no more is held back than the
    bytes of an unfinished one. Constant time per token.

    Where byte tokens spell something that is not UTF-8, characters that were already complete
    stay, as in SentencePiece (the ``tokenizers`` library would take the whole run back).
    """

    @property
    def is_unfinished(self) -> bool:
        """True while bytes of a character wait for the rest of it."""
        ...

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often several, sometimes none."""
        ...

    def flush(self) -> str:
        """The rest at the end: an unfinished character as U+FFFD."""
        ...


def detokenizer(
    tokenizer: Any,
    prompt_ids: Sequence[int] = (),
    skip_special_tokens: bool = True,
    vocabulary: Vocabulary | None = None,
) -> Detokenizer:
    """The one for this tokenizer, after the prompt."""
    vocabulary = vocabulary or Vocabulary(tokenizer)
    if vocabulary.scheme is None:
        return WindowDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
    return BytesDetokenizer(vocabulary, prompt_ids, skip_special_tokens)


class BytesDetokenizer:
    """For vocabularies whose tokens are bytes: exact, and no decode of the tokenizer's."""

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special: bool
    ) -> None:
        errors = "replace" if vocabulary.scheme == "byte_level" else _EACH_BYTE
        self._vocabulary = vocabulary
        self._token_bytes = vocabulary.cached_bytes
        self._skipped: frozenset[int] = vocabulary.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        tail = self._tail(prompt_ids)
        self._utf8.decode(tail)
        # What the prompt already shows and the first text would repeat.
        self._emitted = self._utf8.getstate()[0].decode("utf-8", errors)
        if vocabulary.strips_first_space and not tail:
            self._emitted = " "

    @property
    def is_unfinished(self) -> bool:
        """See Detokenizer."""
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if token_id in self._skipped:
            return ""
        token = self._token_bytes.get(token_id)
        if token is None:
            token = self._vocabulary.token_bytes(token_id)
        text = self._utf8.decode(token)
        return self._unseen(text) if self._emitted else text

    def flush(self) -> str:
        """See Detokenizer."""
        return self._unseen(self._utf8.decode(b"", final=True))

    def _unseen(self, text: str) -> str:
        if text and self._emitted:
            text = text.removeprefix(self._emitted)
            self._emitted = ""
        return text

    def _tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt, enough to see whether it ends inside a character."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped:
                token = self._token_bytes.get(token_id)
                tail = (self._vocabulary.token_bytes(token_id) if token is None else token) + tail
            if len(tail) > _MAX_PARTIAL:
                break
        return tail


class WindowDetokenizer:
    """For all other tokenizers: decode the last few tokens, and see what is new at the end."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = list(prompt_ids[-_CONTEXT_IDS:])
        self._prompt_text = self._decode(self._ids)
        self._text = self._prompt_text
        self._sent = len(self._text)  # how much of _text is out
        self._limit = _MAX_IDS
        self._unreadable_pushes = 0

    @property
    def is_unfinished(self) -> bool:
        """See Detokenizer."""
        return self._sent < len(self._text)

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if len(self._ids) >= self._limit:
            self._shorten()
        self._ids.append(token_id)
        self._text = self._decode(self._ids)
        if self._prompt_text and not self._text.startswith(self._prompt_text):
            # The prompt ended inside a character, which is complete now.
            self._sent = common_prefix(self._prompt_text, self._text)
            self._prompt_text = ""
        return self._up_to(len(self._text) - self._unfinished())

    def flush(self) -> str:
        """See Detokenizer."""
        return self._up_to(len(self._text))

    def _unfinished(self) -> int:
        """The number of characters at the end that may still change."""
        unreadable = len(self._text) - len(self._text.rstrip(_UNREADABLE))
        self._unreadable_pushes = self._unreadable_pushes + 1 if unreadable else 0
        # Some decoders make a whole run of bytes unreadable while its last character is
        # unfinished. After more tokens than that can take, they are what the model wrote.
        if self._unreadable_pushes <= _MAX_PARTIAL:
            return unreadable
        return min(unreadable, _MAX_PARTIAL)

    def _up_to(self, end: int) -> str:
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _shorten(self) -> None:
        """Forget old tokens, where the rest decodes to the same text without them."""
        context = self._ids[-_CONTEXT_IDS:]
        text = self._decode(context)
        waiting = len(self._text) - self._sent
        if len(text) >= waiting and self._text.endswith(text):
            self._ids, self._text, self._sent = context, text, len(text) - waiting
            self._prompt_text = ""
            self._limit = _MAX_IDS
        else:
            self._limit += _CONTEXT_IDS

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text = self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return str(text)
