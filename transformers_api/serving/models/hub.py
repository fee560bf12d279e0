"""Files of the Hugging Face Hub: what the local cache has, and downloading what it lacks.

The endpoint is the Hub's own setting (HF_ENDPOINT). Small files come before the weights, so that a
snapshot whose weights are complete is complete, whenever a download was cut off.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_split import part_names
from transformers_api.errors import ApiError, InsufficientStorage, ModelLoadFailed
from transformers_api.serving.models import foreign, preflight
from transformers_api.serving.models.spec import HubSource

RESERVE_BYTES = 1 << 30  # left free on the disk for everybody else
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # of LoRA
ENCODER_STEP = "[0-9]_*/config.json"  # how a sentence encoder pools
STEP_WEIGHTS = "[0-9]_*/model.safetensors"  # of a layer behind its pooling
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 22
ASK_TIMEOUT_S = 5.0
ANSWER_S, MAX_ANSWERS = 60.0, 256

Progress = Callable[[float, str], None]


class RepositoryMissing(ModelLoadFailed):
    """The Hub has no such repository, or not for us."""


class HubUnreachable(ModelLoadFailed):
    """The Hub did not say what a repository holds."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository, as the Hub describes it."""

    bytes: int
    sha256: str | None  # of large files only


class HubCache:
    """The folder that huggingface_hub keeps, and the way to fill it."""

    def __init__(self, folder: Path, token: str | None) -> None:
        self.folder = folder
        self._token = token
        self._answers: dict[tuple[str, str | None], tuple[float, ModelLoadFailed | None]] = {}

    def snapshot(self, source: HubSource) -> Path | None:
        """The folder of a revision that is at least partly here. No network."""
        repo = self.folder / f"models--{source.repo.replace('/', '--')}"
        commit = source.revision or "main"
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (repo / "refs" / commit).read_text().strip()
            except OSError:
                return None
        snapshot = repo / "snapshots" / commit
        return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None

    def complete(self, source: HubSource) -> Path | None:
        """The folder of the model, or its GGUF file, when all of it is here. No network."""
        snapshot = self.snapshot(source)
        if snapshot is None:
            return None
        if source.file is not None:
            parts = [snapshot / name for name in part_names(source.file)]
            return parts[0] if all(part.is_file() for part in parts) else None
        return snapshot if preflight.is_complete(snapshot) else None

    def adapter(self, source: HubSource) -> Path | None:
        """The folder of an adapter, when all of it is here. No network."""
        snapshot = self.snapshot(source)
        is_there = snapshot is not None and all((snapshot / n).is_file() for n in ADAPTER)
        return snapshot if is_there else None

    def repos(self) -> list[str]:
        """Every repository whose model is complete here."""
        names = (path.name for path in sorted(self.folder.glob("models--*--*")))
        repos = [name.removeprefix("models--").replace("--", "/") for name in names]
        return [repo for repo in repos if repo.count("/") == 1 and self.complete(HubSource(repo))]

    def fetch(
        self,
        source: HubSource,
        progress: Progress,
        *,
        trust_remote_code: bool = False,
        is_adapter: bool = False,
        check: Callable[[Path], object] = lambda folder: None,
    ) -> Path:
        """Download what is missing; the folder, or the GGUF file.

        ``check`` looks at the small files before the weights are fetched. Raises ModelLoadFailed,
        InsufficientStorage.
        """
        progress(0.0, "asking the Hub")
        with _explained(source, self._token, HubUnreachable):
            files = self._list(source)
        with _explained(source, self._token):
            if is_adapter:
                small, weights = _choose_adapter(source, files)
            else:
                small, weights = _choose(source, files, trust_remote_code)
            self._check_room(source, {name: files[name] for name in small + weights})
            total = sum(files[name].bytes for name in small + weights)
            bar = _progress_bar(max(total, 1), progress)
            folder = self._download(source, small or weights, bar)
            if small:
                check(folder)
            present = {name for name in weights if (folder / name).exists()}
            self._download(source, weights, bar)
            for name in set(weights) - present:
                _verify(folder / name, files[name], progress)
        return folder / part_names(source.file)[0] if source.file else folder

    def check_exists(self, source: HubSource) -> None:
        """Raise RepositoryMissing or HubUnreachable unless the Hub has the repository.

        An answer is remembered for a minute.
        """
        now, key = time.monotonic(), (source.repo, source.revision)
        until, error = self._answers.get(key, (0.0, None))
        if until < now:
            error = self._ask(source)
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            self._answers[key] = (now + ANSWER_S, error)
        if error is not None:
            raise type(error)(error.message)

    def _ask(self, source: HubSource) -> ModelLoadFailed | None:
        from huggingface_hub import HfApi

        try:
            with _explained(source, self._token, HubUnreachable):
                HfApi(token=self._token).model_info(
                    source.repo, revision=source.revision, timeout=ASK_TIMEOUT_S
                )
        except (RepositoryMissing, HubUnreachable) as error:
            return error
        except ModelLoadFailed:  # such as a gated one: it exists
            return None
        return None

    def sizes(self, source: HubSource) -> tuple[int, int]:
        """Bytes of the files that ``fetch`` takes, and of all, as the Hub says; downloads nothing.

        Raises ModelLoadFailed.
        """
        with _explained(source, self._token):
            files = self._list(source)
            small, weights = _choose(source, files, trust_remote_code=False)
        needed = sum(files[name].bytes for name in small + weights)
        return needed, sum(file.bytes for file in files.values())

    def _list(self, source: HubSource) -> dict[str, RemoteFile]:
        from huggingface_hub import HfApi

        info = HfApi(token=self._token).model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=30
        )
        return {
            file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }

    def _check_room(self, source: HubSource, files: Mapping[str, RemoteFile]) -> None:
        snapshot = self.snapshot(source)
        missing = sum(
            file.bytes
            for name, file in files.items()
            if snapshot is None or not (snapshot / name).exists()
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if missing and free < missing + RESERVE_BYTES:
            raise InsufficientStorage(
                f"{source.repo} needs {(missing + RESERVE_BYTES) / 1e9:.1f} GB in {self.folder}, "
                f"{free / 1e9:.1f} GB are free"
            )

    def _download(self, source: HubSource, names: list[str], bar: type[Any]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                source.repo,
                revision=source.revision,
                cache_dir=self.folder,
                token=self._token,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=bar,
            )
        )


def check_download(source: HubSource, is_allowed: bool) -> None:
    """Raise ModelLoadFailed where nothing may be fetched."""
    if not is_allowed:
        raise ModelLoadFailed(
            f"{source.repo} is not on this machine and downloads are off; run the pull command "
            "with ALLOW_DOWNLOAD=true"
        )


def _choose(
    source: HubSource, files: Mapping[str, RemoteFile], trust_remote_code: bool
) -> tuple[list[str], list[str]]:
    """(small files, weights) of a repository: its top folder, safetensors only; encoders' steps."""
    if source.file is not None:
        names = part_names(source.file)
        if missing := [name for name in names if name not in files]:
            raise ModelLoadFailed(f"{source.repo} has no file {missing[0]}")
        return [], names
    patterns = (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES
    small = [
        name
        for name in files
        if ("/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns))
        or fnmatchcase(name, ENCODER_STEP)
    ]
    steps = [name for name in files if fnmatchcase(name, STEP_WEIGHTS)]
    if preflight.MODULES not in files:
        steps = []
    if preflight.WEIGHTS in files:
        return small, [preflight.WEIGHTS, *steps]
    if preflight.INDEX in files:
        shards = [name for name in files if fnmatchcase(name, "model-*.safetensors")]
        return small, [*shards, *steps]
    if names := foreign.ggufs(files):
        raise ModelLoadFailed(
            f"{source.repo} has no weights in the safetensors format, but GGUF files: name one as "
            f"file in a registry entry, such as {names[0]}"
        )
    if "adapter_config.json" in files:
        raise ModelLoadFailed(
            f"{source.repo} is an adapter, no model: give it a registry entry with adapter and base"
        )
    if any(fnmatchcase(name, pattern) for name in files for pattern in preflight.PICKLES):
        raise ModelLoadFailed(
            f"{source.repo} has its weights only in the pickle format, which can run code when it "
            "is read and is refused; name a revision that has safetensors (many repositories have "
            "one as refs/pr/N) in a registry entry"
        )
    raise ModelLoadFailed(f"{source.repo} has no weights in the safetensors format")


def _choose_adapter(
    source: HubSource, files: Mapping[str, RemoteFile]
) -> tuple[list[str], list[str]]:
    config, weights = ADAPTER
    if config not in files:
        raise ModelLoadFailed(f"{source.repo} has no {config}, so it is no adapter")
    if weights in files:
        return [config], [weights]
    pickle = ": its weights in the pickle format can run code when they are read, and are refused"
    reason = pickle if "adapter_model.bin" in files else ""
    raise ModelLoadFailed(f"{source.repo} has no {weights}{reason}")


def _verify(path: Path, expected: RemoteFile, progress: Progress) -> None:
    """Compare a fresh download with the checksum that the Hub gave; a wrong one is removed."""
    if expected.sha256 is None:
        return
    progress(1.0, f"checking {path.name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ModelLoadFailed(f"{path.name} arrived damaged: its checksum is not the Hub's")


def _progress_bar(total: int, progress: Progress) -> type[Any]:
    """A class that huggingface_hub takes for its progress bar and that tells ``progress``."""
    import huggingface_hub.utils

    base: Any = huggingface_hub.utils.tqdm  # type: ignore[attr-defined]
    lock, done = threading.Lock(), 0

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of the two bars for bytes, one counts the network and one the disk.
            self._counts = str(kwargs.get("desc")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self._counts and n:
                with lock:
                    done += int(n)
                    share = min(done / total, 1.0)
                progress(share, "downloading")

    return Bar


@contextmanager
def _explained(
    source: HubSource, token: str | None, unreachable: type[ModelLoadFailed] = ModelLoadFailed
) -> Iterator[None]:
    """Turn what the Hub's library raises into our errors, with the token in none of them."""
    kind = ModelLoadFailed
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except ApiError:
        raise
    except errors.GatedRepoError:
        message = "is gated: accept its terms on the Hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        raise RepositoryMissing(
            f"{source.repo} does not exist on the Hub, or is private and HF_TOKEN does not open it"
        ) from None
    except errors.RevisionNotFoundError:
        message = f"has no revision {source.revision}"
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError, errors.EntryNotFoundError) as error:
        kind, message = unreachable, f"could not be fetched: {_redacted(error, token)}"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InsufficientStorage(f"The disk is full: {source.repo} is incomplete") from error
        kind, message = unreachable, f"could not be fetched: {_redacted(error, token)}"
    except ValueError as error:
        message = f"could not be fetched: {_redacted(error, token)}"
    else:
        return
    raise kind(f"{source.repo} {message}") from None


def _redacted(error: Exception, token: str | None) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if token:
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
