"""Chat templates whose cost is proportional to the conversation, told by their syntax tree.

They need no helper process, whose switches cost a busy machine more than the rendering. All others
go there: whatever could multiply, repeat or keep what it has put together.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from jinja2 import TemplateError, nodes

from transformers_api.serving.text.template_process import environment

MOST_NAMES = 256  # in a template: each may stand for the whole conversation
_TESTS = frozenset(
    ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "true", "false"]
)
_FILTERS = frozenset(["trim", "length", "count", "lower", "upper", "first", "last", "default"])
_ESCAPING = frozenset(["tojson", "string"])  # once: escapes of escapes double
_READING = (nodes.Name, nodes.Const, nodes.Getattr, nodes.Getitem, nodes.Slice)
_DECIDING = (nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr)
_REFUSAL = "raise_exception"


@lru_cache(maxsize=16)
def is_bounded(source: str) -> bool:
    """True where rendering takes time and memory of the order of (template) x (messages)."""
    try:
        tree = environment().parse(source)
        names = sum(1 for _ in tree.find_all(nodes.Name))
        return names <= MOST_NAMES and _all_bounded(tree.body, item=None)
    except (TemplateError, RecursionError):
        return False


def _all_bounded(body: Iterable[nodes.Node], item: str | None) -> bool:
    """``item``: the innermost loop's, which alone may be written there; None outside."""
    return all(_is_bounded(node, item) for node in body)


def _is_bounded(node: nodes.Node, item: str | None) -> bool:
    match node:
        case nodes.TemplateData():
            return True
        case nodes.Output():
            return all(_is_written(child, item) for child in node.nodes)
        case nodes.If():
            branches = [*node.body, *node.elif_, *node.else_]
            return _is_read(node.test) and _all_bounded(branches, item)
        case nodes.Scope():
            return _all_bounded(node.body, item)
        case nodes.Assign(target=nodes.Name()) if item is None:
            return _is_read(node.node)
        case nodes.For(target=nodes.Name(name=name), test=None, recursive=False):
            # A loop in a loop goes through what the outer one's item holds: each part once.
            is_inside = item is None or _root(node.iter) == item
            body = [*node.body, *node.else_]
            return is_inside and _is_path(node.iter) and _all_bounded(body, name)
    return False


def _is_written(node: nodes.Node, item: str | None) -> bool:
    """Text that is put out: in a loop, constants and parts of the item only."""
    match node:
        case nodes.TemplateData() | nodes.Const():
            return True
        case nodes.Call(node=nodes.Name(name=name)) if name == _REFUSAL:
            return not node.kwargs and all(_is_written(arg, item) for arg in node.args)
        case nodes.CondExpr():
            branches = [child for child in (node.expr1, node.expr2) if child is not None]
            return _is_read(node.test) and all(_is_written(child, item) for child in branches)
        case nodes.Add() | nodes.Concat():
            return all(_is_written(child, item) for child in node.iter_child_nodes())
        case nodes.Filter(name=name, args=[], kwargs=[]) if name in _FILTERS | _ESCAPING:
            return node.node is not None and _is_written_path(node.node, item)
    return _is_written_path(node, item)


def _is_written_path(node: nodes.Node, item: str | None) -> bool:
    return _is_path(node) and (item is None or _root(node) == item)


def _is_read(node: nodes.Node) -> bool:
    """A value that is looked at, or kept under a name, and no larger than what it comes from."""
    match node:
        case nodes.Test(name=name):
            return name in _TESTS and all(_is_read(child) for child in node.iter_child_nodes())
        case nodes.Filter(name=name):
            return name in _FILTERS and all(_is_read(child) for child in node.iter_child_nodes())
    if isinstance(node, _READING + _DECIDING):
        return all(_is_read(child) for child in node.iter_child_nodes())
    return False


def _is_path(node: nodes.Node) -> bool:
    return isinstance(node, _READING) and _is_read(node)


def _root(node: nodes.Node) -> str | None:
    """The name at the beginning of ``name.attribute['key']``."""
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        node = node.node
    return node.name if isinstance(node, nodes.Name) else None
