"""Options and states of a client's socket."""

from __future__ import annotations

import select
import socket
import struct

DEAD_AFTER_S = (30, 10, 3)  # of silence; then probes so far apart; so many unanswered ones


def is_writable(client: socket.socket) -> bool:
    """True where a third of the buffer is free, on Linux."""
    poll = select.poll()
    poll.register(client, select.POLLOUT)
    return bool(poll.poll(0))


def limit(client: socket.socket, send_s: float) -> None:
    """Let the kernel end what does not get on: a write, or a client that is no more."""
    timeout = struct.pack("ll", int(send_s), int(send_s % 1 * 1e6))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if client.family == socket.AF_UNIX or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    idle, apart, tries = DEAD_AFTER_S
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, apart)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, tries)
    # Also while nothing is written, so that the watcher hears of it: see api/http/disconnect.py.
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_s * 1000))
