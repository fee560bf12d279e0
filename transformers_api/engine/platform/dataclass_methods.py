"""Methods of dataclasses that are compiled when somebody calls them.

``@dataclass`` writes the source of up to six methods of a class and compiles each: in the 440
classes that a start imports that takes a tenth of its time. Hardly one of them is ever compared,
hashed or printed. ``__init__`` is made at once.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LATER = frozenset(
    {"__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__"}
    | {"__setattr__", "__delattr__"}  # of those that are frozen, where they raise
)
MAKE = "_create_fn"
HAS_MAKE = sys.version_info < (3, 13)  # from then on Python compiles the methods of a class at once


@contextmanager
def compiled_later() -> Iterator[None]:
    """While it lasts, dataclasses are made so. Theirs work afterwards as any do."""
    made_before = getattr(dataclasses, MAKE, None)
    if not HAS_MAKE or made_before is None:
        yield
        return
    make: Callable[..., Callable[..., Any]] = made_before

    def make_later(name: str, *args: Any, **options: Any) -> Callable[..., Any]:
        if name not in LATER:
            return make(name, *args, **options)
        method = functools.cache(lambda: make(name, *args, **options))

        def call(*values: Any, **named: Any) -> Any:
            return method()(*values, **named)

        call.__name__ = name
        return call

    setattr(dataclasses, MAKE, make_later)
    try:
        yield
    finally:
        setattr(dataclasses, MAKE, made_before)
