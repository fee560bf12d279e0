"""What the page takes from others is what its table says, and comes with its licences."""

from __future__ import annotations

import shutil

import pytest

from scripts import vendor_page


def test_the_vendored_files_are_those_of_the_table():
    assert vendor_page.differences(vendor_page.VENDOR) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "idb.js").write_text("let idb;"), "idb.js was changed"),
        (lambda folder: (folder / "idb.js").unlink(), "idb.js is missing"),
        (lambda folder: (folder / "more.js").touch(), "more.js is not in the table"),
    ],
    ids=["changed", "missing", "one more"],
)
def test_a_change_of_a_vendored_file_is_named(change, sentence, tmp_path):
    folder = shutil.copytree(vendor_page.VENDOR, tmp_path / "vendor")
    change(folder)
    assert vendor_page.differences(folder) == [sentence]


def test_no_vendored_script_asks_for_another_file_or_another_origin():
    for path in vendor_page.VENDOR.glob("*.js"):
        text = path.read_text()
        assert "import(" not in text, path.name
        assert "\nimport " not in f"\n{text}", path.name
