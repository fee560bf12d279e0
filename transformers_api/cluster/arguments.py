"""The arguments of ``transformers-api cluster``. A command imports what it needs."""

from __future__ import annotations

import argparse

from transformers_api.config.settings import SettingError, Settings


def add_cluster(command: argparse.ArgumentParser) -> None:
    """Add ``up``, ``status`` and ``down``."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    up = actions.add_parser("up", help="start the head and its replicas, or replace these")
    up.add_argument("--replicas", type=int, help="of the engine (CLUSTER_REPLICAS)")
    up.add_argument("--wait", action="store_true", help="until a signal ends it all")
    up.add_argument("--join", action="store_true", help="a head that `ray start` has started")
    up.set_defaults(run=_up)
    status = actions.add_parser("status", help="show the replicas and their models")
    status.set_defaults(run=_status)
    down = actions.add_parser("down", help="end the replicas and the head")
    down.set_defaults(run=_down)


def _up(options: argparse.Namespace) -> int:
    from transformers_api.cluster import commands
    from transformers_api.serving.models.registry import ModelRegistry

    settings = Settings.from_env()
    if options.replicas is not None and not 1 <= options.replicas <= 4096:
        raise SettingError(f"--replicas {options.replicas} is not allowed: expected 1 to 4096")
    ModelRegistry.from_settings(settings)  # a wrong entry is told before anything starts
    return commands.up(settings, replicas=options.replicas, waits=options.wait, joins=options.join)


def _status(_options: argparse.Namespace) -> int:
    from transformers_api.cluster import commands

    return commands.status(Settings.from_env())


def _down(_options: argparse.Namespace) -> int:
    from transformers_api.cluster import commands

    return commands.down(Settings.from_env())
