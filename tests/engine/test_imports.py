"""Collection, which waits for what several threads import or load at the same time."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest

from transformers_api.engine.platform.imports import without_collection


@pytest.mark.parametrize("first_out", [0, 1])
def test_collection_goes_on_when_the_last_of_several_has_come_to_its_end(first_out):
    loads = [ExitStack(), ExitStack()]
    for load in loads:
        load.enter_context(without_collection())
    loads.pop(first_out).close()
    assert not gc.isenabled()
    loads.pop().close()
    assert gc.isenabled()


def test_where_collection_is_off_already_it_stays_off():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
