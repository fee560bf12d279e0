"""The command line. A command imports what it needs."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers_api.cluster.arguments import add_cluster
from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import ApiError, ModelLoadFailed
from transformers_api.server import standard_streams

if TYPE_CHECKING:
    from transformers_api.serving.limits.api_keys import KeyStore
    from transformers_api.serving.models.spec import ModelSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    standard_streams.open_missing()
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except ApiError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transformers_api",
        description="Serve causal language models over HTTP. Settings come from the environment; "
        "check lists them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the server")
    _add_model(serve)
    serve.add_argument("--host", help="address to listen on (HOST)")
    serve.add_argument("--port", type=_port, help="port to listen on (PORT)")
    serve.set_defaults(run=_serve)

    _add_models(commands)

    pull = commands.add_parser("pull", help="download or prepare a model now")
    pull.add_argument("id", help="a registered id, owner/name on the Hub, or a path")
    pull.set_defaults(run=_pull)

    convert = commands.add_parser(
        "convert", help="make a standard folder of an original checkpoint"
    )
    convert.add_argument("source", type=Path, help="a .pt, .pth or .gguf file, or a folder")
    convert.add_argument("folder", type=Path, metavar="dest", help="the folder to make")
    convert.add_argument("--family", help="what it is, where the weights leave that open")
    convert.add_argument("--config", type=Path, metavar="FILE", help="its configuration (JSON)")
    convert.set_defaults(run=_convert)

    kernels = commands.add_parser("kernels", help="compile the native kernels now")
    kernels.add_argument(
        "--any-cpu",
        action="store_true",
        help="also if this processor cannot run them",
    )
    kernels.set_defaults(run=_kernels)

    keys = commands.add_parser("keys", help="make, list and remove API keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key, print it once and keep its hash")
    add.add_argument("name", help="whose key it is; in logs and for rate limits")
    add.add_argument(
        "--scope", choices=("infer", "admin"), default="infer", help="admin may do everything"
    )
    add.set_defaults(run=_add_key)
    remove = actions.add_parser("remove", help="running servers refuse it from now on")
    remove.add_argument("name")
    remove.set_defaults(run=_remove_key)
    actions.add_parser("list", help="names and scopes").set_defaults(run=_list_keys)
    for action in actions.choices.values():
        action.add_argument("--file", type=Path, help="the file of keys (API_KEYS_FILE)")

    add_cluster(commands.add_parser("cluster", help="run engines in several processes, by Ray"))

    check = commands.add_parser("check", help="show settings and environment, and what is wrong")
    _add_model(check)
    check.set_defaults(run=_check)
    return parser


def _add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="list the models that may be served, or make room")
    models.set_defaults(run=_models)
    prune = models.add_subparsers(metavar="ACTION").add_parser(
        "prune", help="remove packed weights; a model's next load makes them anew"
    )
    prune.add_argument("--dry-run", action="store_true", help="only list them")
    prune.set_defaults(run=_prune)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        nargs="?",
        help="the model to serve: a GGUF file, a folder, owner/name on the Hub, or a registered id "
        "(DEFAULT_MODEL)",
    )


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 65535")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    overrides = {"host": options.host, "port": options.port, "default_model": options.model}
    settings = replace(
        Settings.from_env(),
        **{name: value for name, value in overrides.items() if value is not None},
    )
    from transformers_api.server.serve import serve
    from transformers_api.serving.models.registry import ModelRegistry

    ModelRegistry.from_settings(settings)  # a wrong entry is told before anything starts
    serve(settings)


def _models(options: argparse.Namespace) -> int:
    from transformers_api.serving.models.registry import ModelRegistry
    from transformers_api.serving.models.spec import HubSource, ModelSpec
    from transformers_api.serving.models.store import ModelStore

    settings = Settings.from_env()
    store = ModelStore(settings)
    specs = ModelRegistry.from_settings(settings, store.has_repo).list()
    if not settings.model_allow_list:
        repos = {spec.source.repo for spec in specs if isinstance(spec.source, HubSource)}
        specs += [
            ModelSpec(name=repo, source=HubSource(repo), registered=False)
            for repo in store.cached_hub_repos()
            if repo not in repos
        ]
    resident = resident_models(settings.host, settings.port)
    rows = [("ID", "SOURCE", "CACHED", "RESIDENT", "CHAT")]
    for spec in specs:
        rows.append(
            (
                spec.name,
                _source_text(spec),
                _cached_text(
                    store.locate(spec) and (store.adapters.locate(spec) or store.locate(spec))
                ),
                "-" if resident is None else "yes" if spec.name in resident else "no",
                spec.chat or "auto",
            )
        )
    _write_table(rows)
    return 0


def resident_models(host: str, port: int, timeout_s: float = 0.5) -> frozenset[str] | None:
    """The ids that a server on this address has loaded; None where none answers."""
    near = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    try:
        with urllib.request.urlopen(f"http://{near}:{port}/v1/models", timeout=timeout_s) as reply:
            models = json.loads(reply.read(1 << 22))["data"]
            return frozenset(model["id"] for model in models if model.get("loaded"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _source_text(spec: ModelSpec) -> str:
    from transformers_api.serving.models.spec import HubSource, PackageSource, UpstreamSource

    if spec.adapter is not None:
        base = spec.resident.name
        return f"{_source_text(replace(spec, source=spec.adapter, adapter=None))} on {base}"
    match spec.source:
        case HubSource(repo, revision, file):
            at = f"@{revision}" if revision else ""
            return f"hub:{repo}{at}" + (f":{file}" if file else "")
        case PackageSource(package, _):
            return f"package:{package}"
        case UpstreamSource(url, model):
            return f"upstream:{url} ({model})"
        case other:
            return f"path:{other.path}"


def _cached_text(folder: Path | None) -> str:
    if folder is None:
        return "no"
    return f"yes, {_size(sum(path.stat().st_size for path in folder.iterdir()))}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _write_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _prune(options: argparse.Namespace) -> int:
    from transformers_api.engine.native.packed_store import PackedStore

    settings = Settings.from_env()
    store = PackedStore.of(settings.model_store, settings.packed_store_mb)
    entries = sorted(store.entries(), key=lambda entry: entry.used_at)
    rows = [("MODEL", "SIZE", "LAST USED")]
    for entry in entries:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        rows.append((entry.model or "-", _size(entry.bytes), day))
        if not options.dry_run:
            entry.path.unlink(missing_ok=True)
    _write_table(rows)
    sys.stdout.write(
        f"{_size(sum(entry.bytes for entry in entries))} "
        f"{'could be' if options.dry_run else 'were'} freed in {store.folder}\n"
    )
    return 0


def _pull(options: argparse.Namespace) -> int:
    from transformers_api.serving.models.registry import ModelRegistry
    from transformers_api.serving.models.store import ModelStore

    settings = Settings.from_env()
    store = ModelStore(settings)
    registry = ModelRegistry.from_settings(
        replace(settings, default_model=options.id), store.has_repo
    )
    spec = registry.resolve(options.id)
    with _progress_bar() as progress:
        if spec.adapter is not None:
            adapter, files = store.prepare_adapter(spec, progress)
        else:
            adapter, files = None, store.prepare(spec, progress)
    if adapter is not None:
        size, layers = _size(adapter.weights.stat().st_size), len(adapter.layers)
        sys.stdout.write(
            f"{spec.name} is ready in {adapter.weights.parent} ({size}, {layers} layers), for\n"
        )
    sys.stdout.write(
        f"{spec.resident.name} is ready in {files.folder} ({_size(files.weight_bytes)}, "
        f"{files.parameters} parameters, {files.stored_dtype})\n"
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    from transformers_api.checkpoints.convert import convert

    source, folder = options.source, options.folder
    if not source.exists():
        raise ModelLoadFailed(f"{source} does not exist")
    if folder.exists():
        raise ModelLoadFailed(f"{folder} exists already: name a folder to make")
    try:
        with _progress_bar() as progress:
            convert(source, folder, progress, options.family, options.config)
    except OSError as error:
        raise ModelLoadFailed(f"{folder} could not be made: {error}") from error
    sys.stdout.write(f"{source.name} is ready in {folder}\n")
    return 0


def _kernels(options: argparse.Namespace) -> int:
    """Return 1 where they could be of use and cannot be had; the server does without them then."""
    from transformers_api.engine.native import installation

    settings = Settings.from_env()
    if not settings.native_kernels:
        sys.stdout.write("NATIVE_KERNELS is off\n")
        return 0
    isa = settings.native_isa
    if reason := installation.unusable(isa, on_any_cpu=options.any_cpu):
        sys.stdout.write(f"No native kernels here: {reason}\n")
        return 0
    try:
        libraries = installation.install(settings.native_cache, isa, for_any_cpu=options.any_cpu)
    except installation.NativeUnavailable as error:
        sys.stderr.write(f"No native kernels, so inference is slower: {error}\n")
        return 1
    for library in libraries:
        sys.stdout.write(f"The native kernels are ready in {library}\n")
    return 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[float, str], None]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    layout = "{desc:<40.40} {percentage:3.0f}%|{bar}| {elapsed}"
    bar: Any = tqdm(total=1.0, bar_format=layout, file=sys.stderr, mininterval=0.2)

    def progress(share: float, what: str) -> None:
        bar.set_description_str(what, refresh=False)
        bar.update(max(share, 0.0) - bar.n)

    try:
        yield progress
    finally:
        bar.close()


def _add_key(options: argparse.Namespace) -> int:
    store = _key_store(options)
    with _in_one_line():
        secret = store.add(options.name, options.scope)
    sys.stderr.write(
        f"The key of {options.name}, whose hash is in {store}. It is shown only now.\n"
    )
    sys.stdout.write(f"{secret}\n")
    return 0


def _remove_key(options: argparse.Namespace) -> int:
    with _in_one_line():
        _key_store(options).remove(options.name)
    return 0


def _list_keys(options: argparse.Namespace) -> int:
    with _in_one_line():
        keys = _key_store(options).read()
    _write_table([("NAME", "SCOPE"), *((key.name, key.scope) for key in keys)])
    return 0


def _key_store(options: argparse.Namespace) -> KeyStore:
    from transformers_api.serving.limits.access import key_store
    from transformers_api.serving.limits.key_file import KeyFile

    store = KeyFile(options.file) if options.file else key_store(Settings.from_env())
    if store is None:
        raise SettingError("API_KEYS_FILE is not set; set it or API_KEYS_REDIS, or give --file")
    return store


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn errors of a store of keys into one line."""
    try:
        yield
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise SettingError(text) from None
    except ValueError as error:
        raise SettingError(str(error)) from None


def _check(options: argparse.Namespace) -> int:
    from transformers_api.check import report

    return report(sys.stdout, options.model)
