"""SAM's attention: the chunked and the augmented form against the plain one, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library, nn

from semseg_automl.models import attention
from semseg_automl.models.attention import (
    RelativeAttention,
    augmented_attention,
    project_padded,
    relative_attention,
    relative_table,
)
from semseg_automl.models.layers import window_partition, window_unpartition
from semseg_automl.peft.conv_lora import ConvLoraLinear
from semseg_automl.peft.lora import LoraLinear

# (sequences, H, W, head width): windows of several heads, a wide and a tall grid, one row.
GRIDS = [(6, 14, 14, 8), (6, 5, 5, 8), (3, 5, 9, 16), (2, 20, 7, 4), (4, 1, 6, 8)]
FORMS: dict[str, Callable[..., Tensor]] = {"chunked": relative_attention, "augmented": augmented_attention}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias_h: Tensor, bias_w: Tensor) -> Tensor:
    """The formula as it is written; keys beyond the grid have no bias."""
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(2)
    bias = torch.cat([bias, bias.new_zeros(*bias.shape[:2], k.shape[1] - bias.shape[2])], dim=2)
    attended: Tensor = (scores + bias).softmax(dim=-1) @ v
    return attended


def inputs(grid: tuple[int, int, int, int], dtype: torch.dtype, prompts: int = 0) -> list[Tensor]:
    """Draw queries, keys and values, with those of `prompts` behind the grid's, and the two biases."""
    sequences, height, width, dim = grid
    cells = height * width
    shapes = [(cells, dim), (cells + prompts, dim), (cells + prompts, dim), (cells, height), (cells, width)]
    return [torch.randn(sequences, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prompts", [0, 1, 12])
@pytest.mark.parametrize("chunk", [16, 64, 200, 2**20])
def test_relative_attention__float64__equals_the_plain_form_with_its_gradients(
    form: str, grid: tuple[int, int, int, int], prompts: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CACHED_SCORES", chunk)  # 16, 64: every sequence in several pieces
    tensors = inputs(grid, torch.float64, prompts)
    expected = plain_attention(*tensors)
    got = FORMS[form](*tensors)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, weights)
    for found, wanted in zip(torch.autograd.grad(got, tensors, weights), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("grid", "prompts"), [((6, 14, 14, 8), 0), ((6, 7, 7, 8), 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_relative_attention__half_precision__is_near_float32(
    dtype: torch.dtype, grid: tuple[int, int, int, int], prompts: int
) -> None:
    tensors = inputs(grid, torch.float32, prompts)
    halves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    q, k, v, bias_h, bias_w = halves
    expected, got = plain_attention(*tensors), relative_attention(q, k, v, bias_h, bias_w)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    wanted = torch.autograd.grad(expected.sum(), tensors)
    for found, right in zip(torch.autograd.grad(got.sum(), halves), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), right, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("prompts", [0, 5])
def test_relative_attention__any_use__passes_torch_s_own_checks_of_an_operator(prompts: int) -> None:
    tensors = inputs((2, 3, 4, 8), torch.float64, prompts)
    library.opcheck(attention._chunked_attention, tuple(tensors))


@pytest.mark.parametrize("length", [5, 9, 64])
def test_relative_table__any_length__depends_on_the_distance_alone(length: int) -> None:
    table = torch.randn(9, 3)  # of a grid of 5
    relative = relative_table(table, length)
    assert relative.shape == (length, length, 3)
    for distance in range(1 - length, length):
        diagonal = torch.diagonal(relative, offset=-distance, dim1=0, dim2=1)
        assert torch.equal(diagonal, diagonal[:, :1].expand_as(diagonal))
    if length == 5:
        assert torch.equal(relative[4, 0], table[8])
        assert torch.equal(relative[0, 4], table[0])


@pytest.mark.parametrize("kind", ["frozen", "lora", "conv_lora"])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (3, 2)])
def test_project_padded__any_layer__equals_projecting_padded_windows(kind: str, size: tuple[int, int]) -> None:
    base = nn.Linear(6, 10)
    layers: dict[str, nn.Module] = {"frozen": base, "lora": LoraLinear(base, rank=2), "conv_lora": ConvLoraLinear(base)}
    layer = layers[kind].double()
    for name, parameter in layer.named_parameters():
        if "lora" in name or "expert" in name or "w_gate" in name:
            nn.init.normal_(parameter)
    layer.eval()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    windows, padded = window_partition(x, 4)
    expected = window_unpartition(layer(windows), 4, padded, padded)
    got = project_padded(layer, x, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters, weights, allow_unused=True)
    for found, right in zip(torch.autograd.grad(got, parameters, weights, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


# torch's tracer instantiates autograd functions, which torch itself warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("window", [0, 3])
def test_relative_attention_module__compiled__has_no_graph_break(window: int) -> None:
    table = [nn.Parameter(torch.randn(2 * (window or 4) - 1, 4)) for _ in range(2)]
    module = RelativeAttention(nn.Linear(8, 24), nn.Linear(8, 8), *table, num_heads=2, window_size=window)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    expected, got = module(x), compiled(x)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.sum(), [x, *module.parameters()])
    for found, right in zip(torch.autograd.grad(got.sum(), [x, *module.parameters()]), wanted, strict=True):
        torch.testing.assert_close(found, right)
