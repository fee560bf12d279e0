"""The offset in a text at which each of its tokens begins."""

from __future__ import annotations


class TextOffsets:
    """Walks along a text, token by token, and counts characters from ``start`` on.

    Tokens that are not in the text, such as a beginning-of-sequence token, take no room. The
    bytes of a character that is spread over several tokens count with its first one.
    """

    def __init__(self, start: int = 0) -> None:
        self._text = bytearray()
        self._byte = 0
        self._character = start

    def extend(self, text: str) -> None:
        """Append what the next tokens spell."""
        self._text += text.encode()

    def place(self, token: bytes) -> int:
        """The offset at which the next token begins."""
        offset = self._character
        if not self._text.startswith(token, self._byte) and self._byte == 0:
            token = token.removeprefix(b" ")  # SentencePiece hides the very first space
        if self._text.startswith(token, self._byte):
            self._byte += len(token)
            self._character += sum(byte & 0xC0 != 0x80 for byte in token)
        return offset
