"""Each of torch's small operations that a pass may have: recorded, then run for any size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from transformers_api.kernels.capture import record
from transformers_api.kernels.graph.executor import RecordedPass

WIDTH = 24
SIZES = [1, 2, 9, 700]
MATRIX = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(3))
BIAS = torch.linspace(-1, 1, 10)
TABLE = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(4))


def mixtral_routing(x):
    values, indices = torch.topk(F.linear(x, MATRIX).softmax(-1), 3, dim=-1)
    values /= values.sum(-1, keepdim=True)
    return values + indices


def deepseek_routing(x):
    scores = F.linear(x, MATRIX).sigmoid()
    biased = scores + BIAS
    groups = biased.view(-1, 2, 5).topk(2, dim=-1)[0].sum(dim=-1)
    mask = torch.zeros_like(groups)
    mask.scatter_(1, torch.topk(groups, k=1, dim=-1, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 2, 5).reshape(-1, 10)
    chosen = biased.masked_fill(~mask.bool(), float("-inf"))
    indices = torch.topk(chosen, k=2, dim=-1, sorted=False)[1]
    return scores.gather(1, indices) + indices


def into_zeros(x):
    out = torch.zeros(len(x), 2 * WIDTH)
    out[:, 3 : 3 + WIDTH] = x
    return out + 1


def into_empty(x):
    out = x.new_empty(len(x), 2 * WIDTH)
    out[:, :WIDTH], out[:, WIDTH:] = x, -x
    return out


def scattered(x):
    indices = torch.topk(x, 4, dim=-1)[1]
    return torch.zeros_like(x).scatter(-1, indices, x * 2)


def compared(x):
    turned = x * -1.5
    both = (x > turned) & (x <= 5.0) | ~(x != 0)
    return torch.where(both, x, turned) + (x >= 1.0) * 2.0 + (x == turned) + (x < -3.0)


def looked_up(x):
    indices = torch.topk(x, 3, dim=-1)[1]
    return TABLE[indices].flatten(1) + torch.index_select(TABLE, 0, indices[:, 0]).flatten(1)[:, :1]


def turned_as_complex(x):
    angles = torch.polar(torch.ones_like(x[:, :6]), x[:, :6]) * 1.5
    pairs = torch.view_as_complex(x.view(-1, 2, 6, 2))
    return torch.view_as_real(pairs * angles[:, None]).flatten(1)


def filtered(x):
    lines = x.view(-1, 4, 6)
    filters, bias = MATRIX[:4, None, :3], BIAS[:4]
    whole = F.conv1d(lines, filters, bias, groups=4)
    return torch.cat([whole, F.conv1d(lines[..., -3:], filters, groups=4)], -1).flatten(1)


def rows_of_places(x):
    places = torch.topk(x, 1, dim=-1)[1]  # (R, 1), each of WIDTH
    table = MATRIX.t().repeat(len(x), 1, 1)  # (R, WIDTH, 10), as GPT-J has it
    return torch.gather(table, 1, places.unsqueeze(-1).repeat(1, 1, 10))[:, 0]


FUNCTIONS = {
    "filters of lines": filtered,
    "rows of a table by places that are repeated": rows_of_places,
    "repeated": lambda x: x.view(-1, 4, 6).repeat(1, 3, 1).flatten(1) + x.repeat(1, 3),
    "chosen columns": lambda x: torch.cat(
        [x[:, [3, 0, 3]], x.view(-1, 4, 6)[:, :, [-2]].flatten(1)], -1
    ),
    "a state that is read": lambda x: (x.view(-1, 1, 24) @ x.view(-1, 24, 1))[:, 0] * x,
    "a state that is read by a matrix of rows": lambda x: (
        torch.stack([x, -x, x * 2], 1) @ x[:, :, None]
    ).flatten(1),
    "mixtral's routing": mixtral_routing,
    "deepseek's routing": deepseek_routing,
    "into zeros": into_zeros,
    "into empty memory": into_empty,
    "scatter": scattered,
    "comparisons": compared,
    "rows of a table": looked_up,
    "linear with a bias": lambda x: F.linear(x, MATRIX, BIAS),
    "stack": lambda x: torch.stack([x, -x], -1).flatten(1),
    "an empty part": lambda x: torch.cat([x[:, :WIDTH] * 2, x[:, WIDTH:] * 2], -1),
    "small products": lambda x: (x.view(-1, 6, 4) @ x.view(-1, 4, 6)).flatten(1),
    "complex numbers": turned_as_complex,
    "clamp": lambda x: x.clamp(-1, 2) + x.clamp(max=0.5) + x.clamp(min=-0.5),
    "clamp in place": lambda x: (x * 2).clamp_(-1, 3),
    "maximum": lambda x: torch.maximum(x, -x) - torch.minimum(x, x * 0.5),
    "power": lambda x: x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + x.abs() ** 1.3 + x**3,
    "sum of a middle dimension": lambda x: x.view(-1, 4, 6).sum(1) + x.view(-1, 4, 6).mean(1),
    "mean without its dimension": lambda x: x.mean(-1).unsqueeze(-1) * x,
    "largest": lambda x: x / x.abs().amax(-1, keepdim=True),
    "softmax of a middle dimension": lambda x: x.view(-1, 4, 6).softmax(1).flatten(1),
    "log and floor": lambda x: (x.abs() + 1).log() + torch.floor(x / 3),
    "expm1 and log1p": lambda x: torch.expm1(x / 4) + torch.log1p(x.abs()),
    "softplus": lambda x: F.softplus(x * 8),
    "norm": lambda x: (
        x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) + x.norm(dim=1)[:, None]
    ),
    "the largest and its place": lambda x: x.max(-1)[0][:, None] + x.max(-1, keepdim=True)[1] * x,
    "reversed": lambda x: 1 - x + torch.rsub(x, 2.0) + 1 / (x.abs() + 2),
    "layer norm of a part": lambda x: F.layer_norm(x[:, 4:16], (12,)),
}


def numbers(rows):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, WIDTH, generator=generator) * 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_that_of_torch_for_any_number_of_tokens(library, name):
    function, recorded = FUNCTIONS[name], RecordedPass(library)
    for rows in (3, 5):
        x = numbers(rows)
        recorded.record(rows, [x], [torch.zeros(1, 1, 1, 1)], lambda x=x: function(x))
    assert not recorded.failure
    for rows in SIZES:
        x = numbers(rows)
        made = recorded.run(rows, [x], [torch.zeros(1, 1, 1, 1)], 0)
        assert torch.allclose(made, function(x), rtol=1e-5, atol=1e-5), rows


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_token_has_the_same_bits_alone(library, name):
    recorded = RecordedPass(library)
    for rows in (3, 5):
        x = numbers(rows)
        recorded.record(rows, [x], [torch.zeros(1, 1, 1, 1)], lambda x=x: FUNCTIONS[name](x))
    x, cache = numbers(40), [torch.zeros(1, 1, 1, 1)]
    together = recorded.run(40, [x], cache, 0).clone()
    for row in (0, 17, 39):
        assert torch.equal(recorded.run(1, [x[row : row + 1]], cache, 0)[0], together[row])


def test_of_equal_scores_the_first_are_chosen(library):
    recorded, cache = RecordedPass(library), [torch.zeros(1, 1, 1, 1)]
    for rows in (3, 5):
        x = numbers(rows)
        recorded.record(rows, [x], cache, lambda x=x: torch.topk(x, 5, dim=-1)[1] * 1.0)
    x = torch.zeros(2, WIDTH)
    x[:, 7] = 1
    assert recorded.run(2, [x], cache, 0).tolist() == [[7, 0, 1, 2, 3]] * 2


def test_a_product_of_two_computed_matrices_is_refused(library):
    with record([x := numbers(4)]) as recorder:
        result = x @ (x * 2).t()
    recorder.ref(result)
    assert recorder.failure == "aten.mm.default"


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_a_norm_makes_no_zeros_of_numbers_whose_squares_are_infinite(library, norm):
    """torch does; nobody could tell them from a model's own."""
    recorded, cache = RecordedPass(library), [torch.zeros(1, 1, 1, 1)]
    for rows in (2, 3):
        x = numbers(rows)
        recorded.record(rows, [x], cache, lambda x=x: norm(x, (WIDTH,)))
    large = numbers(4)
    large[1] *= 1e20
    made = recorded.run(4, [large], cache, 0)
    assert made[1].isnan().all()
    torch.testing.assert_close(made[[0, 2, 3]], norm(large[[0, 2, 3]], (WIDTH,)))
