"""The choice of a replica for a model: which are to be asked, in which order. Plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
silent: set[str] = set()  # replicas that do not answer this process


def ranks(
    replicas: Sequence[T],
    spread: int,
    *,
    holds: Callable[[T], bool],
    is_empty: Callable[[T], bool],
    work: Callable[[T], int],
) -> list[list[T]]:
    """``replicas`` by preference, those of a group from little work to much; the first is asked.

    Those that have the model come first, while they have fewer than ``spread`` requests. Then it
    is hot, and one without any work takes it, too, in place of its own. Where nobody has it, an
    empty replica comes before one that has to swap.
    """
    order = sorted(replicas, key=lambda each: (work(each), not is_empty(each)))
    holders = [each for each in order if holds(each)]
    others = [each for each in order if not holds(each)]
    free = [each for each in holders if work(each) < spread]
    full = [each for each in holders if work(each) >= spread]
    takers = [each for each in others if is_empty(each) or (holders and not work(each))]
    first = free or takers
    rest = [each for each in others if each not in first]
    return [group for group in (first, full, rest) if group]


def avoid(replicas: Iterable[str]) -> None:
    """Let the routers of this process ask these only where there are no others."""
    names = set(replicas)
    silent.intersection_update(names)
    silent.update(names)
