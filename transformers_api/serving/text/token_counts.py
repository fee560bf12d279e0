"""Usage in the tokens of another vocabulary, where a registry entry names a tiktoken encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

TokenCounter = Callable[[str], int]


def token_counter(encoding: str) -> TokenCounter:
    """Counts the tokens of texts as tiktoken does. May fetch the encoding's file, once.

    Raises ModelLoadFailed for an unknown encoding, or one whose file cannot be had.
    """
    import tiktoken  # with the Rust library, which most servers never need

    try:
        tokens = tiktoken.get_encoding(encoding)
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise ModelLoadFailed(
            f"token_encoding {encoding!r} cannot be had: {type(error).__name__}: {error}. Without "
            "a network its file has to lie in the folder that TIKTOKEN_CACHE_DIR names"
        ) from error
    return lambda text: len(tokens.encode(text, disallowed_special=()))


class CountedTexts:
    """The prompts of a request and their completions, counted as texts."""

    def __init__(
        self,
        model: LoadedModel,
        count: TokenCounter,
        prompts: Sequence[Sequence[int]],
        choices: int,
    ) -> None:
        self._count = count
        self._prompts = [chat_template.decode_ids(model, prompt) for prompt in prompts]
        self._pieces: list[list[str]] = [[] for _ in range(choices)]

    def add(self, choice: int, text: str) -> None:
        """A piece of a choice's text."""
        self._pieces[choice].append(text)

    def totals(self) -> tuple[int, int]:
        """(prompt tokens, completion tokens) so far."""
        texts = ("".join(pieces) for pieces in self._pieces)
        return sum(map(self._count, self._prompts)), sum(map(self._count, texts))
