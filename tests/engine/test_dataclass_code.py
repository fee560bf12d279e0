"""Methods of dataclasses, whose code is taken from the disk."""

from __future__ import annotations

import builtins
import dataclasses
import threading
from typing import Any, NoReturn

import pytest

from transformers_api.engine.platform.dataclass_code import stored_methods


def point() -> Any:
    """A dataclass with all kinds of methods."""

    @dataclasses.dataclass(frozen=True, order=True, slots=True)
    class Point:
        x: int
        y: list[int] = dataclasses.field(default_factory=list)

    return Point


def is_whole(made: Any) -> bool:
    """True where the methods do what they should."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        made(1).x = 2
    return made(1, [2]) == made(1, [2]) < made(2) and repr(made(1)).endswith("Point(x=1, y=[])")


@pytest.fixture
def without_compiler(monkeypatch):
    def fail(*_args: object, **_options: object) -> NoReturn:
        raise AssertionError("compiled once more")

    return lambda: monkeypatch.setattr(builtins, "compile", fail)


def test_code_is_compiled_once_and_taken_from_the_disk_after_that(tmp_path, without_compiler):
    with stored_methods(tmp_path, "app"):
        first = point()
    without_compiler()
    with stored_methods(tmp_path, "app"):
        second = point()
    assert is_whole(first)
    assert is_whole(second)


def test_a_damaged_file_is_not_used_and_written_anew(tmp_path, without_compiler):
    with stored_methods(tmp_path, "app"):
        point()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with stored_methods(tmp_path, "app"):
        assert is_whole(point())
    assert file.read_bytes() == content
    without_compiler()
    with stored_methods(tmp_path, "app"):
        assert is_whole(point())


@pytest.mark.parametrize("others", [0o020, 0o002], ids=["group", "all"])
def test_a_file_that_others_can_write_is_not_used(tmp_path, others, caplog):
    with stored_methods(tmp_path, "app"):
        point()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o644 | others)
    with stored_methods(tmp_path, "app"):
        assert is_whole(point())
    assert "can write" in caplog.text
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_file_has_what_was_used_when_it_was_written_last(tmp_path):
    with stored_methods(tmp_path, "app"):
        point()
    (file,) = tmp_path.iterdir()
    alone = file.read_bytes()
    with stored_methods(tmp_path, "app"):
        dataclasses.make_dataclass("Other", ["a", "b"])
    assert file.read_bytes() != alone
    with stored_methods(tmp_path, "app"):
        point()
    assert file.read_bytes() == alone


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path):
    (tmp_path / "imports").write_text("a file")
    with stored_methods(tmp_path / "imports", "app"):
        assert is_whole(point())


def test_other_threads_compile_theirs_and_dataclasses_are_what_they_were_after_it(tmp_path):
    made = []
    with stored_methods(tmp_path, "app"):
        thread = threading.Thread(target=lambda: made.append(point()))
        thread.start()
        thread.join()
    assert is_whole(made[0])
    assert not list(tmp_path.iterdir())
    assert not hasattr(dataclasses, "exec")
