"""The choice of a replica for a model: which are to be asked, in which order. Plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
silent: set[str] = set()  # replicas that do not answer this process
requests: dict[str, int] = {}  # in flight on each that does


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


def note(in_flight: Mapping[str, int], unanswering: Iterable[str]) -> None:
    """Tell the routers of this process how much each replica has to do, and which are silent.

    Those that do not answer are asked only where there are no others.
    """
    names = set(unanswering)
    silent.intersection_update(names)
    silent.update(names)
    requests.update(in_flight)
    for name in set(requests) - set(in_flight):
        del requests[name]
