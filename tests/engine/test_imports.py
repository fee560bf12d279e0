"""Imports: collection waits for them, and patterns wait until they are used."""

from __future__ import annotations

import gc
import importlib
import re
import sys
from contextlib import ExitStack

import pytest

from transformers_api.engine.platform.deferred_modules import PatternsLater, treated
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


def test_patterns_are_compiled_when_they_are_used_and_match_what_they_should(tmp_path, monkeypatch):
    source = "import re\nWORD = re.compile('a+', flags=re.I)\nWRONG = re.compile('(')\n"
    (tmp_path / "words_and_more.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with treated("words_and_more", PatternsLater):
        module = importlib.import_module("words_and_more")
    monkeypatch.delitem(sys.modules, "words_and_more")
    assert module.WORD.match("Aab").group() == "Aa"
    assert module.WORD.pattern == "a+"
    with pytest.raises(re.error):
        module.WRONG.match("a")
    assert isinstance(re.compile("a"), re.Pattern)


def test_mail_addresses_are_validated_as_they_would_be(monkeypatch):
    monkeypatch.delitem(sys.modules, "marshmallow.validate", raising=False)
    with treated("marshmallow.validate", PatternsLater):
        validate = importlib.import_module("marshmallow.validate")
    assert validate.Email()("somebody@example.org") == "somebody@example.org"
    with pytest.raises(validate.ValidationError):
        validate.Email()("somebody@.org")
