"""Our server, which notes when each step of its engine has ended, for `benchmarks.contention`.

    python -m benchmarks.stamped FILE

serves as `python -m transformers_api serve` does. A note is sixteen bytes of mapped memory, written
on the engine's thread before it hands out the tokens of the step.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers_api.cli import main
from transformers_api.tallies import EngineTally

STAMP = struct.Struct("=dq")  # time.perf_counter(), tokens that are not the first of an answer
SIZE = 1 << 22


def steps(file: Path, since: float) -> list[tuple[float, int]]:
    """When steps have ended since then, and of how many tokens."""
    noted = STAMP.iter_unpack(file.read_bytes())
    return [(moment, tokens) for moment, tokens in noted if moment > since]


def note_steps(file: Path) -> None:
    """From now on write down the end of each step of an engine, in this process or its children."""
    file.write_bytes(bytes(SIZE))
    with file.open("r+b") as opened:
        room = mmap.mmap(opened.fileno(), SIZE)
    tell, place = EngineTally.on_step, 0

    def on_step(self: EngineTally, read_tokens: int, gaps: Sequence[float]) -> None:
        nonlocal place
        tell(self, read_tokens, gaps)
        if gaps:
            STAMP.pack_into(room, place, time.perf_counter(), len(gaps))
            place = (place + STAMP.size) % SIZE

    EngineTally.on_step = on_step  # type: ignore[method-assign]


if __name__ == "__main__":
    note_steps(Path(sys.argv[1]))
    sys.exit(main(["serve"]))
