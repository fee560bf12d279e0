"""Folders of this machine, taken out of what clients are told; the log keeps them."""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError, ModelNotCapable
from transformers_api.serving.models.spec import ModelSpec, PathSource

HIDDEN = "…"
PACKAGE = Path(__file__).parents[2]
# Folders of an absolute path, up to its last name; neither of a URL nor of a relative path.
_FOLDERS = re.compile(r"""(?<![\w.…/:<~-])/([^\s/'"`,;:()<>|]+)/(?:[^\s/'"`,;:()<>|]+/)*""")


class PrivatePaths:
    """The folders of an application, with all that lies in them, and other absolute paths."""

    def __init__(self, settings: Settings, specs: Iterable[ModelSpec]) -> None:
        registry = settings.model_registry_path
        folders = [
            *(settings.model_store, settings.hf_home, settings.hub_cache, settings.native_cache),
            *([registry.parent] if registry else []),
            *(
                _folder(source.path)
                for spec in specs
                for source in (spec.source, spec.adapter)
                if isinstance(source, PathSource)
            ),
            *(PACKAGE, Path(sys.prefix), Path.cwd(), Path.home(), Path(tempfile.gettempdir())),
        ]
        names = {str(form) for path in folders for form in (path.absolute(), path.resolve())}
        longest_first = sorted(names - {"/"}, key=len, reverse=True)
        self._folders = re.compile(rf"(?:{'|'.join(map(re.escape, longest_first))})(?![\w-]|\.\w)")

    def hide(self, text: str) -> str:
        """``text`` without them: file names, and paths inside a folder, stay."""
        if "/" not in text:
            return text
        return _FOLDERS.sub(_hidden, self._folders.sub(HIDDEN, text))

    def public(self, error: ApiError) -> ApiError:
        """``error`` as a client may see it.

        What is the client's fault repeats what the client sent, and that stays as it is.
        """
        if error.status < 500 and not isinstance(error, ModelNotCapable):
            return error
        other = copy.copy(error)
        other.message = self.hide(error.message)
        return other


def _folder(path: Path) -> Path:
    return path.parent if path.suffix else path


def _hidden(match: re.Match[str]) -> str:
    return f"{HIDDEN}/" if os.path.isdir(f"/{match[1]}") else match[0]
