"""Attention that a model computes by operations of its own, recognised and given to the kernel.

Many models do not call transformers' attention interface: they multiply queries with keys, scale,
add a mask, take a softmax and multiply with values. While a pass is recorded the mask, and the keys
and values of the cache, are symbols: tensors with a shape and no numbers. Operations on them make
other symbols, the scores and the probabilities; the product of probabilities and values is then the
kernel's attention. An operation that has no meaning here raises NotRecognised.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformers_api.kernels.capture import current
from transformers_api.kernels.modules.attention import CausalRows, attend, is_supported
from transformers_api.kernels.modules.weight_modules import weight_modules

VIEWS = {
    f"aten.{name}"
    for name in (
        *("view.default", "_unsafe_view.default", "transpose.int", "permute.default", "t.default"),
        *("expand.default", "unsqueeze.default", "squeeze.dim", "select.int", "slice.Tensor"),
    )
}
SAME = {  # the same numbers, perhaps laid out or rounded otherwise
    f"aten.{name}.default" for name in ("clone", "_to_copy", "alias", "detach", "lift_fresh")
}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
HIDDEN = -1e4  # a score below is that of a key which is not attended to
LINEAR = 1e-4  # how far from a line a bias may be, as a share of its largest number


class NotRecognised(Exception):
    """An operation on scores, keys, values or the mask that is not part of attention."""


@dataclass(frozen=True)
class Cached:
    """Keys or values (B, G, S, D) of the cache."""

    states: Tensor


@dataclass(frozen=True)
class Bias:
    """A mask that hides scores, and a number for each head times the distance that is added."""

    rows: CausalRows | None = None
    slopes: Tensor | None = None  # (H,)
    window: int = 0  # a narrower one than that of the mask; 0: none


@dataclass(frozen=True)
class Scores:
    """Scores of queries (B, H, T, D), or their softmax."""

    query: Tensor
    keys: Tensor  # (B, G, S, D)
    scale: float = 1.0
    bias: Bias = Bias()
    are_probs: bool = False


class Symbol(Tensor):
    """A tensor without numbers. ``shadow``: its shape and strides, as a tensor on ``meta``."""

    node: Cached | Bias | Scores
    shadow: Tensor

    @staticmethod
    def __new__(cls, layout: Tensor, node: Cached | Bias | Scores) -> Symbol:
        """A symbol of this meaning."""
        made: Symbol = torch.Tensor._make_wrapper_subclass(
            cls,
            layout.shape,
            strides=layout.stride(),
            dtype=layout.dtype,
            device=torch.device("cpu"),
        )
        made.shadow, made.node = layout, node
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _whole_attention(*args, **(kwargs or {}))
            if func in PRODUCTS and min(each.dim() for each in args[:2]) == 4:
                return _product(*args[:2])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        return (
            func.decompose(*args, **kwargs)
            if func._can_decompose()
            else interpret(func, args, kwargs)
        )


def computes_own_attention(model: torch.nn.Module) -> bool:
    """True for a model none of whose layers calls transformers' attention interface."""
    forwards = {type(m).forward for m in model.modules() if hasattr(m, "layer_idx")}
    codes = (getattr(inspect.unwrap(each), "__code__", None) for each in forwards)
    return not any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes if code)


def cached(states: Tensor) -> Symbol:
    """A symbol of keys or values (B, G, S, D) of the cache, as the model computes with them."""
    return Symbol(torch.empty(states.shape, dtype=torch.float32, device="meta"), Cached(states))


def masked(rows: CausalRows, context: int) -> Symbol:
    """A symbol of a mask (B, 1, 1, S) over so many keys."""
    shape = (len(rows.starts), 1, 1, context)
    return Symbol(torch.empty(shape, dtype=torch.bool, device="meta"), Bias(rows))


def interpret(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one of torch's operations on symbols. Raises NotRecognised."""
    name = str(func)
    symbols = [each for each in args if isinstance(each, Symbol)]
    if not symbols:
        raise NotRecognised(name)
    scores = next((s for s in symbols if isinstance(s.node, Scores)), None)
    is_mutable = name.split(".")[1].endswith("_")
    name = name.replace("_.", ".", 1) if is_mutable else name
    if name in VIEWS:
        return Symbol(_layout(func, args, kwargs), symbols[0].node)
    if name in SAME:
        like, dtype = symbols[0].shadow, kwargs.get("dtype") or symbols[0].dtype
        layout = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
        return Symbol(layout, symbols[0].node)
    if name in ("aten.bmm.default", "aten.baddbmm.default"):
        return _flat_product(name, args, kwargs)
    node = _scored(name, scores, args) if scores is not None else _biased(name, args)
    if is_mutable:
        args[0].node = node
        return args[0]
    return Symbol(_layout(func, args, kwargs), node)


def _layout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    def shape_only(value: Any) -> Any:
        if isinstance(value, Symbol):
            return value.shadow
        return value.to("meta") if isinstance(value, Tensor) and value.dim() else value

    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    layout: Tensor = func(*map(shape_only, args), **kwargs)
    return layout


def _scored(name: str, scores: Symbol, args: tuple[Any, ...]) -> Scores:
    """The scores that an elementwise operation, or a softmax, makes of others."""
    node = scores.node
    assert isinstance(node, Scores)
    kind = name.split(".")[1]
    if kind == "_softmax":
        if args[1] % scores.dim() != scores.dim() - 1 or node.bias.rows is None:
            raise NotRecognised(f"{name} without a mask")
        return replace(node, are_probs=True)
    if node.are_probs:
        raise NotRecognised(f"{name} of probabilities")
    others = [each for each in args if each is not scores]
    if kind in ("mul", "div") and args[0] is scores:
        factor = _number(others[0]) if kind == "mul" else 1 / _number(others[0])
        return _scaled(node, factor)
    if kind == "add":
        return _added(node, others[0])
    if kind == "masked_fill":
        return _added(node, others[0], _number(others[1]))
    if kind == "where" and args[1] is scores:
        return _added(node, args[0], _number(args[2]))
    if kind == "maximum" and _number(others[0]) <= HIDDEN:
        return node
    raise NotRecognised(name)


def _scaled(node: Scores, factor: float) -> Scores:
    slopes = node.bias.slopes
    bias = replace(node.bias, slopes=None if slopes is None else slopes * factor)
    return replace(node, scale=node.scale * factor, bias=bias)


def _added(node: Scores, other: Any, value: float = -torch.inf) -> Scores:
    """Scores and a bias; or hidden by a mask, with this ``value`` in the place of scores."""
    if value > HIDDEN:
        raise NotRecognised("scores that are hidden by a number that may be one of theirs")
    if isinstance(other, Tensor) and not isinstance(other, Symbol) and other.dtype == torch.bool:
        return replace(node, bias=_narrowed(node.bias, other))
    return replace(node, bias=_sum(node.bias, _as_bias(other)))


def _biased(name: str, args: tuple[Any, ...]) -> Bias:
    """The bias that an elementwise operation makes of a mask or a bias and perhaps numbers."""
    kind = name.split(".")[1]
    bias = Bias()
    for each in args:
        if isinstance(each, Symbol):
            if not isinstance(each.node, Bias):
                raise NotRecognised(name)
            bias = _sum(bias, each.node)
        elif isinstance(each, Tensor) and each.numel() > 1:
            if kind not in ("add", "masked_fill"):
                raise NotRecognised(name)
            bias = _sum(bias, _as_bias(each))
    if bias.slopes is not None and kind not in ("add", "masked_fill"):
        raise NotRecognised(name)
    return bias


def _as_bias(value: Any) -> Bias:
    if isinstance(value, Symbol):
        if not isinstance(value.node, Bias):
            raise NotRecognised("scores and keys in a sum")
        return value.node
    if not isinstance(value, Tensor) or value.numel() == 1:
        return Bias()  # softmax is the same with a number more in all scores
    return Bias(slopes=_slopes(value))


def _sum(a: Bias, b: Bias) -> Bias:
    if a.slopes is not None and b.slopes is not None:
        raise NotRecognised("two biases")
    if a.rows is not None and b.rows is not None and a.rows is not b.rows:
        raise NotRecognised("two masks")
    slopes = b.slopes if a.slopes is None else a.slopes
    return Bias(a.rows if b.rows is None else b.rows, slopes, a.window or b.window)


def _slopes(bias: Tensor) -> Tensor | None:
    """The slopes (H,) of a bias (…, H, 1, S) that is linear in the position of a key. None: zeros.

    Raises NotRecognised.
    """
    recorder = current()
    if recorder and recorder.is_dynamic(bias):
        raise NotRecognised("a bias that depends on the tokens")
    lines = bias.detach().float().flatten(end_dim=-3) if bias.dim() > 3 else bias.detach().float()
    if lines.dim() != 3 or lines.shape[1] != 1 or lines.shape[2] < 3:
        raise NotRecognised(f"a bias of {tuple(bias.shape)}")
    lines = lines[:, 0]
    slopes = (lines[:, -1] - lines[:, 0]) / (lines.shape[1] - 1)
    line = lines[:, :1] + slopes[:, None] * torch.arange(lines.shape[1])
    if (lines - line).abs().max() > LINEAR * lines.abs().max():
        raise NotRecognised("a bias that is not linear in the distance")
    return slopes if slopes.any() else None


def _narrowed(bias: Bias, visible: Tensor) -> Bias:
    """With a window: the model's own mask (…, 1, S) of a query that it takes for the last of S."""
    recorder = current()
    if (recorder and recorder.is_dynamic(visible)) or visible.numel() != visible.shape[-1]:
        raise NotRecognised(f"a mask of {tuple(visible.shape)}")
    line = visible.flatten()
    window = int(line.sum())
    if not line[len(line) - window :].all() or not window:
        raise NotRecognised("a mask that is no window")
    if window == len(line):
        return bias
    return replace(bias, window=window)


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and (isinstance(value, Symbol) or value.numel() != 1):
        raise NotRecognised("a factor for each score")
    return float(value)


def _product(a: Any, b: Any) -> Any:
    """Of queries and keys, or of probabilities and values, each (B, H, n, m)."""
    if not isinstance(b, Symbol) or not isinstance(b.node, Cached):
        raise NotRecognised("a product with something else than keys or values")
    if not isinstance(a, Symbol):
        keys = _states(b.transpose(-1, -2), a.shape[1])
        layout = torch.empty((*a.shape[:3], b.shape[3]), dtype=a.dtype, device="meta")
        return Symbol(layout, Scores(a, keys))
    if not isinstance(a.node, Scores) or not a.node.are_probs:
        raise NotRecognised("a product of scores")
    return _attention(a.node, _states(b, a.shape[1]))


def _flat_product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same with (B * H, n, m), and perhaps a bias that is added."""
    *bias, a, b = args
    if not isinstance(b, Symbol) or not isinstance(b.node, Cached):
        raise NotRecognised(name)
    batch = b.node.states.shape[0]
    heads = a.shape[0] // batch
    whole = b.view(batch, heads, *b.shape[1:])
    made = _product(a.view(batch, heads, *a.shape[1:]), whole)
    if not isinstance(made, Symbol):
        return made.reshape(batch * heads, *made.shape[2:])
    node = made.node
    assert isinstance(node, Scores)
    node = _scaled(node, kwargs.get("alpha", 1))
    for each in bias:
        beta = kwargs.get("beta", 1)
        own = _as_bias(each[:heads] if each.numel() > 1 else each)
        slopes = own.slopes
        node = replace(node, bias=replace(own, slopes=None if slopes is None else slopes * beta))
    return Symbol(made.shadow.flatten(end_dim=1), node)


def _states(symbol: Any, heads: int) -> Tensor:
    """The keys or values (B, G, S, D) of a symbol with these axes. Raises NotRecognised."""
    assert isinstance(symbol.node, Cached)
    states, layout = symbol.node.states, symbol.shadow
    groups, length, size = states.shape[1:]
    strides = (groups * length * size, length * size, size, 1)
    if layout.shape != states.shape or groups not in (1, heads):
        raise NotRecognised(f"keys or values as {tuple(layout.shape)}")
    for n, own, stride in zip(layout.shape, layout.stride(), strides, strict=True):
        if n > 1 and own != stride:
            raise NotRecognised("keys or values in another order")
    return states


def _attention(node: Scores, values: Tensor) -> Tensor:
    """(B, H, T, D)."""
    rows, slopes = node.bias.rows, node.bias.slopes
    if rows is None or not is_supported(node.query, node.keys, values):
        raise NotRecognised("tensors that the kernel does not read")
    if node.bias.window:
        rows = replace(rows, window=node.bias.window)
    if slopes is not None:
        slopes = slopes.expand(node.query.shape[1]) if len(slopes) == 1 else slopes
        slopes = slopes[: node.query.shape[1]]
    made = attend(node.query, node.keys, values, rows, node.scale, {"slopes": slopes})
    if recorder := current():
        lines = {} if slopes is None else {str(i): n for i, n in enumerate(slopes.tolist())}
        options = {"window": rows.window, "scaling": node.scale, "slopes": lines, "is_own": True}
        for module in weight_modules():
            tensors, cached = [node.query, made], {"key": node.keys, "value": values}
            recorder.add_module_call(module, tensors, **cached, options=options)
    return made.transpose(1, 2)


def _whole_attention(
    query: Tensor,
    key: Symbol,
    value: Symbol,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The function of torch, of a query and symbols."""
    scores = Scores(query, _states(key, query.shape[1]), scale or query.shape[3] ** -0.5)
    scores = _added(scores, attn_mask)
    return _attention(scores, _states(value, query.shape[1]))
