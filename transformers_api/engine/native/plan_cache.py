"""Execution plans of a model's passes on the disk, for the next process.

To record a model's passes and to make plans of them takes longer than to read its weights, and
gives the same every time: for the same files, options, libraries and sources, whose names the
file's name is made of. In a plan are addresses, so here they are names: of weights, parameters and
buffers, or the constant itself. A file that is damaged is not read. A model that is run by a plan
from the disk has to give the logits of the first time, bit by bit, in every kind of pass; else the
file is removed and the passes are recorded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from transformers_api.engine.backend import PlanOutdated
from transformers_api.engine.native.convert_model import packed_weights
from transformers_api.engine.native.program import program
from transformers_api.engine.native.runner import PROBE, NativeRunner
from transformers_api.engine.platform.checked_file import (
    keep_newest,
    read_used,
    write_checked,
)
from transformers_api.kernels.graph.planner import Affine, HookPoint, Plan, Words
from transformers_api.kernels.modules.replace import Place, places_of

log = logging.getLogger(__name__)
MOST_FILES = 64
LARGEST_CONSTANTS = 16 << 20  # bytes, of one model
LINES = ("steps", "calls", "memory", "inputs", "result")  # of a Plan
WORDS = ("step_relocations", "call_relocations", "step_call_relocations", "weights")
Arrays = dict[str, Any]


class NotStorable(Exception):
    """A part of a plan that has no name."""


@dataclass(frozen=True)
class PlanFile:
    """The plans of one model, there or not."""

    path: Path

    @classmethod
    def of(cls, folder: Path, *key: Hashable) -> PlanFile:
        """``key``: all that the plans depend on, besides this program."""
        processor = torch.backends.cpu.get_cpu_capability()
        name = hashlib.sha256(repr((program(), processor, key)).encode()).hexdigest()[:32]
        return cls(folder / f"{name}.plan")

    def read(self) -> StoredPlans | None:
        """Return the plans. None where there are none, or none whole."""
        content = read_used(self.path)
        if content is None:
            return None
        arrays = load(content)
        return StoredPlans(arrays, json.loads(arrays["facts"].tobytes()))

    def write(self, runner: NativeRunner, groups: list[list[Place]]) -> None:
        """Store the plans of ``runner``, if that is possible."""
        try:
            write_checked(self.path, save(_arrays_of(runner, groups)))
            keep_newest(self.path.parent, "*.plan", MOST_FILES)
        except (NotStorable, KeyError, OSError, SafetensorError) as reason:
            log.info("The plans of this model are not kept: %r", reason)

    def remove(self) -> None:
        """Forget it, where that is possible."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class StoredPlans:
    """The content of a file."""

    arrays: Arrays
    facts: dict[str, Any]

    def groups(self, model: Any) -> list[list[Place]]:
        """See ``layer_groups``. Raises PlanOutdated."""
        places = places_of(model)
        groups = self.facts["groups"]
        if {path for group in groups for path in group} != places.keys():
            raise PlanOutdated("it has other layers")
        return [[places[path] for path in group] for group in groups]

    def teach(self, runner: NativeRunner) -> None:
        """In the place of ``runner.learn()``. Raises PlanOutdated."""
        try:
            self._teach(runner, _Names(runner.model))
        except (KeyError, IndexError, ValueError) as error:
            raise PlanOutdated(f"it is built otherwise: {error!r}") from error
        ask_logits(runner)
        if runner.logits_digest != self.facts["logits"]:
            raise PlanOutdated("it says something else")

    def _teach(self, runner: NativeRunner, names: _Names) -> None:
        likes = [
            tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in layer)
            for layer in self.facts["likes"]
        ]
        runner.cache.shape(likes)
        for name in self.facts["passes"]:
            runner.passes[name].use_plan(self._plan(name, names))

    def _plan(self, name: str, names: _Names) -> Plan:
        facts = self.facts["passes"][name]
        size: int = facts["size"]

        def words(key: str) -> Words:
            own: Words = self.arrays[f"{name}.{key}"].copy()  # to write into
            return own

        def line(key: str) -> Affine:
            return Affine(size, words(f"{key}.base"), words(f"{key}.slope"))

        steps, calls, weights = line("steps"), line("calls"), words("weights")
        for word in weights:
            steps.base[word] = names.weights[int(steps.base[word])].address
        tensors = [
            names.tensors[of] if isinstance(of, str) else torch.from_numpy(words(f"own.{of}"))
            for of, _ in facts["kept"]
        ]
        constants = [tuple(each) for each in facts["constants"]]
        for is_call, word, index in constants:
            address = tensors[index].untyped_storage().data_ptr() + facts["kept"][index][1]
            (calls if is_call else steps).base[word] = address
        return Plan(
            size=size,
            steps=steps,
            calls=calls,
            memory=line("memory"),
            inputs=line("inputs"),
            result=line("result"),
            result_dtype=getattr(torch, facts["dtype"]),
            step_relocations=words("step_relocations"),
            call_relocations=words("call_relocations"),
            step_call_relocations=words("step_call_relocations"),
            weights=weights,
            constants=constants,
            cache_words=[tuple(each) for each in facts["cache_words"]],
            constant_tensors=tensors,
            hook_points=[_view(each, names, size) for each in facts["views"]],
        )


def ask_logits(runner: NativeRunner) -> None:
    """Let a runner know what it says, of every token of a prompt and of a step after it."""
    digest, whole = hashlib.sha256(), list(PROBE)
    for is_long in (False, True)[: 1 + (runner.long_layers is not None)]:
        prompt = runner.read(whole, 0, len(whole), is_long)
        step = runner.read(whole[:1], len(whole), 1, is_long)
        for logits in (prompt, step):
            digest.update(logits.numpy().tobytes())
        if not is_long:
            runner.probe_logits = prompt[-1:].clone()
    runner.cache.clear()
    runner.logits_digest = digest.hexdigest()


class _Names:
    """Names for the addresses of a model."""

    def __init__(self, model: Any) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.module_names = {id(m): name for name, m in reversed(self.modules.items())}
        self.tensors: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.storages = {t.untyped_storage().data_ptr(): n for n, t in self.tensors.items()}
        self.weights = packed_weights(model)
        self.weight_numbers = {weight.address: i for i, weight in enumerate(self.weights)}


def _arrays_of(runner: NativeRunner, groups: list[list[Place]]) -> Arrays:
    names = _Names(runner.model)
    paths = {(id(p.parent), p.name): path for path, p in places_of(runner.model).items()}
    arrays: Arrays = {}
    ask_logits(runner)
    facts: dict[str, Any] = {
        "logits": runner.logits_digest,
        "groups": [[paths[id(p.parent), p.name] for p in group] for group in groups],
        "likes": [
            [(list(like.shape), _name_of(like.dtype)) for like in layer.likes]
            for layer in runner.cache.slots
        ],
        "passes": {},
    }
    for name, recorded in runner.passes.items():
        if not recorded.is_ready:  # of the head, where the layers' pass has it in it
            continue
        own = dict(_describe(recorded.plan, names, facts["passes"].setdefault(name, {})))
        arrays |= {f"{name}.{key}": array for key, array in own.items()}
    arrays["facts"] = numpy.frombuffer(json.dumps(facts).encode(), numpy.uint8)
    return arrays


def _describe(plan: Plan, names: _Names, facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arrays of a plan by name; the rest of it is put into ``facts``."""
    for key in LINES:
        line: Affine = getattr(plan, key)
        base = line.base.copy()
        if key == "steps":
            for word in plan.weights:
                base[word] = names.weight_numbers[int(base[word])]
        for is_call, word, _ in plan.constants:
            if key == ("calls" if is_call else "steps"):
                base[word] = 0
        yield f"{key}.base", base
        yield f"{key}.slope", line.slope
    for key in WORDS:
        yield key, getattr(plan, key)
    tensors: list[tuple[str | int, int]] = []
    total = 0
    for index, tensor in enumerate(plan.constant_tensors):
        storage = tensor.untyped_storage()
        offset = tensor.data_ptr() - storage.data_ptr()
        named = names.storages.get(storage.data_ptr())
        tensors.append((index if named is None else named, offset))
        if named is None:
            total += storage.nbytes()
            if total > LARGEST_CONSTANTS:
                raise NotStorable("large constants")
            yield f"own.{index}", torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    facts |= {
        "size": plan.size,
        "dtype": _name_of(plan.result_dtype),
        "kept": tensors,
        "constants": plan.constants,
        "cache_words": plan.cache_words,
        "views": [_view_facts(view, names) for view in plan.hook_points],
    }


def _view_facts(view: HookPoint, names: _Names) -> dict[str, Any]:
    return {
        "module": names.module_names[id(view.module)],
        "at": view.at,
        "tensors": [[line.base.tolist(), line.slope.tolist()] for line in view.tensors],
        "dtypes": [_name_of(dtype) for dtype in view.dtypes],
        "cached": view.cached,
        "options": _option_facts(view.options, names),
    }


def _view(facts: dict[str, Any], names: _Names, size: int) -> HookPoint:
    return HookPoint(
        names.modules[facts["module"]],
        facts["at"],
        [Affine(size, *(numpy.array(n, numpy.int64) for n in each)) for each in facts["tensors"]],
        [getattr(torch, name) for name in facts["dtypes"]],
        tuple(facts["cached"]) if facts["cached"] else None,
        _options(facts["options"], names),
    )


def _option_facts(options: dict[str, Any], names: _Names) -> dict[str, Any]:
    """With tensors, which have to be the model's, as [name]."""

    def fact(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return _option_facts(value, names)
        for name, tensor in names.tensors.items():
            if value is tensor:
                return [name]
        raise NotStorable(f"a call with {type(value).__name__}")

    return {key: fact(value) for key, value in options.items()}


def _options(facts: dict[str, Any], names: _Names) -> dict[str, Any]:
    def value(fact: Any) -> Any:
        if isinstance(fact, dict):
            return _options(fact, names)
        return names.tensors[fact[0]] if isinstance(fact, list) else fact

    return {key: value(fact) for key, fact in facts.items()}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
