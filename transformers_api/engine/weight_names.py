"""The parameters of a model by the names of tensors in its files, as transformers reads them.

Renamings and conversions are transformers' own, tried on shapes alone: which tensors become which
parameters is known before a number is read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from transformers_api.engine.weight_report import check_weights

log = logging.getLogger(__name__)
Shapes = Mapping[str, torch.Size]


class NotStreamed(Exception):
    """The reason why a model's weights cannot be read one by one."""


@dataclass(eq=False)
class Group:
    """Tensors of the files that become one parameter, or several, together.

    ``converter``: transformers' conversion; None: the one tensor is the parameter. ``sources``:
    the converter's pattern that has matched, and the tensor's name.
    """

    first: str
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, tensor_of: Callable[[str], Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """The parameters of tensors. ``shapes``: of all parameters."""
        if self.converter is None:
            return {self.first: tensor_of(self.sources[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.collected_tensors[pattern].append(tensor_of(name))
        model = _Model(shapes)
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def stacked(self) -> list[list[str]] | None:
        """The tensors of each expert, one below the other, where a stack of them is all there is.

        None for any other conversion.
        """
        operations = getattr(self.converter, "operations", ())
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        patterns = self.converter.source_patterns
        parts = [[name for own, name in self.sources if own == pattern] for pattern in patterns]
        parts = [names for names in parts if names]
        if len({len(names) for names in parts}) != 1:
            return None
        return [list(names) for names in zip(*parts, strict=True)]


class _Model:
    """All that conversions ask of a model: the shapes of its parameters."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self.config: Any = None

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


@dataclass(frozen=True)
class WeightNames:
    """The group of each parameter, and its name there; the parameters' shapes and dtypes."""

    groups: Mapping[str, tuple[Group, str]]
    shapes: Shapes
    dtypes: Mapping[str, torch.dtype]


def map_names(
    model: Any,
    tensors: Shapes,
    dtype: torch.dtype,
    folder: Path,
    are_equal: Callable[[Group, Group], bool],
    renamings: dict[str, str] | None = None,
) -> WeightNames:
    """Find the tensors of each parameter of ``model``, which is on ``meta`` with tied weights.

    ``dtype``: the model's. ``folder``: where the files are, for errors. ``are_equal``: of two
    parameters that are one in the model, and two in the files; where they differ they are made two.
    ``renamings``: patterns of names in the files, and what becomes of them before all else.
    Raises ModelLoadFailed for weights that do not fit, NotStreamed.
    """
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    firsts, unexpected = _grouped(model, state, tensors, renamings)
    dtypes = _dtypes(model, state, dtype)
    groups, wrong = _tried(firsts, tensors, shapes, dtypes)
    missing = set(state) - set(groups)
    names = _tied(model, groups, missing, are_equal)
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    check_weights(
        {
            "mismatched_keys": wrong,
            "missing_keys": info.missing_keys,
            "unexpected_keys": info.unexpected_keys,
        },
        folder,
    )
    made_up = [name for name, _ in model.named_parameters() if name not in names]
    if made_up:
        raise NotStreamed(f"{made_up[0]} is in no file, and transformers makes it up")
    if _empties_padding(model):
        raise NotStreamed("transformers empties the row of its padding")
    return WeightNames(names, shapes, dtypes)


def _empties_padding(model: Any) -> bool:
    """True for a model of which transformers changes a row of the words after it has read them."""
    with suppress(NotImplementedError):
        padding = getattr(model.get_input_embeddings(), "padding_idx", None)
        if padding is None:
            return False
        words = torch.nn.Embedding(padding + 1, 1, padding)
        torch.nn.init.ones_(words.weight)
        words.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(words)
        return not words.weight.all()
    return False


def _grouped(
    model: Any, state: Any, tensors: Shapes, renamings_first: dict[str, str] | None
) -> tuple[dict[str, Group], set[str]]:
    """Groups by their first parameter, and names that fit none; as transformers does it."""
    mapping = get_model_conversion_mapping(model, renamings_first)
    renamings: Any = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters: Any = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unexpected: set[str] = set()
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(target, Group(target, converter))
            group.sources.append((pattern or name, name))
        elif pattern is not None:
            first, *_ = names = by_pattern[pattern].target_patterns
            unexpected.update(target.replace(first, each) for each in names)
        else:
            unexpected.add(target)
    return groups, unexpected


def _dtypes(model: Any, state: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each parameter and buffer: its own, or that of transformers' exceptions."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    if plan:
        pattern, globs, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            if match := pattern.search(name):
                dtypes[name] = plan[globs[str(match.lastgroup)]]
    return dtypes


def _tried(
    firsts: Mapping[str, Group],
    tensors: Shapes,
    shapes: Shapes,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, Group], set[tuple[str, Any, Any]]]:
    """Groups by each parameter that they make, and those parameters that get another shape."""
    groups: dict[str, Group] = {}
    wrong: set[tuple[str, Any, Any]] = set()
    for first, group in firsts.items():
        empty = partial(_empty, tensors, dtypes[first])
        try:
            made = group.convert(empty, shapes)
        except Exception:  # of a conversion: its parameters are missing
            log.info("%s cannot be made", first, exc_info=True)
            continue
        for name, tensor in made.items():
            if name not in shapes:
                continue
            groups[name] = group
            if tensor.shape != shapes[name]:
                wrong.add((name, tensor.shape, shapes[name]))
    return groups, wrong


def _empty(tensors: Shapes, dtype: torch.dtype, name: str) -> Tensor:
    return torch.empty(tensors[name], dtype=dtype, device="meta")


def _tied(
    model: Any,
    groups: Mapping[str, Group],
    missing: set[str],
    are_equal: Callable[[Group, Group], bool],
) -> dict[str, tuple[Group, str]]:
    """The groups, with weights that are tied: one of them in the files, all, or different ones."""
    tied: dict[str, str] = model.all_tied_weights_keys
    names = {name: (group, name) for name, group in groups.items()}
    for target, source in list(tied.items()):
        if target in groups and source in groups:
            if are_equal(groups[target], groups[source]):
                names[target] = names[source]
            else:
                tied.pop(target)
                _separate(model, target)
    for family in _families(tied):
        if present := [name for name in family if name in groups]:
            missing.difference_update(family)
            names.update({name: names[present[0]] for name in family if name not in names})
    return names


def _families(tied: Mapping[str, str]) -> Sequence[list[str]]:
    families: dict[str, list[str]] = {}
    for target, source in tied.items():
        families.setdefault(source, [source]).append(target)
    return list(families.values())


def _separate(model: Any, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = getattr(module, leaf)
    log.warning("%s is tied by the configuration and not in the files, so it is not tied", name)
    setattr(module, leaf, torch.nn.Parameter(torch.empty_like(tensor), tensor.requires_grad))
