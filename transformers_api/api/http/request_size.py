"""The size of a request: bytes of its text, sequences that it begins."""

from __future__ import annotations

from collections.abc import Iterable

from transformers_api.config.settings import Settings
from transformers_api.errors import InvalidRequest, PayloadTooLarge


def check_prompt_bytes(texts: Iterable[str], settings: Settings, param: str) -> None:
    """Raise PayloadTooLarge for more text than the settings allow."""
    size = sum(len(text.encode()) for text in texts)
    if size > settings.prompt_bytes:
        raise PayloadTooLarge(
            f"'{param}' has {size} bytes of text; at most {settings.prompt_bytes} are allowed",
            param=param,
        )


def check_sequences(prompts: int, per_prompt: int, settings: Settings) -> None:
    """Raise InvalidRequest for more sequences than could ever wait and run."""
    most = settings.max_inflight + settings.max_queue
    if prompts * per_prompt > most:
        raise InvalidRequest(
            f"{prompts} prompts with {per_prompt} answers each are more than the {most} that this "
            "server takes at once",
            param="prompt" if prompts > 1 else "n",
        )
