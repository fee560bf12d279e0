"""What xdist hands to a process in one piece, and in which order: ``make test`` takes its time of this."""

from __future__ import annotations

from collections import Counter

import pytest
from xdist.scheduler import LoadFileScheduling

PAGE = "tests/page"
# What takes longest for each of its tests comes first, so that the end is of short files. A folder
# of tests/ not listed comes with the last.
FOLDERS = (PAGE, "tests", "tests/deploy", "tests/faults", "tests/engine/native", "tests/engine")


class WholeFiles(LoadFileScheduling):
    """Each file to one process; those of the page, which share servers and a browser, to one too."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)


def unit(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0]
    return PAGE if file.startswith(f"{PAGE}/") else file


def rank(unit: str) -> int:
    folder = unit if unit in FOLDERS else unit.rpartition("/")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def sort(items: list[pytest.Item]) -> None:
    """Put the units that take long first, among those of a folder the ones of most tests."""
    sizes = Counter(unit(item.nodeid) for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        own = unit(item.nodeid)
        return rank(own), -sizes[own], own

    items.sort(key=place)
