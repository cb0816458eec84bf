"""The contract every fine-tuning method keeps, over METHODS x encoders; a new entry is tested at once.

What it adds, what it leaves alone, and counts; learning is in ``test_peft_running.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from semseg_automl.build import build_method
from semseg_automl.errors import ConfigError, UnsupportedCombination
from semseg_automl.models.encoder import Encoder
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_ENCODERS, SamViT
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.models.timm_encoder import build_timm_encoder
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.peft import METHODS, count_parameters, trainable_parameters

SMALL: dict[str, Any] = {"num_heads": 2, "out_channels": 32}
TIMM: dict[str, Any] = {**SMALL, "embed_dim": 32, "depth": 2, "img_size": 64}


@dataclass(frozen=True)
class Kind:
    """An encoder, and its facts as counted by hand.

    Attributes:
        build: builds it with random weights.
        width: of its tokens.
        depth: number of blocks.
        stride: pixels per token and side.
        biases: of all pretrained layers.
        neck_layers: pretrained layers of the neck, 32 channels each; none where the neck is fresh.
    """

    build: Callable[[], Encoder]
    width: int
    depth: int
    stride: int
    biases: int
    neck_layers: int = 0


# Biases of a block of width C: two norms, qkv, projection, MLP: 11 C; the stem's stages have 4 per channel.
KINDS: dict[str, Kind] = {
    "global": Kind(partial(TinyViT, **SMALL, embed_dim=32, depth=3, neck_taps=(0, 2)), 32, 3, 16, (3 * 11 + 1) * 32),
    "windowed": Kind(
        partial(TinyViT, **SMALL, embed_dim=32, depth=2, window_size=3, global_blocks=(1,), patch_size=8, grid=4),
        *(32, 2, 8),
        biases=(2 * 11 + 1) * 32,
    ),
    "conv_stem": Kind(
        partial(TinyViT, **SMALL, embed_dim=48, depth=2, conv_stem=True),
        *(48, 2, 16),
        biases=2 * 11 * 48 + 4 * (24 + 24 + 24 + 48),
    ),
    "sam": Kind(
        partial(SamViT, **SMALL, embed_dim=32, depth=2, window_size=3, global_blocks=(1,), grid=4),
        *(32, 2, 16),
        biases=(2 * 11 + 1) * 32 + 2 * 32,  # the neck's convolutions have none
        neck_layers=4,
    ),
    "deit": Kind(partial(build_timm_encoder, "deit_tiny_patch16_224", **TIMM), 32, 2, 16, (2 * 11 + 2) * 32),
    # Rotary positions, register tokens, no biases of qkv.
    "dinov3": Kind(partial(build_timm_encoder, "vit_small_patch16_dinov3", **TIMM), 32, 2, 16, (2 * 8 + 2) * 32),
}
PARTS = {name: kind.build().parts() for name, kind in KINDS.items()}
PAIRS = [(method, kind) for method in METHODS for kind in KINDS if METHODS[method].needs <= PARTS[kind]]
UNSUPPORTED = [(method, kind) for method in METHODS for kind in KINDS if (method, kind) not in PAIRS]
every_pair = pytest.mark.parametrize(("method", "kind"), PAIRS)

RANK, EXPERTS = 4, 2
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": RANK},
    "conv_lora": {"rank": RANK, "experts": EXPERTS},  # few: each is chosen, and so learns, within a step or two
}


def ssf_layers(kind: Kind) -> int:
    """Count channels behind norms, qkv, projection, MLP, embedding of patches and neck; each is scaled and shifted."""
    return kind.depth * 11 * kind.width + kind.width + kind.neck_layers * 32


def lst_network(width: int, depth: int, side: int) -> int:
    """Count a ladder, a block of MLP ratio 2 and a gate per block, and the way up."""
    ladder = width * side + side
    block = 2 * 2 * side + (3 * side**2 + 3 * side) + (side**2 + side) + (2 * side**2 + 2 * side) + (2 * side**2 + side)
    return depth * (ladder + block + 1) + side * width + width


def sam_adapter_network(kind: Kind, features: int) -> int:
    """Count the shared layer, the embedding of tokens, a layer per block, and the embedding of patches."""
    width, depth, stride = kind.width, kind.depth, kind.stride
    tokens = features * width + width + width * features + features
    return tokens + depth * (features**2 + features) + 3 * stride**2 * features + features


# What a method adds, from its paper.
ADDED: dict[str, Callable[[Kind], int]] = {
    "decoder_only": lambda kind: 0,
    "bitfit": lambda kind: 0,
    "full": lambda kind: 0,
    "adapter": lambda kind: kind.depth * 2 * (kind.width * 2 + 2 + 2 * kind.width + kind.width),
    "vpt": lambda kind: kind.depth * 12 * kind.width,
    "lst": lambda kind: lst_network(kind.width, kind.depth, 16),
    "sam_adapter": lambda kind: sam_adapter_network(kind, kind.width // 16),
    "ssf": lambda kind: 2 * ssf_layers(kind),
    "lora": lambda kind: kind.depth * RANK * 4 * kind.width,
    "conv_lora": lambda kind: (
        kind.depth * (RANK * 4 * kind.width + EXPERTS * (RANK * RANK * 9 + RANK) + 2 * RANK * EXPERTS)
    ),
}


def pretrained_encoder(kind: str) -> Encoder:
    """Build an encoder that counts as pretrained, none of its parameters left at zero or one."""
    encoder = KINDS[kind].build()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoder.mark_pretrained()
    return encoder


def adapted_model(method: str, kind: str) -> SegmentationModel:
    """Build a small model with the method applied."""
    encoder = pretrained_encoder(kind)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    return SegmentationModel(encoder, MaskDecoder(32, depth=1, num_heads=2, mlp_dim=32))


def pictures() -> tuple[Tensor, Tensor]:
    """Draw two images with a bright square and its mask."""
    images = 90 + 20 * torch.rand(2, 3, 48, 64)
    masks = torch.zeros(2, 48, 64)
    masks[0, 8:30, 10:30] = 1
    masks[1, 20:40, 30:60] = 1
    return images + 120 * masks[:, None], masks


def mask_loss(model: SegmentationModel, images: Tensor, masks: Tensor) -> Tensor:
    """Return the loss of training."""
    logits = F.interpolate(model(images).mask_logits.float(), masks.shape[-2:], mode="bilinear")[:, 0]
    return F.binary_cross_entropy_with_logits(logits, masks) + model.aux_loss()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters and buffers."""
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


@every_pair
def test_method__before_the_first_step__computes_what_the_frozen_encoder_did(method: str, kind: str) -> None:
    encoder = pretrained_encoder(kind).eval()
    images = torch.randn(2, 3, 48, 64)
    frozen = encoder(images)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    if METHODS[method].changes_at_init:
        assert (encoder(images) - frozen).abs().max() > 1e-3
    else:
        assert torch.equal(encoder(images), frozen)


def test_methods__that_change_the_encoder_at_once__are_known() -> None:
    assert [name for name, method in METHODS.items() if method.changes_at_init] == ["vpt"]
    assert [name for name, method in METHODS.items() if method.frozen_prefix] == ["decoder_only", "lst"]


@every_pair
def test_method__parameters__are_exactly_the_declared_ones(method: str, kind: str) -> None:
    encoder, facts = pretrained_encoder(kind), KINDS[kind]
    before = {name for name, _ in encoder.named_parameters()}
    base = count_parameters(encoder)[1]
    fresh = sum(p.numel() for name, p in encoder.named_parameters() if name in encoder.fresh_parameter_names)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder)
    trainable, total = count_parameters(encoder)
    assert total == base + ADDED[method](facts)
    own = {"full": base - fresh, "bitfit": facts.biases}.get(method, 0)
    assert trainable == fresh + ADDED[method](facts) + own
    # Wrapped layers keep their parameters under `base`, wrapped attentions under `attn`.
    kept = {n.replace(".base.", ".").replace(".attn.attn.", ".attn.") for n, _ in encoder.named_parameters()}
    assert before <= kept, "no parameter of the encoder was lost"


@every_pair
def test_method__three_steps__move_all_that_train_and_nothing_else(method: str, kind: str) -> None:
    model = adapted_model(method, kind).train()
    trainable = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    before = tensors(model)
    images, masks = pictures()
    touched = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for _ in range(3):  # what stands before a layer of zeros moves only once that has left zero
        optimizer.zero_grad()
        mask_loss(model, images, masks).backward()
        for name, parameter in trainable.items():
            assert parameter.grad is not None, f"no gradient reaches {name}"
            touched[name] += parameter.grad.abs()
        optimizer.step()
    # Softmax ignores a constant, which is all that the bias of a key adds.
    still = [name for name, t in touched.items() if not t.any() and not name.endswith("k_proj.bias")]
    assert not still, f"no gradient reaches {still}"
    for name, tensor in tensors(model).items():
        if name not in trainable:
            assert torch.equal(tensor, before[name]), f"frozen {name} moved"


@every_pair
def test_method__stages_said_to_be_frozen__depend_on_nothing_that_trains(method: str, kind: str) -> None:
    encoder = pretrained_encoder(kind)
    build_method(method, METHOD_OPTIONS.get(method, {})).apply(encoder.eval())
    stage = encoder.eval().frozen_stage()
    expected = KINDS[kind].depth if METHODS[method].frozen_prefix else 0
    if (method, kind) == ("decoder_only", "sam"):
        expected += 1  # SAM's neck is frozen too
    assert stage == expected
    images = torch.randn(2, 3, 48, 64)
    state = encoder.begin(images, stage)
    assert not (stage and any(part.requires_grad for part in state))
    assert torch.equal(encoder.finish(state, stage), encoder(images))


@every_pair
def test_method__evaluation__is_deterministic_and_independent_of_the_batch(method: str, kind: str) -> None:
    model = adapted_model(method, kind).eval()
    images, _ = pictures()
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
        both = model(images).mask_logits
        assert torch.equal(both, model(images).mask_logits)
        torch.testing.assert_close(model(images[1:]).mask_logits, both[1:], rtol=1e-4, atol=1e-5)


@every_pair
def test_method__state_of_another_model__is_all_that_its_output_depends_on(method: str, kind: str) -> None:
    trained, fresh = adapted_model(method, kind).eval(), adapted_model(method, kind).eval()
    images, _ = pictures()
    with torch.no_grad():
        for parameter in trainable_parameters(trained).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = trained(images).mask_logits
        assert not torch.allclose(fresh(images).mask_logits, expected, atol=1e-3)
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(images).mask_logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if pair[1] in ("windowed", "sam", "dinov3")])
def test_method__half_precision_autocast__is_finite(method: str, kind: str, dtype: torch.dtype) -> None:
    model = adapted_model(method, kind).train()
    images, masks = pictures()
    with torch.autocast("cpu", dtype=dtype):
        loss = mask_loss(model, images, masks)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


def test_method__encoder_without_one_of_its_parts__is_a_known_pair() -> None:
    # A stack of convolutions embeds patches there: no one layer to scale and shift.
    assert UNSUPPORTED == [("ssf", "conv_stem")]


@pytest.mark.parametrize(("method", "kind"), UNSUPPORTED)
def test_method__encoder_without_one_of_its_parts__names_part_and_the_methods_that_work(method: str, kind: str) -> None:
    encoder = pretrained_encoder(kind)
    before = tensors(encoder)
    with pytest.raises(UnsupportedCombination) as caught:
        build_method(method, {}).apply(encoder)
    message = str(caught.value)
    assert all(part in message for part in METHODS[method].needs - PARTS[kind])
    assert message.endswith("Methods that work with it: " + ", ".join(m for m, k in PAIRS if k == kind) + ".")
    assert tensors(encoder).keys() == before.keys()


def test_bitfit__attention_that_holds_biases_itself__trains_them() -> None:
    encoder = build_timm_encoder("eva_giant_patch14_224", **TIMM, patch_size=16)
    encoder.mark_pretrained()
    build_method("bitfit", {}).apply(encoder)
    trainable = trainable_parameters(encoder).keys()
    assert {f"blocks.{i}.block.attn.{name}" for i in (0, 1) for name in ("q_bias", "v_bias")} <= trainable


class NoBlocks(Encoder):
    """An encoder without transformer blocks."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.blocks = nn.ModuleList()

    def forward(self, images: Tensor) -> Tensor:
        """Return the images."""
        return images

    def load_pretrained(self, state: dict[str, Tensor], *, source: str) -> None:
        """Need nothing."""

    def mark_pretrained(self) -> None:
        """Have nothing fresh."""


@pytest.mark.parametrize("method", ["adapter", "vpt", "lst", "sam_adapter", "ssf", "lora", "conv_lora"])
def test_method__encoder_without_blocks__names_the_methods_that_work(method: str) -> None:
    with pytest.raises(UnsupportedCombination, match=r"NoBlocks lacks.*: decoder_only, bitfit, full\."):
        build_method(method, {}).apply(NoBlocks())


@pytest.mark.parametrize("method", ["decoder_only", "bitfit", "full"])
def test_method__that_needs_no_blocks__works_without(method: str) -> None:
    encoder = NoBlocks()
    encoder.scale = nn.Linear(2, 2)
    build_method(method, {}).apply(encoder)
    expected = {"decoder_only": set(), "bitfit": {"scale.bias"}, "full": {"scale.weight", "scale.bias"}}
    assert set(trainable_parameters(encoder)) == expected[method]


@pytest.mark.parametrize(
    ("method", "added", "trainable"),
    [
        # CONV_LORA.md, section 4: encoder, and with the decoder's 3,505,536.
        ("decoder_only", 0, 3_505_536),
        ("bitfit", 0, 3_957_888),
        ("adapter", 409_728, 3_915_264),
        ("vpt", 491_520, 3_997_056),
        ("lst", 7_986_464, 11_492_000),
        ("sam_adapter", 475_040, 3_980_576),
        ("ssf", 905_728, 4_411_264),
        ("lora", 491_520, 3_997_056),
        ("conv_lora", 514_560, 4_020_096),
        # 641,090,608 less what is not built: the prompt encoder, the IoU head, three of four masks (559,024).
        ("full", 0, 640_531_584),
    ],
)
def test_method__on_sam_vit_h__trains_as_many_parameters_as_in_the_paper(
    method: str, added: int, trainable: int
) -> None:
    with torch.device("meta"):
        encoder = SAM_ENCODERS["sam_vit_h"]()
        encoder.mark_pretrained()
        before = count_parameters(encoder)[1]
        build_method(method, {}).apply(encoder)
        decoder = count_parameters(MaskDecoder(256, mlp_dim=2048))
    assert decoder == (3_505_536, 3_505_536)
    assert count_parameters(encoder)[1] - before == added
    assert count_parameters(encoder)[0] + decoder[0] == trainable


def test_build_method__unknown_name_or_option__is_refused() -> None:
    with pytest.raises(ConfigError, match="conv_lora"):
        build_method("lorra", {})
    with pytest.raises(ConfigError, match=r"lora has no option 'ranks'.*rank, alpha"):
        build_method("lora", {"ranks": 3})
    with pytest.raises(ConfigError, match="Its options: none"):
        build_method("ssf", {"width": 3})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adapter", {"width": 0}, r"optim\.adapter\.width is 0"),
        ("vpt", {"tokens": 0}, r"optim\.vpt\.tokens is 0"),
        ("lst", {"width": 12}, r"optim\.lst\.width is 12.*divisible by its 8 heads"),
        ("sam_adapter", {"width": 0}, r"optim\.sam_adapter\.width is 0"),
        ("lora", {"rank": 0}, r"optim\.lora\.rank is 0"),
        ("lora", {"decoder_rank": -1}, "decoder_rank -1"),
        ("lora", {"scaling": "root"}, "rank, sqrt_rank"),
        ("lora", {"b_lr_ratio": 0.0}, r"optim\.lora\.b_lr_ratio is 0\.0"),
        ("conv_lora", {"gate": "free"}, "balanced, learned"),
    ],
)
def test_build_method__option_out_of_range__is_refused_by_its_setting(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(method, options)


@pytest.mark.parametrize("method", ["adapter", "sam_adapter"])
def test_method__wider_than_the_encoder__is_refused(method: str) -> None:
    build_method(method, {"width": 32}).apply(pretrained_encoder("sam"))
    with pytest.raises(ConfigError, match="width is 33; allowed here: 1 to 32"):
        build_method(method, {"width": 33}).apply(pretrained_encoder("sam"))
