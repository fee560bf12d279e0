"""Standard input, output and error of a process that was started without them."""

from __future__ import annotations

import os
import sys


def open_missing() -> None:
    """Open the null device in the place of each standard stream that was closed at the start.

    Otherwise Python has None there, on which whatever writes a line fails; and the next socket
    would get the number, to which native code writes its errors.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        where: int | str = os.devnull
        try:
            os.fstat(number)
        except OSError:
            where = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(where, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(where, "w" if number else "r"))  # noqa: SIM115
