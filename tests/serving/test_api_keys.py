"""Keys in a file: made, found, rotated, and what a broken file does."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat

import pytest

from transformers_api.config.settings import SettingError, Settings
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.api_keys import ApiKeys
from transformers_api.serving.limits.key_file import KeyFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def keys(path):
    """A file with the keys of ann, who may infer, and of root."""
    return {name: KeyFile(path).add(name, s) for name, s in (("ann", "infer"), ("root", "admin"))}


def keys_of(path) -> ApiKeys:
    """What a server has that was started with this file."""
    keys = Access.from_settings(Settings(api_keys_file=path)).keys
    assert keys is not None
    return keys


def rewrite(path, text):
    """As an editor does: another file in its place."""
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


def test_a_key_is_found_by_its_secret_alone(path, keys):
    known = keys_of(path)
    assert known.find(keys["ann"]).name == "ann"
    assert known.find(keys["root"]).name == "root"
    for wrong in ("", "ann", keys["ann"][:-1], keys["ann"] + "x", keys["ann"].lower(), "é\udce9"):
        assert known.find(wrong) is None
    assert known.find(hashlib.sha256(keys["ann"].encode()).hexdigest()) is None


def test_admin_may_what_infer_may_and_not_the_other_way(path, keys):
    known = keys_of(path)
    ann, root = (known.find(keys[name]) for name in ("ann", "root"))
    assert (ann.may("infer"), ann.may("admin")) == (True, False)
    assert (root.may("infer"), root.may("admin")) == (True, True)


def test_a_key_has_256_random_bits_and_stands_nowhere_in_the_file(path, keys):
    for key in keys.values():
        assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
        assert key not in path.read_text()
    assert len(set(keys.values())) == 2


def test_a_new_file_is_for_its_owner_alone(path, keys):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_added_key_keeps_mode_comments_and_the_other_keys(path, keys):
    path.chmod(0o640)
    rewrite(path, "# of the team\n\n" + path.read_text().rstrip("\n"))
    path.chmod(0o640)
    secret = KeyFile(path).add("bob", "infer")
    known = keys_of(path)
    assert [known.find(key).name for key in (*keys.values(), secret)] == ["ann", "root", "bob"]
    assert path.read_text().startswith("# of the team\n\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-x", "é", "x" * 65, "a\nb"])
def test_a_bad_name_is_refused_and_nothing_is_written(path, name):
    with pytest.raises(ValueError, match="a name has"):
        KeyFile(path).add(name, "infer")
    assert not path.exists()


def test_a_name_that_is_taken_is_refused(path, keys):
    before = path.read_text()
    with pytest.raises(ValueError, match="has a key of the name ann"):
        KeyFile(path).add("ann", "admin")
    assert path.read_text() == before


def test_added_and_removed_keys_count_at_once(path, keys):
    known = keys_of(path)
    secret = KeyFile(path).add("bob", "infer")
    assert known.find(secret).name == "bob"
    KeyFile(path).remove("ann")
    assert known.find(keys["ann"]) is None
    assert known.find(secret).name == "bob"
    with pytest.raises(ValueError, match="no key of the name ann"):
        KeyFile(path).remove("ann")


@pytest.mark.parametrize(
    "text",
    [
        "ann:infer:sk-in-the-clear\n",
        "ann:boss:sha256$" + "0" * 64,
        "ann:infer:sha256$" + "0" * 63,
        "ann:infer:md5$" + "0" * 64,
        "ann",
        "\x00\x01",
        "ann:infer:sha256$" + "0" * 64 + "\nann:admin:sha256$" + "1" * 64,
    ],
)
def test_a_broken_file_keeps_the_keys_from_before_and_is_told_once(path, keys, caplog, text):
    known = keys_of(path)
    with caplog.at_level(logging.ERROR):
        rewrite(path, text)
        assert [known.find(key).name for key in (*keys.values(), keys["ann"])] == [
            "ann",
            "root",
            "ann",
        ]
    (record,) = caplog.records
    assert "the keys from before stay valid: line" in record.getMessage()
    assert "in-the-clear" not in record.getMessage()
    secret = "mended"
    rewrite(path, f"bob:infer:sha256${hashlib.sha256(secret.encode()).hexdigest()}\n")
    assert known.find(secret).name == "bob"
    assert known.find(keys["ann"]) is None


def test_a_file_that_is_gone_keeps_the_keys_from_before(path, keys, caplog):
    known = keys_of(path)
    path.unlink()
    assert known.find(keys["ann"]).name == "ann"
    assert known.find(keys["root"]).name == "root"
    assert len(caplog.records) == 1


def test_a_file_that_is_no_text_keeps_the_keys_from_before(path, keys, caplog):
    known = keys_of(path)
    path.write_bytes(b"\xff\xfe\xff")
    assert known.find(keys["ann"]).name == "ann"
    assert "it is not UTF-8" in caplog.text


def test_an_emptied_file_has_no_valid_key(path, keys):
    known = keys_of(path)
    path.write_text("# nobody\n")
    assert known.find(keys["ann"]) is None


def test_a_start_with_a_file_that_cannot_be_read_is_refused_in_one_line(path):
    with pytest.raises(SettingError, match=r"^API_KEYS_FILE=\S+ is not allowed: No such file"):
        keys_of(path)
    path.write_text("sk-pasted-by-mistake\n")
    with pytest.raises(SettingError, match="line 1 must be name:infer:sha256") as caught:
        keys_of(path)
    assert "pasted" not in str(caught.value)


def test_a_start_without_a_key_in_the_file_is_told(path, caplog):
    path.write_text("")
    assert keys_of(path).find("") is None
    assert "every request is refused" in caplog.text
