"""SAM's encoders: parity with segment_anything, any size, parameter counts, reading of its checkpoints."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.build import _build_encoder, build_method
from semseg_automl.errors import CheckpointError, ConfigError
from semseg_automl.models import ENCODERS
from semseg_automl.models.mask_decoder import MaskDecoder
from semseg_automl.models.sam import SAM_ENCODERS, SamViT, unfilled
from semseg_automl.models.segmentation_model import SegmentationModel
from semseg_automl.peft import count_parameters
from semseg_automl.third_party import segment_anything

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "global_blocks": (1,), "out_channels": 256}


def fill(module: nn.Module) -> None:
    """Give every parameter a value: upstream leaves relative and absolute positions at zero."""
    for parameter in module.parameters():
        spread = parameter.detach().std(correction=0).item()
        nn.init.normal_(parameter, std=spread or 0.2)


def upstream(grid: int, *, mask_tokens: int = 4) -> Any:
    """segment_anything's whole SAM around a small encoder."""
    sizes = SMALL
    modeling = segment_anything.modeling
    encoder = modeling.ImageEncoderViT(
        img_size=16 * grid,
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=sizes["global_blocks"],
        window_size=14,
        out_chans=256,
    )
    prompt = modeling.PromptEncoder(
        embed_dim=256, image_embedding_size=(grid, grid), input_image_size=(16 * grid, 16 * grid), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = modeling.MaskDecoder(num_multimask_outputs=mask_tokens - 1, transformer=transformer, transformer_dim=256)
    sam = modeling.Sam(image_encoder=encoder, prompt_encoder=prompt, mask_decoder=decoder)
    fill(sam)
    return sam.eval()


def ours_from(sam: Any, grid: int) -> SegmentationModel:
    """Our model filled from upstream's weights."""
    encoder = SamViT(grid=grid, **SMALL)
    decoder = MaskDecoder(256, mlp_dim=2048)
    encoder.load_pretrained(sam.state_dict(), source="upstream")
    decoder.load_sam(sam.state_dict(), source="upstream")
    return SegmentationModel(encoder, decoder).eval()


def unprompted_mask(sam: Any, embeddings: Tensor) -> Tensor:
    """What upstream's decoder says without a prompt, its first mask, image by image."""
    points = torch.zeros(1, 0, 256)
    masks = []
    for one in embeddings:
        dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *one.shape[1:])
        position = sam.prompt_encoder.pe_layer(tuple(one.shape[1:])).unsqueeze(0)
        masks.append(sam.mask_decoder.predict_masks(one[None], position, points, dense)[0][:, :1])
    return torch.cat(masks)


@pytest.mark.parametrize("grid", [8, 20, 64])
def test_sam__native_size__equals_segment_anything_encoder_and_decoder(grid: int) -> None:
    sam = upstream(grid, mask_tokens=1)  # ours has one; tokens see each other
    model = ours_from(sam, grid)
    images = 255 * torch.rand(2, 3, 16 * grid, 16 * grid)
    with torch.no_grad():
        normalised = torch.stack([sam.preprocess(image) for image in images])
        embeddings = sam.image_encoder(normalised)
        torch.testing.assert_close(model.encoder(model.normalise(images)), embeddings, rtol=0, atol=1e-5)
        mask = unprompted_mask(sam, embeddings)
        torch.testing.assert_close(model(images).mask_logits, mask, rtol=0, atol=1e-5 * mask.abs().max().item())


def test_sam__gradients__equal_segment_anything() -> None:
    grid = 16
    sam = upstream(grid).double()
    encoder = ours_from(sam, grid).encoder.double()
    images = torch.randn(1, 3, 16 * grid, 16 * grid, dtype=torch.float64)
    weights = torch.randn(1, 256, grid, grid, dtype=torch.float64)
    (sam.image_encoder(images) * weights).sum().backward()
    (encoder(images) * weights).sum().backward()
    theirs = dict(sam.image_encoder.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [(64, 96), (320, 144), (16, 16)])
def test_sam__other_size__keeps_grid_and_is_independent_of_the_batch(size: tuple[int, int]) -> None:
    encoder = SamViT(grid=8, **SMALL).eval()
    fill(encoder)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        embeddings = encoder(images)
        assert embeddings.shape == (2, 256, size[0] // 16, size[1] // 16)
        torch.testing.assert_close(encoder(images[1:]), embeddings[1:], rtol=1e-4, atol=1e-5)


def test_sam__side_not_divisible__is_refused() -> None:
    model = SegmentationModel(SamViT(grid=4, **SMALL), MaskDecoder(256))
    with pytest.raises(ConfigError, match="divisible by 16"):
        model(torch.zeros(1, 3, 64, 70))


@pytest.mark.parametrize("method", ["decoder_only", "lora", "conv_lora"])
def test_sam__stages__cut_anywhere_give_the_same_embeddings(method: str) -> None:
    encoder = SamViT(grid=4, **SMALL).eval()
    fill(encoder)
    encoder.mark_pretrained()
    build_method(method, {}).apply(encoder)
    assert encoder.frozen_stage() == (encoder.last_stage if method == "decoder_only" else 0)
    images = torch.randn(1, 3, 64, 48)
    whole = encoder(images)
    for stage in range(encoder.last_stage + 1):
        assert torch.equal(encoder.finish(encoder.begin(images, stage), stage), whole)


def test_sam__last_blocks_only__leave_a_frozen_stage_before_them() -> None:
    encoder = SamViT(grid=4, **SMALL)
    encoder.mark_pretrained()
    build_method("conv_lora", {"last_blocks": 2}).apply(encoder)
    assert encoder.frozen_stage() == 1
    with pytest.raises(ConfigError, match="3 blocks"):
        build_method("lora", {"last_blocks": 4}).apply(SamViT(grid=4, **SMALL))


@pytest.mark.parametrize("method", ["lora", "conv_lora", "full"])
def test_sam__checkpointing__changes_no_gradient(method: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = SamViT(grid=4, **SMALL).train()
        fill(encoder)
        build_method(method, {}).apply(encoder)
        for name, parameter in encoder.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter)
        encoder.checkpointing = checkpointing
        model = SegmentationModel(encoder, MaskDecoder(256))
        torch.manual_seed(1)
        output = model(255 * torch.rand(2, 3, 64, 64))
        (output.mask_logits.sum() + model.aux_loss()).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


# torch's tracer instantiates autograd functions, which torch itself warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", ["lora", "conv_lora"])
def test_sam__compiled__has_no_graph_break_and_the_same_gradients(method: str) -> None:
    encoder = SamViT(grid=4, **SMALL)
    build_method(method, {}).apply(encoder)
    fill(encoder)
    encoder.eval()  # without noise in the gate
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    images = torch.randn(1, 3, 64, 80)
    parameters = [p for name, p in encoder.named_parameters() if name.endswith("lora_B")]
    expected, got = encoder(images), compiled(images)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for found, right in zip(torch.autograd.grad(got.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_sam__exported__holds_only_torch_s_own_operators() -> None:
    encoder = SamViT(grid=4, **SMALL).eval()
    fill(encoder)
    images = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(encoder, (images,))
    assert "semseg_automl" not in "".join(str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(images), encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "encoder", "expected"),
    [
        # CONV_LORA.md section 4 in full digits for ViT-H; r (C + 3 C) and the experts, per block, for the others.
        ("decoder_only", "sam_vit_h", 3_505_536),
        ("lora", "sam_vit_h", 3_997_056),
        ("conv_lora", "sam_vit_h", 4_020_096),
        ("decoder_only", "sam_vit_b", 3_505_536),
        ("lora", "sam_vit_b", 3_616_128),
        ("conv_lora", "sam_vit_b", 3_624_768),
        ("decoder_only", "sam_vit_l", 3_505_536),
        ("lora", "sam_vit_l", 3_800_448),
        ("conv_lora", "sam_vit_l", 3_817_728),
    ],
)
def test_sam__trainable_parameters__are_the_paper_s(method: str, encoder: str, expected: int) -> None:
    with torch.device("meta"):
        sam = SAM_ENCODERS[encoder]()
        sam.mark_pretrained()
        build_method(method, {}).apply(sam)
        model = SegmentationModel(sam, MaskDecoder(256, mlp_dim=2048))
    assert count_parameters(model)[0] == expected


@pytest.mark.parametrize("encoder", SAM_ENCODERS)
def test_sam__official_sizes__have_upstream_s_parameters(encoder: str) -> None:
    with torch.device("meta"):
        ours = SAM_ENCODERS[encoder]().state_dict()
        theirs = segment_anything.sam_model_registry[encoder.removeprefix("sam_")]().image_encoder.state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_unfilled__then_loaded__equals_the_encoder_built_with_random_weights() -> None:
    usual = SamViT(grid=4, **SMALL).eval()
    before = torch.get_rng_state()
    late = unfilled(partial(SamViT, grid=4, **SMALL)).eval()
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn"
    assert late.fresh_parameter_names == usual.fresh_parameter_names
    late.load_pretrained({f"image_encoder.{name}": t for name, t in usual.state_dict().items()}, source="usual")
    images = 255 * torch.rand(1, 3, 64, 64)
    for name, buffer in usual.named_buffers():
        assert torch.equal(late.get_buffer(name), buffer), name
    assert torch.equal(late(images), usual(images))
    with torch.device("meta"):
        assert unfilled(partial(SamViT, grid=4, **SMALL)).pos_embed.is_meta


@pytest.mark.parametrize("checkpoint", [None, "sam.pth"])
def test_build__sam__draws_its_weights_only_where_no_file_has_them(
    checkpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "sam_vit_b", partial(SamViT, grid=4, **{**SMALL, "out_channels": 256}))
    plan: Any = SimpleNamespace(
        encoder="sam_vit_b", encoder_options={}, decoder_options={"dim": 256}, checkpoint=checkpoint
    )
    before = torch.get_rng_state()
    built = _build_encoder(plan).state_dict()
    assert torch.equal(torch.get_rng_state(), before) == (checkpoint is not None)
    if checkpoint is None:
        torch.set_rng_state(before)
        expected = SamViT(grid=4, **SMALL).state_dict()
        assert all(torch.equal(built[name], tensor) for name, tensor in expected.items())


def test_load_pretrained__checkpoint_of_another_size__names_both() -> None:
    with torch.device("meta"):
        large = segment_anything.sam_model_registry["vit_l"]().state_dict()
        base = SAM_ENCODERS["sam_vit_b"]()
    with pytest.raises(CheckpointError, match=r"big\.pth holds sam_vit_l; the plan has sam_vit_b"):
        base.load_pretrained(large, source="big.pth")


def test_load_pretrained__tensor_missing_or_misshapen__is_named_with_both_shapes() -> None:
    sam = upstream(4)
    encoder, decoder = SamViT(grid=4, **SMALL), MaskDecoder(256, mlp_dim=2048)
    state = sam.state_dict()
    cut = {n: t for n, t in state.items() if n != "image_encoder.blocks.0.norm1.weight"}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.weight' is nothing"):
        encoder.load_pretrained(cut, source="f")
    with pytest.raises(CheckpointError, match=r"pos_embed' is \(1, 4, 4, 32\), SAM's encoder expects \(1, 6, 6, 32\)"):
        SamViT(grid=6, **SMALL).load_pretrained(state, source="f")
    cut = {n: t for n, t in state.items() if n != "prompt_encoder.no_mask_embed.weight"}
    with pytest.raises(CheckpointError, match="no_mask_embed"):
        decoder.load_sam(cut, source="f")
    with pytest.raises(CheckpointError, match="decoder_dim"):
        MaskDecoder(128).load_sam(state, source="f")


def test_load_sam__several_mask_tokens__start_apart_around_sam_s_first() -> None:
    state = upstream(4).state_dict()
    decoder = MaskDecoder(256, num_mask_tokens=5, num_classes=3, mlp_dim=2048)
    decoder.load_sam(state, source="f")
    tokens = decoder.mask_tokens.weight.detach()
    assert torch.equal(tokens[0], state["mask_decoder.mask_tokens.weight"][0])
    assert torch.pdist(tokens).min() > 0.5 * state["mask_decoder.mask_tokens.weight"][0].std()
