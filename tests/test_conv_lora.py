"""Conv-LoRA: the collapsed form against the plain one, and both against the reference's stored answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.encoder import auxiliary_loss
from semseg_automl.peft.conv_lora import (
    ConvLoraLinear,
    Interpolation,
    collapse_matrices,
    resize_matrix,
    squared_variation,
)
from semseg_automl.peft.lora import LoraLinear

FIELDS = ("lora_A", "lora_B", "w_gate", "w_noise", "expert_weight", "expert_bias")


def plain_expert(z: Tensor, weight: Tensor, bias: Tensor, scale: int, activation: str, interpolation: str) -> Tensor:
    """Upsample, convolve, downsample ``z (1, r, H, W)``: the definition, and the oracle."""
    up = z if scale == 1 else F.interpolate(z, scale_factor=float(scale), mode=interpolation, align_corners=False)
    convolved = F.conv2d(up, weight, bias, padding=1)
    convolved = F.gelu(convolved) if activation == "gelu" else convolved
    if scale == 1:
        return convolved
    return F.interpolate(convolved, size=z.shape[2:], mode=interpolation, align_corners=False)


def plain_layer(layer: ConvLoraLinear, x: Tensor) -> Tensor:
    """Compute the layer's evaluation output from the definition, sample by sample."""
    z = x @ layer.lora_A.to(x.dtype).t()
    expert = (z.mean(dim=(1, 2)) @ layer.w_gate.to(x.dtype)).argmax(dim=1)
    out = []
    for i in range(len(z)):
        e = int(expert[i])
        maps = z[i].permute(2, 0, 1)[None]
        weight, bias = layer.expert_weight[e].to(x.dtype), layer.expert_bias[e].to(x.dtype)
        convolved = plain_expert(maps, weight, bias, e + 1, layer.activation, layer.interpolation)
        out.append((maps + convolved)[0].permute(1, 2, 0))
    base: Tensor = layer.base(x)
    return base + layer.scaling * torch.stack(out) @ layer.lora_B.to(x.dtype).t()


def random_layer(dtype: torch.dtype = torch.float64, **options: object) -> ConvLoraLinear:
    """Build a layer whose every parameter is random, so that nothing hides behind a zero."""
    base = nn.Linear(10, 12).requires_grad_(False)
    layer = ConvLoraLinear(base, **options).to(dtype).eval()  # type: ignore[arg-type]
    for name in FIELDS:
        nn.init.normal_(getattr(layer, name), std=0.5)
    return layer


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize("grid", [(14, 14), (20, 17), (5, 9)])
def test_conv_lora__each_scale_and_grid__equals_upsample_convolve_downsample(
    grid: tuple[int, int], activation: str, interpolation: str
) -> None:
    layer = random_layer(activation=activation, interpolation=interpolation)
    x = torch.randn(24, *grid, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert len(layer.chosen_expert.unique()) >= 4, "the inputs should reach several experts"
    expected = plain_layer(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    cotangent = torch.randn_like(y)
    parameters = [x, layer.lora_A, layer.lora_B, layer.expert_weight, layer.expert_bias]
    got = torch.autograd.grad(y, parameters, cotangent)
    wanted = torch.autograd.grad(expected, parameters, cotangent)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", range(1, 9))
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_conv_lora__every_single_expert__equals_the_definition(scale: int, interpolation: Interpolation) -> None:
    layer = random_layer(interpolation=interpolation)
    with torch.no_grad():
        layer.w_gate.zero_()
        layer.w_gate[:, scale - 1] = 1.0
        layer.lora_A.abs_()
    x = torch.rand(2, 7, 6, 10, dtype=torch.float64)
    y = layer(x)
    assert layer.chosen_expert.tolist() == [scale - 1] * 2
    torch.testing.assert_close(y, plain_layer(layer, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_collapse_matrices__odd_scale__reads_one_row_per_output(scale: int) -> None:
    _, weights = collapse_matrices(9, scale, "bicubic")
    read = (np.abs(weights) > 0).sum(axis=0)
    if scale % 2:
        assert read.tolist() == [1] * 9
    else:
        assert read.max() == 4
    np.testing.assert_allclose(weights.sum(axis=0), 1.0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [2, 3, 8])
def test_resize_matrix__applied_to_a_signal__equals_torch(scale: int, interpolation: Interpolation) -> None:
    signal = torch.randn(1, 1, 7, 1, dtype=torch.float64)
    up = F.interpolate(signal, scale_factor=(float(scale), 1.0), mode=interpolation, align_corners=False)
    down = F.interpolate(up, size=(7, 1), mode=interpolation, align_corners=False)
    matrix_up = torch.from_numpy(resize_matrix(7, 7 * scale, interpolation))
    matrix_down = torch.from_numpy(resize_matrix(7 * scale, 7, interpolation))
    torch.testing.assert_close(matrix_up @ signal[0, 0], up[0, 0])
    torch.testing.assert_close(matrix_down @ up[0, 0], down[0, 0])


@pytest.mark.parametrize("name", ["window_14x14", "global_20x17"])
def test_conv_lora__reference_parameters__gives_the_stored_answers(name: str, shared: Callable[[str], Path]) -> None:
    stored = np.load(shared(f"golden/conv_lora_{name}.npz"))
    golden = {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}
    base = nn.Linear(16, 48).requires_grad_(False)
    base.weight.copy_(golden["weight"])
    base.bias.copy_(golden["bias"])
    layer = ConvLoraLinear(base, rank=3, alpha=float(golden["alpha"])).eval()
    with torch.no_grad():
        for field in FIELDS:
            getattr(layer, field).copy_(golden[field])
    x = golden["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(golden["grad_y"])
    assert torch.equal(layer.chosen_expert, golden["chosen_expert"].long())
    torch.testing.assert_close(
        layer.aux_loss, golden["balance_loss_eval"].to(layer.aux_loss.dtype), rtol=1e-5, atol=1e-7
    )
    pairs = [(y.detach(), golden["y"]), (x.grad, golden["grad_x"])]
    pairs += [(getattr(layer, f).grad, golden[f"grad_{f}"]) for f in ("lora_A", "lora_B", "expert_weight")]
    for got, wanted in pairs:
        assert got is not None
        # relative to the largest entry: gradients sum over thousands of pixels in float32
        assert (got - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_conv_lora__fresh_layer__is_bit_equal_to_its_base() -> None:
    base = nn.Linear(16, 48).requires_grad_(False)
    x = torch.randn(2, 6, 5, 16)
    assert torch.equal(ConvLoraLinear(base)(x), base(x))
    assert torch.equal(LoraLinear(base)(x), base(x))


def test_conv_lora__parameters__have_the_documented_shapes() -> None:
    layer = ConvLoraLinear(nn.Linear(16, 48), rank=4, experts=5)
    shapes = {name: tuple(getattr(layer, name).shape) for name in FIELDS}
    assert shapes == {
        "lora_A": (4, 16),
        "lora_B": (48, 4),
        "w_gate": (4, 5),
        "w_noise": (4, 5),
        "expert_weight": (5, 4, 4, 3, 3),
        "expert_bias": (5, 4),
    }
    added = sum(getattr(layer, name).numel() for name in FIELDS)
    assert added == 4 * (16 + 48) + 5 * (4 * 4 * 9 + 4) + 2 * 4 * 5


def test_conv_lora__training_mode__balances_through_the_noise() -> None:
    layer = random_layer(torch.float32).train()
    layer(torch.randn(8, 4, 4, 10))
    layer.aux_loss.backward()
    assert layer.w_noise.grad is not None
    assert layer.w_noise.grad.abs().sum() > 0


def test_conv_lora__expected_load__is_the_probability_of_being_chosen() -> None:
    layer = random_layer(torch.float32, experts=4).train()
    clean = torch.tensor([[0.3, 0.1, -0.2, 0.0]])
    std = torch.full((1, 4), 0.5)
    noise = torch.tensor([[0.1, 0.4, -0.3, 0.2]])
    logits = clean + noise * std
    load = layer._expected_load(clean, logits, std)
    # Expert 0 (0.35) leads; it is in while above the runner-up 0.30, the others while above 0.35.
    thresholds = torch.tensor([0.30, 0.35, 0.35, 0.35])
    expected = torch.distributions.Normal(0.0, 1.0).cdf((clean[0] - thresholds) / 0.5)
    torch.testing.assert_close(load, expected)


def test_conv_lora__learned_gate__sends_task_gradient_to_the_router() -> None:
    balanced, learned = random_layer(gate="balanced"), random_layer(gate="learned")
    learned.load_state_dict(balanced.state_dict())
    x = torch.randn(4, 6, 6, 10, dtype=torch.float64)
    torch.testing.assert_close(learned(x), balanced(x))
    learned(x).square().sum().backward()
    balanced(x).square().sum().backward()
    assert learned.w_gate.grad is not None
    assert learned.w_gate.grad.abs().sum() > 0
    assert balanced.w_gate.grad is None


def test_conv_lora__one_expert__needs_no_gate() -> None:
    layer = random_layer(torch.float32, experts=1).train()
    layer(torch.randn(2, 4, 4, 10))
    assert layer.aux_loss == 0


@pytest.mark.parametrize("training", [False, True])
def test_conv_lora__half_precision_autocast__stays_finite(training: bool) -> None:
    layer = random_layer(torch.float32).train(training)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y = layer(torch.randn(4, 6, 6, 10))
        assert torch.isfinite(y).all()
        assert torch.isfinite(layer.aux_loss)


def test_conv_lora__exported__keeps_its_output() -> None:
    layer = random_layer(torch.float32)
    x = torch.randn(3, 11, 13, 10)  # a grid no other test uses, so that its matrices are made during the export
    program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(layer(x), plain_layer(layer, x), rtol=1e-4, atol=1e-4)


def test_conv_lora__compiled_as_one_graph__keeps_output_and_gradients() -> None:
    layer = random_layer(torch.float32)
    x = torch.randn(3, 6, 5, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), layer(x)
    torch.testing.assert_close(got, expected)
    parameters = [layer.lora_A, layer.lora_B, layer.expert_weight]
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the eager products are taken in another order


def test_conv_lora__compiled__takes_further_grids_without_a_graph_break() -> None:
    layer = random_layer(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in ((6, 5), (7, 9), (4, 8)):  # from the second on, torch takes sizes for variables
        x = torch.randn(3, *size, 10)
        torch.testing.assert_close(compiled(x), layer(x))


def test_squared_variation__single_value__is_zero() -> None:
    assert squared_variation(torch.tensor([3.0])) == 0
    torch.testing.assert_close(squared_variation(torch.tensor([1.0, 3.0])), torch.tensor(0.5))


def test_auxiliary_loss__several_layers__is_their_sum() -> None:
    layers = nn.Sequential(random_layer(torch.float32), random_layer(torch.float32))
    layers[0].aux_loss, layers[1].aux_loss = torch.tensor(1.0), torch.tensor(2.0)
    assert auxiliary_loss(layers) == 3
    assert auxiliary_loss(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 11}, "1 to 10"),
        ({"experts": 0}, "experts is 0"),
        ({"activation": "relu"}, "gelu, none"),
        ({"interpolation": "nearest"}, "bicubic, bilinear"),
        ({"gate": "free"}, "balanced, learned"),
    ],
)
def test_conv_lora__option_out_of_range__is_refused_with_what_is_allowed(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvLoraLinear(nn.Linear(10, 12), **options)  # type: ignore[arg-type]
