"""From the text of a setting to its value; ValueError says what would be allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit


def boolean(text: str) -> bool:
    """Yes or no, in some words."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def integer(low: int, high: int) -> Callable[[str], int]:
    """A whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """A number from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def seconds_or_off(low: float, high: float) -> Callable[[str], float | None]:
    """A number from ``low`` to ``high``, or off, which is None."""

    def parse(text: str) -> float | None:
        if text.strip().lower() in ("off", "none"):
            return None
        try:
            return number(low, high)(text)
        except ValueError as error:
            raise ValueError(f"{error}, or off") from None

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    """One of these words, in lower case."""

    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text.lower()

    return parse


def device(text: str) -> str:
    """The device that models run on."""
    name, _, index = text.lower().partition(":")
    if name in ("auto", "cpu", "mps") and not index:
        return name
    if name == "cuda" and (not _ or index.isdigit()):
        return text.lower()
    raise ValueError("auto, cpu, cuda, cuda:N or mps")


def names(text: str) -> tuple[str, ...]:
    """Names that are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def hosts(text: str) -> tuple[str, ...]:
    """Names of hosts without ports, separated by commas."""
    listed = tuple(name.lower() for name in names(text))
    if any(set(name) & set("/:@ ") or ("*" in name and name != "*") for name in listed):
        raise ValueError("names of hosts without ports, such as llm.example.org or .example.org")
    return listed


def origins(text: str) -> tuple[str, ...]:
    """Exact origins of web pages, separated by commas."""
    listed = names(text)
    for origin in listed:
        scheme, mark, host = origin.partition("://")
        if not mark or scheme not in ("http", "https") or set(host) & set("/*?()[]|\\ "):
            raise ValueError("exact origins such as http://localhost:3000, separated by commas")
    return tuple(listed)


def redis_url(text: str) -> str:
    """The URL of a redis."""
    try:
        parts = urlsplit(text)
        is_right = parts.port is None or parts.port > 0
    except ValueError:
        is_right = False
    if not is_right or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("a URL such as redis://host:6379/0, rediss://… or unix:///path")
    return text


def path(text: str) -> Path:
    """A path; ``~`` is the home of the user."""
    return Path(text).expanduser()


def address(text: str) -> str:
    """A host and a port."""
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("a host and a port, such as 127.0.0.1:6399")
    return f"{host}:{port}"
