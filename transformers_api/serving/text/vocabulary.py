"""The bytes and the text that a single token id stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Scheme = Literal["byte_level", "byte_fallback"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "▁"


class Vocabulary:
    """The tokens of one tokenizer. From any thread: two may look the same token up.

    ``scheme`` says how tokens spell bytes: "byte_level" (GPT-2's alphabet), "byte_fallback"
    (SentencePiece: ``▁`` and ``<0xNN>``), or None where a token's text depends on its neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.added: dict[int, str] = {i: str(token.content) for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.strips_first_space = False
        self._tokenizer = tokenizer
        self.cached_bytes: dict[int, bytes] = {}  # of the tokens that were looked up
        self.spellings: object = None  # see dry_breakers, as is the next
        self.cached_breakers: dict[tuple[str, ...], Mapping[int, frozenset[tuple[int, ...]]]] = {}
        self.scheme: Scheme | None = self._detect()
        if self.scheme and not self._agrees():
            self.scheme = None
            self.cached_bytes.clear()

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes: of a special or added token its literal content, b"" if unknown."""
        raw = self.cached_bytes.get(token_id)
        if raw is None:
            raw = self.cached_bytes[token_id] = self._read(token_id)
        return raw

    def token_text(self, token_id: int) -> str:
        r"""The token's text; where it is not whole characters OpenAI's form, ``bytes:\xe2\x98``."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decoded(self, token_id: int) -> str:
        """The token's text on its own, with U+FFFD where it is not whole characters."""
        return self.token_bytes(token_id).decode(errors="replace")

    def display(self, token_id: int) -> str:
        r"""The token's text for the eye: ``␠``, ``⏎``, ``\x1b`` in place of what cannot be seen.

        Where the token is a byte by its id, the printable characters of ASCII stand for
        themselves, the space too, and the other bytes are ``\xNN``.
        """
        raw = self.token_bytes(token_id)
        if raw == bytes([token_id & 0xFF]) and token_id < 256:
            return chr(token_id) if 32 <= token_id <= 126 else f"\\x{token_id:02x}"
        return "".join(map(_visible, raw.decode(errors="backslashreplace")))

    def _read(self, token_id: int) -> bytes:
        token = self.added.get(token_id)
        if token is not None:
            # Gemma keeps runs of ▁ among its added tokens; special ones are never spaces.
            is_spaces = self.scheme == "byte_fallback" and token_id not in self.special_ids
            return (token.replace(_SPACE, " ") if is_spaces else token).encode()
        token = self._name(token_id)
        if token is None:
            return b""
        if self.scheme == "byte_level":
            return _from_alphabet(token)
        byte = _BYTE_TOKEN.match(token)
        if byte:
            return bytes([int(byte[1], 16)])
        if self.scheme == "byte_fallback" or _SPACE in token:
            return token.replace(_SPACE, " ").encode()
        return self._by_decoding(token_id).encode()

    def _name(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self._tokenizer):
            return None
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return None if name is None else str(name)

    def _by_decoding(self, token_id: int) -> str:
        """The text that the token adds after itself: a word has its space, and ``##`` is gone."""
        once, twice = (self._decode([token_id] * times) for times in (1, 2))
        return twice[len(once) :] if twice.startswith(once) else once

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _detect(self) -> Scheme | None:
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None:
            return None
        state = json.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return "byte_level"
        if all(_keeps_pieces(step) for step in steps):
            kinds = {step["type"] for step in steps}
            self.strips_first_space = "Strip" in kinds
            return "byte_fallback" if "ByteFallback" in kinds else None
        return None

    def _agrees(self) -> bool:
        """True where the scheme says what the tokenizer decodes: a subclass may do otherwise."""
        ids = self._tokenizer.encode("a é 世, b", add_special_tokens=False)
        ours = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        if self.strips_first_space:
            ours = ours.removeprefix(" ")
        return ours == self._decode(ids)


def _keeps_pieces(step: dict[str, Any]) -> bool:
    """True where a decoder's step leaves each piece alone, but for a space at the very start."""
    match step:
        case {"type": "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
            return True
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
    return False


_SYMBOLS = {" ": "␠", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def _visible(character: str) -> str:
    if character.isprintable() and not character.isspace():
        return character
    return _SYMBOLS.get(character) or character.encode("unicode_escape").decode()


def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_ALPHABET = _alphabet()


def _from_alphabet(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # not spelt in the alphabet: stands for itself
        return token.encode()
