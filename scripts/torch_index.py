"""Print pip's option for PyTorch's index of builds for CPUs, where that index answers.

On Linux the package index has torch for CUDA only, of several gigabytes. Where PyTorch's own index
cannot be reached, nothing is printed: torch then comes from wherever pip is set up to look.
"""

from __future__ import annotations

import os
import sys
import threading
import urllib.request
from collections.abc import Sequence

INDEX = "https://download.pytorch.org/whl/cpu"
WAIT_S = 3.0


def is_reachable(index: str, wait_s: float = WAIT_S) -> bool:
    """True where the index has a page for torch, and sends it within ``wait_s``."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=wait_s):
                answered.set()
        except (OSError, ValueError):
            pass  # the waiting time says it

    # A daemon: looking up a name has no limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(wait_s)
    return answered.is_set()


def main(arguments: Sequence[str]) -> None:
    """Print the option; the first argument names another index."""
    index = arguments[0] if arguments else INDEX
    if is_reachable(index):
        sys.stdout.write(f"--extra-index-url={index}\n")
        sys.stdout.flush()
    os._exit(0)  # without waiting for a name that is still looked up


if __name__ == "__main__":
    main(sys.argv[1:])
