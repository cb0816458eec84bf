"""How every fine-tuning method runs: it learns, alone too, and with activations recomputed; over METHODS."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.build import build_method
from semseg_automl.models.encoder import Encoder, auxiliary_loss
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SamViT
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.models.timm_encoder import build_timm_encoder
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS, trainable_parameters

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "out_channels": 32}
# On every one of these, each method works.
KINDS: dict[str, Callable[..., Encoder]] = {
    "sam": partial(SamViT, **SMALL, window_size=3, global_blocks=(1,), grid=4),
    "windowed": partial(TinyViT, **SMALL, window_size=3, global_blocks=(1,), patch_size=8, grid=4),
    "dinov3": partial(build_timm_encoder, "vit_small_patch16_dinov3", **SMALL, img_size=64),
}


def adapted_encoder(method: str, kind: str) -> Encoder:
    """Build a pretrained encoder with the method applied, every parameter off its start."""
    encoder = KINDS[kind]()
    encoder.mark_pretrained()
    build_method(method, {}).apply(encoder)
    jitter(encoder, 0.05)
    return encoder


def jitter(module: nn.Module, spread: float) -> None:
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))


@pytest.mark.parametrize("method", METHODS)
def test_method__handful_of_images__is_overfitted(method: str) -> None:
    encoder = KINDS["sam"]()
    encoder.mark_pretrained()
    build_method(method, {}).apply(encoder)
    model = SegmentationModel(encoder, MaskDecoder(32, depth=1, num_heads=2, mlp_dim=32)).train()
    masks = torch.zeros(2, 48, 64)
    masks[0, 8:30, 10:30] = 1
    masks[1, 20:40, 30:60] = 1
    images = 90 + 20 * torch.rand(2, 3, 48, 64) + 120 * masks[:, None]
    trainable = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits = F.interpolate(model(images).mask_logits, masks.shape[-2:], mode="bilinear")[:, 0]
        (F.binary_cross_entropy_with_logits(logits, masks) + model.aux_loss()).backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = semantic_scores(model(images), (48, 64))
    predicted = torch.stack([hard_labels(s) for s in scores]).bool()
    iou = (predicted & masks.bool()).sum() / (predicted | masks.bool()).sum()
    assert iou > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "decoder_only"])
def test_method__alone__leads_the_embeddings_to_those_of_other_weights(method: str, kind: str) -> None:
    encoder = KINDS[kind]()
    jitter(encoder, 0.2)
    images = torch.randn(2, 3, 48, 64)
    other = copy.deepcopy(encoder)
    jitter(other, 0.2)
    with torch.no_grad():
        wanted = other(images)
    encoder.fresh_parameter_names = frozenset()  # the neck's neither: the method is alone
    build_method(method, {}).apply(encoder)
    optimizer = torch.optim.AdamW(trainable_parameters(encoder).values(), lr=5e-2)
    distances = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.mse_loss(encoder(images), wanted)
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.98 * distances[0]


def loss_and_gradients(encoder: Encoder, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return embeddings and gradients, the noise of the gates drawn from one seed."""
    encoder.zero_grad()
    torch.manual_seed(1)
    embeddings = encoder(images)
    (embeddings.square().sum() + auxiliary_loss(encoder)).backward()
    return embeddings, {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "decoder_only"])
def test_method__activations_recomputed__changes_neither_output_nor_gradient(method: str, kind: str) -> None:
    encoder = adapted_encoder(method, kind).train()
    images = torch.randn(2, 3, 48, 64)
    calls: list[nn.Module] = []
    encoder.blocks[0].register_forward_pre_hook(lambda block, _: calls.append(block))
    embeddings, gradients = loss_and_gradients(encoder, images)
    assert len(calls) == 1
    encoder.checkpointing = True
    again, recomputed = loss_and_gradients(encoder, images)
    trains_within = any(name.startswith("blocks.") for name in trainable_parameters(encoder)) or method == "sam_adapter"
    assert len(calls) == (3 if trains_within else 2), "a block is run again only where its gradients are needed"
    assert torch.equal(again, embeddings)
    assert recomputed.keys() == gradients.keys() == trainable_parameters(encoder).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)
