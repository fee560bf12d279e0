"""The names by which a server without API keys lets itself be called.

A page of the web can make its own name stand for 127.0.0.1 (DNS rebinding), and its scripts then
talk to a server there as to their own. What they cannot change is the name in the Host header.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from flask import Flask, request

from transformers_api.config.settings import Settings
from transformers_api.errors import MisdirectedRequest

_ANYWHERE = ("", "0.0.0.0", "::", "[::]")


class Hosts:
    """The hosts that mean this server."""

    def __init__(self, host: str, allowed: tuple[str, ...]) -> None:
        self._host = _name(host)
        self._allowed = allowed
        self._is_anywhere = host in _ANYWHERE
        self.means_us = lru_cache(maxsize=256)(self._means_us)

    def _means_us(self, host: str) -> bool:
        """True for a Host header of this server, with a port or without."""
        name = _name(host)
        if name == self._host or "*" in self._allowed or name in self._allowed:
            return True
        if any(name.endswith(end) for end in self._allowed if end.startswith(".")):
            return True
        try:
            address = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            # No stranger can have a name without a dot; local networks do.
            return "." not in name or name.endswith(".localhost")
        return address.is_loopback or self._is_anywhere

    def check(self) -> None:
        """Raise MisdirectedRequest for a request to somebody else."""
        host = request.environ.get("HTTP_HOST")
        if host is not None and not self.means_us(host):
            raise MisdirectedRequest(
                f"The host {host[:128]!r} is not known to mean this server; ALLOWED_HOSTS lists "
                "those that do"
            )


def _name(host: str) -> str:
    """``host`` without its port, its brackets and a final dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.lower().rstrip(".")


def install(app: Flask, settings: Settings) -> None:
    """Check every request of ``app``, where there are no keys to check."""
    if not settings.needs_key:
        app.before_request(Hosts(settings.host, settings.allowed_hosts).check)
