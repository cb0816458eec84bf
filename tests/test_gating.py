"""Conv-LoRA's gate in training: noisy top-1 routing and its balancing loss, written out from Shazeer et al. 2017."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.peft.conv_lora import ConvLoraLinear


def random_layer(**options: Any) -> ConvLoraLinear:
    """Build a layer in float64, in training mode, whose every parameter is random."""
    layer = ConvLoraLinear(nn.Linear(10, 12).requires_grad_(False), **options).double()
    for name, parameter in layer.named_parameters():
        if not name.startswith("base."):
            nn.init.normal_(parameter, std=0.7)
    return layer.train()


def squared_variation(values: list[Tensor]) -> Tensor:
    """CV^2: the unbiased variance over the squared mean."""
    mean = torch.stack(values).sum() / len(values)
    deviations = torch.stack([(value - mean) ** 2 for value in values])
    return deviations.sum() / (len(values) - 1) / (mean**2 + 1e-10)


def plain_gate(layer: ConvLoraLinear, x: Tensor, noise: Tensor) -> tuple[list[int], Tensor]:
    """Return each sample's expert and the balancing loss, sample by sample and expert by expert.

    Args:
        layer: has the parameters.
        x: ``(B, H, W, in)``.
        noise: ``(B, M)``, drawn from the normal distribution.
    """
    experts = layer.experts
    importance, load = ([torch.zeros((), dtype=torch.float64)] * experts for _ in range(2))
    chosen = []
    for sample, drawn in zip(x, noise, strict=True):
        pooled = (sample @ layer.lora_A.T).mean(dim=(0, 1))
        clean, raw = pooled @ layer.w_gate, pooled @ layer.w_noise
        spread = torch.log1p(torch.exp(raw)) + 1e-2
        noisy = clean + drawn * spread
        best = max(range(experts), key=noisy.tolist().__getitem__)
        chosen.append(best)
        importance[best] = importance[best] + 1  # the softmax over the one kept logit
        for i in range(experts):
            rival = torch.stack([noisy[j] for j in range(experts) if j != i]).max()  # equation 9: k-th excluding i
            probability = (1 + torch.erf((clean[i] - rival) / spread[i] / math.sqrt(2))) / 2
            load[i] = load[i] + probability
    return chosen, 1e-2 * (squared_variation(importance) + squared_variation(load))


@pytest.mark.parametrize("gate", ["balanced", "learned"])
@pytest.mark.parametrize(("experts", "batch"), [(8, 5), (2, 3), (4, 1)])
def test_balancing_loss__fixed_noise__equals_the_formulas_with_its_gradients(
    experts: int, batch: int, gate: str
) -> None:
    layer = random_layer(experts=experts, gate=gate)
    x = torch.randn(batch, 4, 5, 10, dtype=torch.float64)
    torch.manual_seed(3)
    noise = torch.randn(batch, experts, dtype=torch.float64)
    chosen, expected = plain_gate(layer, x, noise)
    torch.manual_seed(3)
    layer(x)
    assert layer.chosen_expert.tolist() == chosen
    torch.testing.assert_close(layer.aux_loss, expected, rtol=1e-6, atol=0)  # counts are in float32
    parameters = [layer.w_gate, layer.w_noise, layer.lora_A]
    wanted = torch.autograd.grad(expected, parameters)
    assert all(gradient.abs().max() > 1e-8 for gradient in wanted)
    for found, right in zip(torch.autograd.grad(layer.aux_loss, parameters), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)


def test_gate__training__follows_the_noise_and_evaluation_does_not() -> None:
    layer = random_layer(experts=8)
    nn.init.zeros_(layer.w_gate)
    x = torch.randn(1, 4, 4, 10, dtype=torch.float64).expand(200, -1, -1, -1)
    layer(x)
    # One logit for all, so that each draw is a lottery among all experts.
    assert set(layer.chosen_expert.tolist()) == set(range(8))
    layer.eval()(x)
    assert len(layer.chosen_expert.unique()) == 1


def test_learned_gate__gradient_of_the_task__is_that_of_the_chosen_probability() -> None:
    layer = random_layer(experts=4, gate="learned").eval()
    x = torch.randn(6, 4, 5, 10, dtype=torch.float64)
    cotangent = torch.randn(6, 4, 5, 12, dtype=torch.float64)
    [got] = torch.autograd.grad(layer(x), [layer.w_gate], cotangent)
    with torch.no_grad():
        layer.gate = "balanced"
        z = x @ layer.lora_A.T
        plain = layer.base(x) + layer.scaling * z @ layer.lora_B.T
        added = layer(x) - plain  # of the experts
    logits = z.detach().mean(dim=(1, 2)) @ layer.w_gate
    share = logits.softmax(dim=1)[torch.arange(6), layer.chosen_expert]
    output = (share / share.detach())[:, None, None, None] * added
    [wanted] = torch.autograd.grad(output, [layer.w_gate], cotangent)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
