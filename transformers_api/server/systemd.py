"""Words to systemd (sd_notify): ready, ending, alive."""

from __future__ import annotations

import logging
import socket

log = logging.getLogger(__name__)


class Notifier:
    """Sends states to the socket that NOTIFY_SOCKET names; does nothing without one."""

    def __init__(self, address: str | None) -> None:
        # An @ stands for the zero byte of a socket that is not in the file system.
        self._address = "\0" + address[1:] if address and address[0] == "@" else address

    def __call__(self, state: str) -> None:
        """Send ``state``: lines such as ``READY=1``. Never fails."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            log.debug("systemd was not told %r: %s", state, error)
