"""torch's operations as those of the native program: by name, or recorded by a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformers_api.kernels.complex_operations import complex_product, operand, polar
from transformers_api.kernels.product_operations import batch_product, convolution, matmul

if TYPE_CHECKING:
    from transformers_api.kernels.capture import Recorder

COPY = "aten.copy.default"
UNARY = {
    COPY: "copy",
    "aten.clone.default": "copy",
    "aten._to_copy.default": "copy",
    "aten.neg.default": "neg",
    "aten.rsqrt.default": "rsqrt",
    "aten.sqrt.default": "sqrt",
    "aten.exp.default": "exp",
    "aten.tanh.default": "tanh",
    "aten.silu.default": "silu",
    "aten.sigmoid.default": "sigmoid",
    "aten.relu.default": "relu",
    "aten.cos.default": "cos",
    "aten.sin.default": "sin",
    "aten.abs.default": "abs",
    "aten.log.default": "log",
    "aten.floor.default": "floor",
    "aten.expm1.default": "expm1",
    "aten.log1p.default": "log1p",
}
BINARY = {
    f"aten.{op}.{kind}": op for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")
} | {
    "aten.maximum.default": "maximum",
    "aten.minimum.default": "minimum",
    "aten.clamp_min.default": "maximum",
    "aten.clamp_max.default": "minimum",
    "aten.bitwise_and.Tensor": "mul",
    "aten.bitwise_or.Tensor": "maximum",
    "aten.logical_and.default": "mul",
    "aten.logical_or.default": "maximum",
    **{
        f"aten.{short}.{kind}": op
        for short, op in (
            ("eq", "equal"),
            ("ne", "not_equal"),
            ("lt", "less"),
            ("le", "less_equal"),
        )
        for kind in ("Tensor", "Scalar")
    },
}
SWAPPED = {
    f"aten.{short}.{kind}": op
    for short, op in (("gt", "less"), ("ge", "less_equal"))
    for kind in ("Tensor", "Scalar")
}
LOGICAL = {
    "aten.bitwise_and.Tensor",
    "aten.bitwise_or.Tensor",
    "aten.logical_and.default",
    "aten.logical_or.default",
}
FILLED = {  # tensors of one value, and where it stands among the arguments
    "aten.zeros_like.default": 0.0,
    "aten.new_zeros.default": 0.0,
    "aten.ones_like.default": 1.0,
    "aten.new_ones.default": 1.0,
    "aten.full_like.default": None,
    "aten.new_full.default": None,
    "aten.fill.Scalar": None,
    "aten.zero.default": 0.0,
}
POWERS = {0.5: "sqrt", -0.5: "rsqrt", 3: "cube"}


def translate(
    recorder: Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> bool:
    """Record one of torch's operations. False where the native program has nothing for it."""
    if name in UNARY:
        recorder.add(UNARY[name], out, [args[-1 if name == COPY else 0]], tuple(out.shape))
    elif name in BINARY:
        if name in LOGICAL and not _are_bool(args):
            return False
        if out.is_complex():
            return name == "aten.mul.Tensor" and complex_product(recorder, args, out)
        _binary(recorder, BINARY[name], args, kwargs.get("alpha", 1), out)
    elif name in SWAPPED:
        _binary(recorder, SWAPPED[name], args[::-1], 1, out)
    elif name in FILLED:
        value = FILLED[name]
        _fill(recorder, out, float(args[-1]) if value is None else value)
    elif name in SPECIAL:
        return SPECIAL[name](recorder, args, kwargs, out)
    else:
        return False
    return True


def _are_bool(args: tuple[Any, ...]) -> bool:
    return all(isinstance(a, bool) or a.dtype == torch.bool for a in args[:2])


def _binary(recorder: Recorder, op: str, args: tuple[Any, ...], alpha: float, out: Tensor) -> None:
    recorder.add(op, out, [operand(a) for a in args[:2]], tuple(out.shape), float(alpha))


def _fill(recorder: Recorder, out: Tensor, value: float) -> None:
    recorder.add("copy", out, [torch.full((1,), value)], tuple(out.shape))


def _negation(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    if args[0].dtype != torch.bool:
        return False
    _binary(recorder, "equal", (args[0], 0.0), 1, out)
    return True


def _reverse_sub(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, other, *alpha = args
    if alpha and alpha[0] != 1:
        return False
    _binary(recorder, "sub", (other, x), 1, out)
    return True


def _reciprocal(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    _binary(recorder, "div", (1.0, args[0]), 1, out)
    return True


def _clamp(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, low, high = (*args, None)[:3]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            _binary(recorder, op, (x, bound), 1, out)
            x = out
    return x is out


def _softplus(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    if args[1:] not in ((), (1,), (1, 20)):
        return False
    recorder.add("softplus", out, [args[0]], tuple(out.shape))
    return True


def _where(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    recorder.add("where", out, [operand(a) for a in args], tuple(out.shape))
    return True


def _masked_fill(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, mask, value = args
    return _where(recorder, (mask, value, x), kwargs, out)


def _power(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, exponent = args
    if exponent == 2:
        recorder.add("mul", out, [x, x], tuple(out.shape))
    else:
        op = POWERS.get(exponent, "power")
        recorder.add(op, out, [x], tuple(out.shape), 0.0 if op != "power" else float(exponent))
    return True


def _reduction(op: str) -> Callable[[Recorder, Any, Any, Any], bool]:
    """``op`` over one dimension, in the order of its elements."""

    def reduction(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
        x, dims, keeps = (*args, False)[:3]
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        if len(dims) != 1 or not out.is_floating_point():
            return False
        (dim,) = (d % x.dim() for d in dims)
        line_of_one = out if keeps else out.unsqueeze(dim)
        line = x.movedim(dim, -1)
        recorder.add(op, line_of_one.movedim(dim, -1), [line], tuple(line.shape))
        return True

    return reduction


def _norm(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    filled: tuple[Any, ...] = (*args, *(2, None, False)[len(args) - 1 :])
    x, order, dims, keeps = filled
    if order != 2 or kwargs.get("dtype"):
        return False
    squares = torch.empty_like(x)
    recorder.add("mul", squares, [x, x], tuple(x.shape))
    if not _reduction("sum")(recorder, (squares, dims, keeps), {}, out):
        return False
    recorder.add("sqrt", out, [out], tuple(out.shape))
    return True


def _largest(recorder: Recorder, args: Any, kwargs: Any, out: Any) -> bool:
    x, dim, keeps = (*args, False)[:3]
    values, indices = (each if keeps else each.unsqueeze(dim) for each in out)
    return _top_k(recorder, (x, 1, dim), {}, (values, indices))


def _softmax(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, made = (t.movedim(args[1], -1) for t in (args[0], out))
    recorder.add("softmax", made, [x], tuple(x.shape))
    return True


def _top_k(recorder: Recorder, args: Any, kwargs: Any, out: Any) -> bool:
    x, count, dim, is_largest = (*args, *(-1, True)[len(args) - 2 :])[:4]
    values, indices = out
    if dim % x.dim() != x.dim() - 1 or not is_largest or x.stride(-1) != 1:
        return False
    recorder.add("top_k", indices, [x], tuple(x.shape), float(count))
    recorder.add("take", values, [x, indices], tuple(values.shape), float(x.shape[-1]))
    return True


def _take(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, dim, indices = args[:3]
    column = recorder.repeated.get(indices.untyped_storage().data_ptr())
    if column is not None and dim % x.dim() == x.dim() - 2 and not recorder.is_dynamic(x):
        table = x.flatten(end_dim=-3)[0] if x.dim() > 2 else x  # whole rows of it
        is_one = bool((x == table).all())
        return is_one and _look_up(recorder, table.contiguous(), column.squeeze(-1), out)
    is_along_line = dim % x.dim() == x.dim() - 1 and x.stride(-1) == 1
    if not is_along_line or x.shape[:-1] != indices.shape[:-1]:
        return False
    recorder.add("take", out, [x, indices], tuple(out.shape), float(x.shape[-1]))
    return True


def _put(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, dim, indices, source = args[:4]
    is_along_line = dim % x.dim() == x.dim() - 1 and out.stride(-1) == 1
    if not is_along_line or x.shape[:-1] != indices.shape[:-1] or kwargs.get("reduce"):
        return False
    if x.data_ptr() != out.data_ptr():
        recorder.add("copy", out, [x], tuple(out.shape))
    if isinstance(source, Tensor) and source.dim():
        source = source[tuple(slice(n) for n in indices.shape)]
    recorder.add("put", out, [indices, operand(source)], tuple(indices.shape), float(out.shape[-1]))
    return True


def _concatenate(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    at = 0
    for tensor in tensors:
        if tensor.dim() < out.dim():  # torch joins an empty (0,) to anything
            continue
        part = out.narrow(dim, at, tensor.shape[dim])
        recorder.add("copy", part, [tensor], tuple(part.shape))
        at += tensor.shape[dim]
    return True


def _stack(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    for i, tensor in enumerate(args[0]):
        recorder.add("copy", out.select(dim, i), [tensor], tuple(tensor.shape))
    return True


def _layer_norm(recorder: Recorder, args: Any, kwargs: Any, out: Any) -> bool:
    x, shape, weight, bias, epsilon = args
    if len(shape) != 1 or (weight is None and bias is not None) or x.stride(-1) != 1:
        return False
    inputs = [t for t in (x, weight, bias) if t is not None]
    recorder.add("layer_norm", out[0], inputs, tuple(x.shape), epsilon)
    return True


def _embedding(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    return _look_up(recorder, args[0], args[1], out)


def _index(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    table, indices = args
    (dim, *others) = [i for i, each in enumerate(indices) if each is not None]
    if others or indices[dim].dtype != torch.int64:
        return False
    return _select(recorder, (table, dim, indices[dim]), kwargs, out)


def _select(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    table, dim, indices = args
    if dim == 0 and recorder.is_dynamic(indices):
        return _look_up(recorder, table, indices, out)
    if indices.dim() != 1 or recorder.is_dynamic(indices):
        return False
    for i, index in enumerate(indices.tolist()):
        part, source = out.select(dim, i), table.select(dim, index)
        recorder.add("copy", part, [source], tuple(part.shape))
    return True


def _repeat(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, times = args
    sizes = (1,) * (len(times) - x.dim()) + tuple(x.shape)
    pairs = [size for pair in zip(times, sizes, strict=True) for size in pair]
    source = x.reshape([n for size in sizes for n in (1, size)]).expand(pairs)
    recorder.add("copy", out.view(pairs), [source], tuple(pairs))
    if all(n == 1 for n in times[:-1]) and sizes[-1] == 1:
        recorder.repeated[out.untyped_storage().data_ptr()] = x
    return True


def _look_up(recorder: Recorder, table: Tensor, indices: Tensor, out: Tensor) -> bool:
    if not table.is_contiguous() or not out.is_contiguous():
        return False
    rows = out.view(*indices.shape, -1)
    recorder.add("gather", rows, [indices, table], tuple(rows.shape), float(len(table)))
    return True


def _gelu(recorder: Recorder, args: Any, kwargs: Any, out: Tensor) -> bool:
    op = "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" else "gelu"
    recorder.add(op, out, [args[0]], tuple(out.shape))
    return True


SPECIAL: dict[str, Callable[[Recorder, Any, Any, Any], bool]] = {
    "aten.pow.Tensor_Scalar": _power,
    "aten.logical_not.default": _negation,
    "aten.bitwise_not.default": _negation,
    "aten.reciprocal.default": _reciprocal,
    "aten.rsub.Scalar": _reverse_sub,
    "aten.rsub.Tensor": _reverse_sub,
    "aten.clamp.default": _clamp,
    "aten.clamp.Tensor": _clamp,
    "aten.softplus.default": _softplus,
    "aten.where.self": _where,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.masked_fill.Tensor": _masked_fill,
    "aten.mean.dim": _reduction("mean"),
    "aten.sum.dim_IntList": _reduction("sum"),
    "aten.amax.default": _reduction("largest"),
    "aten.linalg_vector_norm.default": _norm,
    "aten.max.dim": _largest,
    "aten._softmax.default": _softmax,
    "aten.topk.default": _top_k,
    "aten.gather.default": _take,
    "aten.scatter.src": _put,
    "aten.scatter.value": _put,
    "aten.mm.default": matmul,
    "aten.addmm.default": matmul,
    "aten.cat.default": _concatenate,
    "aten.stack.default": _stack,
    "aten.bmm.default": batch_product,
    "aten.convolution.default": convolution,
    "aten.polar.default": polar,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.embedding.default": _embedding,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _select,
    "aten.repeat.default": _repeat,
    "aten.gelu.default": _gelu,
}
