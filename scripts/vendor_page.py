"""Bring the libraries and fonts of the page into transformers_api/api/web/static/vendor.

python -m scripts.vendor_page           # download what is pinned here, with `npm pack`
python -m scripts.vendor_page --check   # compare the files with the table in their README, offline
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

VENDOR = Path(__file__).parent.parent / "transformers_api" / "api" / "web" / "static" / "vendor"
LANGUAGES = ("bash", "cpp", "css", "go", "java", "javascript")
LANGUAGES += ("json", "markdown", "python", "rust", "sql", "xml")
ROW = re.compile(r"^\| `([^`]+)` \| \S+ \| \S+ \| .+ \| `([0-9a-f]{64})` \|", re.MULTILINE)
INTRODUCTION = """\
# What the page takes from others

Unmodified, one file each, from the packages of npm. `python -m scripts.vendor_page` writes this
folder and this table (a change of version is made there), `python -m scripts.vendor_page --check`
compares the two. The licences are in `licences/`.

| file | package | version | licence | SHA-256 | place in the package |
| --- | --- | --- | --- | --- | --- |
"""


class Package(NamedTuple):
    """A package of npm: its version, its licence, and what is taken: {place in it: name here}."""

    name: str
    version: str
    licence: str
    files: dict[str, str]

    @property
    def licence_file(self) -> str:
        """Where its licence lies, beside its files."""
        return f"licences/{self.name.lstrip('@').replace('/', '-')}.txt"


HIGHLIGHT = {"es/core.min.js": "hljs-core.js"} | {
    f"es/languages/{language}.min.js": f"hljs-{language}.js" for language in LANGUAGES
}
INTER = "inter-latin-wght-normal.woff2"
MONO = "jetbrains-mono-latin-wght-normal.woff2"
PACKAGES = [
    Package("marked", "18.2.1", "MIT", {"lib/marked.esm.js": "marked.esm.js"}),
    Package("dompurify", "3.5.0", "Apache-2.0", {"dist/purify.es.mjs": "purify.es.js"}),
    Package("@highlightjs/cdn-assets", "11.12.0", "BSD-3-Clause", HIGHLIGHT),
    Package(
        "uplot",
        "1.6.32",
        "MIT",
        {"dist/uPlot.esm.js": "uPlot.esm.js", "dist/uPlot.min.css": "uPlot.min.css"},
    ),
    Package("temml", "0.13.5", "MIT", {"dist/temml.min.js": "temml.js"}),
    Package("eventsource-parser", "3.1.1", "MIT", {"dist/index.js": "eventsource-parser.js"}),
    Package("idb", "8.0.4", "ISC", {"build/index.js": "idb.js"}),
    Package("@fontsource-variable/inter", "5.3.0", "OFL-1.1", {f"files/{INTER}": f"fonts/{INTER}"}),
    Package(
        "@fontsource-variable/jetbrains-mono",
        "5.3.0",
        "OFL-1.1",
        {f"files/{MONO}": f"fonts/{MONO}"},
    ),
]


def download(package: Package) -> dict[str, bytes]:
    """Its files and its licence, {name here: content}, from the registry that npm is set to."""
    places = package.files | {"LICENSE": package.licence_file}
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder]
        pinned = f"{package.name}@{package.version}"
        subprocess.run([*command, pinned], check=True, stdout=subprocess.DEVNULL, timeout=300)
        (archive,) = Path(folder).iterdir()
        with tarfile.open(archive) as members:
            return {name: _member(members, f"package/{at}") for at, name in places.items()}


def _member(members: tarfile.TarFile, name: str) -> bytes:
    file = members.extractfile(name)
    assert file is not None, f"{name} is no file"
    return file.read()


def table(contents: dict[str, bytes]) -> str:
    """The rows of the README: a file each, the licences included."""
    rows = []
    for package in PACKAGES:
        for at, name in [*package.files.items(), ("LICENSE", package.licence_file)]:
            digest = hashlib.sha256(contents[name]).hexdigest()
            about = f"{package.name} | {package.version} | {package.licence}"
            rows.append(f"| `{name}` | {about} | `{digest}` | `{at}` |\n")
    return "".join(rows)


def write(folder: Path) -> None:
    """Make ``folder`` anew from the registry."""
    contents = {name: data for package in PACKAGES for name, data in download(package).items()}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text(INTRODUCTION + table(contents))


def differences(folder: Path) -> list[str]:
    """What is not as the table in the README, or this file, says: a sentence each."""
    listed = dict(ROW.findall((folder / "README.md").read_text()))
    here = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pinned = {n for package in PACKAGES for n in [*package.files.values(), package.licence_file]}
    sentences = [f"{name} is not in the table" for name in here - {"README.md"} - set(listed)]
    sentences += [f"{name} is missing" for name in set(listed) - here]
    sentences += [f"{name} is pinned and not in the table" for name in pinned - set(listed)]
    for name in set(listed) & here:
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != listed[name]:
            sentences.append(f"{name} was changed")
    text = (folder / "README.md").read_text()
    for package in PACKAGES:
        if f"| {package.name} | {package.version} | {package.licence} |" not in text:
            sentences.append(f"{package.name} {package.version} is not what the table says")
    return sorted(sentences)


def main() -> int:
    """Write the folder, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare, offline")
    if not parser.parse_args().check:
        write(VENDOR)
    wrong = differences(VENDOR)
    for sentence in wrong:
        print(sentence, file=sys.stderr)  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
