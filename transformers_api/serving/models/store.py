"""Makes models complete on this machine's disk: in place, from the Hub, converted once."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

from transformers_api.checkpoints.headers.gguf_adapter import read_model_header
from transformers_api.checkpoints.headers.gguf_split import split_parts
from transformers_api.config.settings import Settings
from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.errors import (
    InsufficientStorage,
    ModelLoadFailed,
    ModelNotCapable,
    ModelNotFound,
    ModelNotServable,
)
from transformers_api.serving.models import foreign, packages, preflight
from transformers_api.serving.models.adapter_files import check_base
from transformers_api.serving.models.adapter_store import AdapterStore
from transformers_api.serving.models.description import Description, describe
from transformers_api.serving.models.headers import read_object
from transformers_api.serving.models.hub import (
    HubCache,
    HubUnreachable,
    Progress,
    RepositoryMissing,
    check_download,
)
from transformers_api.serving.models.sidecars import CONVERSION, remove_stale, tensor_shapes
from transformers_api.serving.models.spec import (
    HubSource,
    ModelFiles,
    ModelSpec,
    PackageSource,
    PathSource,
    UpstreamSource,
)

CONVERTER = "transformers_api.checkpoints.convert"
SIDECAR_MAKER = "transformers_api.checkpoints.sidecar"
CONVERTIBLE = (".gguf", ".pt", ".pth")  # the last two: TinyGPT, niels-gpt, GPT3-dev
CONVERTER_VERSION = 3  # the converter's own; what an earlier one has made is made anew
NO_ROOM_EXIT = 28  # the converter's exit status when the disk is full
# (GGUF file, folder to make, progress, warning): what SIDECAR_MAKER does, in this process
WriteSidecar = Callable[[Path, Path, Progress, Callable[[str], None]], None]
_PROGRAM_ROOT = Path(__file__).resolve().parents[3]

logger = logging.getLogger(__name__)


class ModelStore:
    """Knows where every model lies. Safe from any thread, and beside other processes.

    ``knows_model_type`` says which architectures can be built without a folder's own code; by
    default those of the installed transformers. ``write_sidecar`` makes the sidecar of a GGUF file;
    by default a process of its own does.
    """

    def __init__(
        self,
        settings: Settings,
        knows_model_type: Callable[[str], bool] | None = None,
        write_sidecar: WriteSidecar | None = None,
    ) -> None:
        self._folder = settings.model_store.absolute()
        self._packages = self._folder / "packages"
        self._hub = HubCache(settings.hub_cache.absolute(), settings.hf_token)
        self._may_download = settings.downloads_allowed
        self.adapters = AdapterStore(self._hub, settings)
        self._knows = knows_model_type
        self.write_sidecar = write_sidecar

    def locate(self, spec: ModelSpec) -> Path | None:
        """The folder of a model that is complete on the disk. No network, nothing is changed."""
        if spec.adapter is not None and self.adapters.locate(spec) is None:
            return None
        try:
            path = self._local_path(spec)
        except ModelLoadFailed:
            return None
        if path is None:
            return None
        if _is_standard(path):
            return path if preflight.is_complete(path) else None
        folder = self._converted(spec, path)
        return folder if preflight.is_complete(folder) and _is_current(folder) else None

    def is_cached(self, spec: ModelSpec) -> bool:
        """True where the model can be loaded without a download or a conversion."""
        return self.locate(spec) is not None

    def has_repo(self, repo: str) -> bool:
        """True where a repository of the Hub is complete in the cache. The id must be checked."""
        return self._hub.complete(HubSource(repo)) is not None

    def cached_hub_repos(self) -> list[str]:
        """The repositories of the Hub that are complete in the cache."""
        return self._hub.repos()

    def describe(self, spec: ModelSpec) -> Description:
        """The description by its files' headers, also of files that are yet to be converted."""
        path = self.path(spec.resident)
        return Description() if path is None else describe(path)

    def path(self, spec: ModelSpec) -> Path | None:
        """The folder of ``locate``, or files that are yet to be converted; None: to be fetched."""
        if (folder := self.locate(spec)) is not None:
            return folder
        if spec.adapter is not None and self.adapters.locate(spec) is None:
            return None
        try:
            return self._local_path(spec)
        except ModelLoadFailed:
            return None

    def refusal(self, spec: ModelSpec) -> str | None:
        """The reason why a model can never be served; None where it may be."""
        if spec.refusal is not None:
            return spec.refusal
        folder = self.locate(spec)
        return preflight.refusal(folder, spec.encoder) if folder else None

    def check_exists(self, spec: ModelSpec) -> None:
        """Raise ModelNotFound for an id that only the Hub could know, and it does not."""
        if spec.registered or self.is_cached(spec) or not isinstance(spec.source, HubSource):
            return
        try:
            self._hub.check_exists(spec.source)
        except (RepositoryMissing, HubUnreachable):
            raise ModelNotFound(spec.name) from None

    def check_source(self, spec: ModelSpec) -> None:
        """Raise ModelLoadFailed when ``prepare`` cannot succeed, as far as one knows without it."""
        _check_servable(spec)
        if self._local_path(spec) is None:
            self._check_download(spec)
        if spec.adapter is not None:
            self.adapters.check_source(spec)

    def prepare_adapter(
        self, spec: ModelSpec, progress: Progress
    ) -> tuple[AdapterSource, ModelFiles]:
        """Make adapter and base complete on the disk, and check them and that they fit.

        Raises ModelLoadFailed, InsufficientStorage, InsufficientMemory.
        """
        _check_servable(spec)
        source, sizes = self.adapters.prepare(spec, progress)
        base = self.prepare(spec.resident, progress)
        check_base(source, sizes, tensor_shapes(base.folder))
        return source, base

    def prepare(self, spec: ModelSpec, progress: Progress) -> ModelFiles:
        """Make the files complete on the disk and check them: serving.models.Loader.prepare."""
        _check_servable(spec)
        path = self._local_path(spec)
        if path is None:
            path = self._fetch(spec, progress)
        if _is_standard(path):
            files = self._inspect(spec, path)
        else:
            files = self._prepare_converted(spec, path, progress)
        progress(1.0, "ready")
        return files

    def check_files(self, spec: ModelSpec) -> None:
        """Raise ModelLoadFailed for a model on this disk that ``prepare`` would refuse unread."""
        self.check_source(spec)
        path = self._local_path(spec)
        if path is not None and path.suffix == ".gguf":
            read_model_header(path)
        elif path is not None and _is_standard(path):
            self._inspect(spec, path)

    def _local_path(self, spec: ModelSpec) -> Path | None:
        """The folder or file of a model, None where it has to be fetched first."""
        match spec.source:
            case HubSource() as source:
                if source.file is not None and not source.file.endswith(CONVERTIBLE):
                    raise ModelLoadFailed(
                        f"{spec.name}: {source.file} cannot be converted: expected one of "
                        f"{', '.join(CONVERTIBLE)}"
                    )
                path = self._hub.complete(source)
            case PathSource(path=location):
                path = location.absolute()
                if not path.exists():
                    raise ModelLoadFailed(f"{spec.name}: {path} does not exist")
                path = foreign.only_gguf(path) or path
                path = split_parts(path)[0] if path.suffix == ".gguf" else path
            case PackageSource() as source:
                located = packages.locate(spec.name, source, self._packages)
                path = located[1] if located else None
            case UpstreamSource():
                return None
        if path is not None and not path.is_dir() and path.suffix not in CONVERTIBLE:
            raise ModelLoadFailed(
                f"{spec.name}: {path} is neither a folder nor one of {', '.join(CONVERTIBLE)}"
            )
        return path

    def _fetch(self, spec: ModelSpec, progress: Progress) -> Path:
        if spec.upstream is not None:
            raise ModelNotCapable(
                f"Model '{spec.name}' is served by an upstream: it is not loaded here",
                param="model",
            )
        self._check_download(spec)
        if isinstance(spec.source, PackageSource):
            return packages.fetch(spec.name, spec.source, self._packages, progress)
        assert isinstance(spec.source, HubSource)
        try:
            return self._hub.fetch(
                spec.source,
                progress,
                trust_remote_code=spec.trust_remote_code,
                check=lambda folder: preflight.check_config(
                    folder, spec.trust_remote_code, self._knows, spec.encoder
                ),
            )
        except (RepositoryMissing, HubUnreachable):
            if spec.registered:
                raise
            raise ModelNotFound(spec.name) from None  # a client's own invention

    def _check_download(self, spec: ModelSpec) -> None:
        if isinstance(spec.source, PackageSource):
            packages.check_fetch(spec.name, spec.source, self._may_download)
        elif isinstance(spec.source, HubSource):
            check_download(spec.source, self._may_download)

    def _inspect(self, spec: ModelSpec, folder: Path) -> ModelFiles:
        return preflight.inspect_folder(folder, spec.trust_remote_code, self._knows, spec.encoder)

    def _converted(self, spec: ModelSpec, path: Path) -> Path:
        """The folder of a file's conversion: another file, another folder."""
        match spec.source:
            case PackageSource(package, file) as source:
                located = packages.locate(spec.name, source, self._packages)
                version = located[0] if located else source.version
                identity = f"{package}=={version}/{file}:{path.stat().st_size}"
            case HubSource(repo, _, file):
                # the folder of a snapshot is named after its commit
                snapshot = path.parents[len(Path(file).parts) - 1] if file else path
                identity = f"{repo}/{snapshot.name}/{file}"
            case _:
                identity = "+".join(map(_stamp, _converted_from(path)))
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-")[:80] or "model"
        return self._folder / f"{name}-{fingerprint}"

    def _prepare_converted(self, spec: ModelSpec, path: Path, progress: Progress) -> ModelFiles:
        folder = self._converted(spec, path)
        if folder.exists() and not _is_current(folder):
            progress(0.0, "preparing again: an earlier version has made these files")
        elif folder.exists():
            try:
                return self._inspect(spec, folder)
            except ModelLoadFailed:
                progress(
                    0.0, "preparing again: these files are damaged, or their source has changed"
                )
        if path.suffix != ".gguf":
            _run(CONVERTER, spec, path, folder, progress)
        else:
            self._make_sidecar(spec, path, folder, progress)
        return self._inspect(spec, folder)

    def _make_sidecar(self, spec: ModelSpec, path: Path, folder: Path, progress: Progress) -> None:
        if self.write_sidecar is None:
            _run(SIDECAR_MAKER, spec, path, folder, progress)
        else:
            try:
                self.write_sidecar(path, folder, progress, partial(_warn, spec.name))
            except InsufficientStorage as error:
                raise InsufficientStorage(_unprepared(spec, path, error.message)) from None
            except ModelLoadFailed as error:
                raise ModelLoadFailed(_unprepared(spec, path, error.message)) from None
            except OSError as error:
                kind = InsufficientStorage if error.errno == errno.ENOSPC else ModelLoadFailed
                raise kind(_unprepared(spec, path, str(error))) from error
        remove_stale(self._folder)


def _check_servable(spec: ModelSpec) -> None:
    if spec.refusal is not None:
        raise ModelNotServable(f"Model '{spec.name}': {spec.refusal}", param="model")


def _is_standard(path: Path) -> bool:
    """True where transformers can load a model where it lies."""
    return path.is_dir() and not preflight.is_original(path)


def _is_current(folder: Path) -> bool:
    """True where the converter of this version has made the folder."""
    try:
        record = read_object(folder / CONVERSION)
    except ModelLoadFailed:
        return False
    return record.get("version") == CONVERTER_VERSION


def _converted_from(path: Path) -> list[Path]:
    """The files that a conversion depends on."""
    if path.is_dir():
        return [*sorted(path.glob("*.safetensors")), path / "config.json"]
    beside = path.with_name("config.json")
    if path.suffix == ".gguf":
        return split_parts(path)
    return [path, beside] if beside.is_file() else [path]


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _run(module: str, spec: ModelSpec, source: Path, folder: Path, progress: Progress) -> None:
    """Prepare in a process of its own. Raises ModelLoadFailed, InsufficientStorage."""
    command = [sys.executable, "-m", module, str(source), str(folder)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, cwd=_PROGRAM_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                _forward(line, spec.name, progress)
            status = process.wait()
        except BaseException:
            process.kill()
            raise
        if status == 0:
            return
        reason = _last_line(errors) or f"it ended with status {status}"
    message = _unprepared(spec, source, reason)
    raise InsufficientStorage(message) if status == NO_ROOM_EXIT else ModelLoadFailed(message)


def _unprepared(spec: ModelSpec, source: Path, reason: str) -> str:
    what = "read" if source.suffix == ".gguf" else "converted"
    return f"{spec.name}: {source.name} could not be {what}: {reason}"


def _warn(name: str, what: str) -> None:
    logger.warning("%s: %s", name, what)


def _forward(line: str, name: str, progress: Progress) -> None:
    word, _, rest = line.strip().partition(" ")
    if word == "warning":
        _warn(name, rest)
    share, _, what = rest.partition(" ")
    if word == "progress":
        progress(float(share), what)


def _last_line(file: TextIO) -> str:
    file.seek(0)
    lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:500] if lines else ""
