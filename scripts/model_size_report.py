"""Say how much room the models of the registry take.

    python scripts/model_size_report.py --token "$HF_TOKEN" --limit-mb 250

Models of the Hub are measured by asking it, with nothing downloaded; what lies on this machine, by
looking. Which models there are is decided as for the server: MODEL_REGISTRY_PATH, MODEL_ALLOW_LIST,
INCLUDE_DEFAULT_MODELS. What cannot be measured is listed with its reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import ApiError
from transformers_api.serving.models.hub import HubCache
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import (
    HubSource,
    ModelSpec,
    PackageSource,
    PathSource,
    Source,
)

MIB = 1 << 20
NONE = "No models available in the registry."


@dataclass(frozen=True, slots=True)
class Size:
    """One model; ``bytes`` is None where ``error`` says why."""

    model: str
    repository: str
    bytes: int | None = None  # of the files that serving needs
    repository_bytes: int | None = None  # of all files of a Hub repository
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.from_env()
        specs = ModelRegistry.from_settings(settings).list()
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    hub = HubCache(settings.hf_home / "hub", options.token or settings.hf_token)
    sizes = [measured(spec, hub) for spec in specs]
    limit = None if options.limit_mb is None else int(options.limit_mb * MIB)
    sys.stdout.write(as_json(sizes, limit) if options.json else as_table(sizes, limit))
    return 0


def measured(spec: ModelSpec, hub: HubCache) -> Size:
    """The size of one model, or why there is none."""
    place = _place(spec.source)
    try:
        return Size(spec.name, place, *_bytes(spec.source, hub))
    except importlib.metadata.PackageNotFoundError:
        reason = "the Python package is not installed"
    except OSError as error:
        reason = error.strerror or str(error)
    except ApiError as error:
        reason = error.message
    return Size(spec.name, place, error=reason)


def _bytes(source: Source, hub: HubCache) -> tuple[int, int | None]:
    """What serving needs, and all of a repository of the Hub."""
    match source:
        case HubSource():
            return hub.sizes(source)
        case PathSource(path=path):
            return _bytes_of(path), None
        case PackageSource(package=package, file=file):
            place = importlib.metadata.distribution(package).locate_file(file)
            return _bytes_of(Path(str(place))), None


def _place(source: Source) -> str:
    match source:
        case HubSource(repo=repo, file=file):
            return f"{repo}/{file}" if file else repo
        case PathSource(path=path):
            return str(path)
        case PackageSource(package=package):
            return package


def as_json(sizes: Sequence[Size], limit: int | None) -> str:
    """One object, for programs."""
    models = [
        {**asdict(size), **({} if limit is None else {"fits": _fits(size.bytes, limit)})}
        for size in sizes
    ]
    total = _total(sizes)
    report: dict[str, object] = {"models": models, "total_bytes": total}
    if limit is not None:
        report |= {"limit_bytes": limit, "total_fits": _all_fit(sizes, limit)}
    return json.dumps(report, indent=2) + "\n"


def as_table(sizes: Sequence[Size], limit: int | None) -> str:
    """A table for people."""
    if not sizes:
        return NONE + "\n"
    head = ["Model", "Repository", "Size"]
    if limit is not None:
        head.append(f"Fits {_readable(limit)}")
    rows = [head, *(_row(size, limit) for size in sizes)]
    total = ["Total", "", _readable(_total(sizes))]
    if limit is not None:
        total.append("yes" if _all_fit(sizes, limit) else "no")
    widths = [max(len(row[i]) for row in [*rows, total]) for i in range(len(head))]
    dashes = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [_line(row, widths) for row in rows]
    lines = [body[0], dashes, *body[1:], dashes, _line(total, widths)]
    lines += [f"{size.model}: {size.error}" for size in sizes if size.error]
    return "\n".join(lines) + "\n"


def _row(size: Size, limit: int | None) -> list[str]:
    shown = "unknown" if size.bytes is None else _readable(size.bytes)
    row = [size.model, size.repository, shown]
    if limit is not None:
        row.append({True: "yes", False: "no", None: "unknown"}[_fits(size.bytes, limit)])
    return row


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(cell.ljust(width) for cell, width in cells).rstrip()


def _total(sizes: Sequence[Size]) -> int:
    """Bytes of all that could be measured; what several entries name counts once."""
    return sum({size.repository: size.bytes or 0 for size in sizes}.values())


def _all_fit(sizes: Sequence[Size], limit: int) -> bool:
    return all(size.bytes is not None for size in sizes) and _total(sizes) <= limit


def _fits(size: int | None, limit: int) -> bool | None:
    return None if size is None else size <= limit


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if not file.is_dir())


def _readable(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="How much room the models of the registry take.",
        epilog="Sizes are of the files that serving needs; 1 MB = 1024 * 1024 bytes.",
    )
    parser.add_argument("--token", help="token for private models of the Hub (default: HF_TOKEN)")
    parser.add_argument("--json", action="store_true", help="write JSON, with exact bytes")
    parser.add_argument(
        "--limit-mb", type=_positive, metavar="N", help="say what fits a bundle of N MB"
    )
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of MB above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
