"""Names of SAM's weights: a model of ``transformers`` and one of segment_anything must become the same one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semseg_automl.errors import CheckpointError
from semseg_automl.models.sam_names import to_sam_names
from semseg_automl.third_party import segment_anything

SIDE, WIDTH, DEPTH, HEADS, WINDOW = 96, 64, 3, 4, 4
GRID = SIDE // 16


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A small SamModel of transformers; every tensor drawn, so that nothing hides behind a 1 or a 0."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "image_size": SIDE,
            "window_size": WINDOW,
            "global_attn_indexes": [1],
        },
        prompt_encoder_config={"image_size": SIDE},
        # 1e-5 is what the original's decoder has; transformers defaults to 1e-6.
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    model: Any = SamModel(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """segment_anything's Sam of the same sizes, with weights of its own."""
    parts = segment_anything.modeling
    model: nn.Module = parts.Sam(
        image_encoder=parts.ImageEncoderViT(
            depth=DEPTH,
            embed_dim=WIDTH,
            img_size=SIDE,
            num_heads=HEADS,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=WINDOW,
        ),
        prompt_encoder=parts.PromptEncoder(
            embed_dim=256, image_embedding_size=(GRID, GRID), input_image_size=(SIDE, SIDE), mask_in_chans=16
        ),
        mask_decoder=parts.MaskDecoder(
            transformer=parts.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
        ),
    )
    return model.eval()


@torch.no_grad()
def test_to_sam_names__model_of_transformers__becomes_the_original(theirs: Any, original: Any) -> None:
    original.load_state_dict(to_sam_names(theirs.state_dict()), strict=True)
    images = torch.randn(1, 3, SIDE, SIDE)
    embeddings = theirs.get_image_embeddings(images)
    torch.testing.assert_close(original.image_encoder(images), embeddings, rtol=1e-5, atol=1e-5)

    points, labels = torch.tensor([[[20.0, 30.0], [50.0, 9.0]]]), torch.tensor([[1, 0]])
    box, mask = torch.tensor([[5.0, 8.0, 60.0, 70.0]]), torch.randn(1, 1, 4 * GRID, 4 * GRID)
    prompts: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({}, {}),
        ({"points": (points, labels)}, {"input_points": points[None], "input_labels": labels[None]}),
        ({"boxes": box}, {"input_boxes": box[None]}),
        ({"masks": mask}, {"input_masks": mask}),
    ]
    for ours, asked in prompts:
        sparse, dense = original.prompt_encoder(**({"points": None, "boxes": None, "masks": None} | ours))
        masks, quality = original.mask_decoder(
            image_embeddings=embeddings,
            image_pe=original.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        expected = theirs(image_embeddings=embeddings, multimask_output=True, **asked)
        assert masks.std() > 1e-3
        torch.testing.assert_close(masks, expected.pred_masks[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quality, expected.iou_scores[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["shared_image_embedding", "prompt_encoder.shared_embedding"])
def test_to_sam_names__position_encoding_under_one_name__is_enough(name: str, theirs: Any, original: Any) -> None:
    state = dict(theirs.state_dict())
    del state[f"{name}.positional_embedding"]
    original.load_state_dict(to_sam_names(state), strict=True)


def test_to_sam_names__twins_that_differ__are_refused(theirs: Any) -> None:
    state = dict(theirs.state_dict())
    twin = "prompt_encoder.shared_embedding.positional_embedding"
    state[twin] = state[twin] + 1
    with pytest.raises(CheckpointError, match=rf"'{twin}' and its twin.*different values"):
        to_sam_names(state)


def test_to_sam_names__tensors__are_not_copied(theirs: Any, original: nn.Module) -> None:
    for model in (theirs, original):
        state = model.state_dict()
        before = {tensor.data_ptr() for tensor in state.values()}
        assert {tensor.data_ptr() for tensor in to_sam_names(state).values()} == before


def test_to_sam_names__original_names__stay(original: nn.Module) -> None:
    state = original.state_dict()
    assert list(to_sam_names(state)) == list(state)
    encoder_only = {name: tensor for name, tensor in state.items() if name.startswith("image_encoder.")}
    assert to_sam_names(encoder_only) == encoder_only


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["blocks.0.attn.qkv.weight", "pos_embed"],  # a plain ViT of timm
        ["module.image_encoder.pos_embed"],
        ["mask_decoder.iou_token.weight"],  # no encoder: in either naming
        ["image_encoder.pos_embed", "maskmem_tpos_enc"],
        ["image_encoder.pos_embed", "vision_encoder.pos_embed"],
        ["vision_encoder.pos_embed", "mask_decoder.hf_token.weight"],
        ["vision_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.1.weight"],
        ["vision_encoder.pos_embed", "vision_encoder.layers.0.layer_norm1weight"],
    ],
)
def test_to_sam_names__other_names__are_shown_beside_the_two_namings(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"image_encoder\.blocks\.0.*vision_encoder\.layers\.0") as caught:
        to_sam_names({name: torch.zeros(1) for name in names})
    strange = [name for name in names if name not in ("vision_encoder.pos_embed",)][-1:]
    assert (f"'{strange[0]}'" if names and strange else "none at all") in str(caught.value)


def test_to_sam_names__many_other_names__are_counted() -> None:
    with pytest.raises(
        CheckpointError, match=r"^deit\.pth does not.*'layer0', 'layer1', 'layer2', 'layer3', 'layer4' and 7 more"
    ):
        to_sam_names({f"layer{i}": torch.zeros(1) for i in range(12)}, source="deit.pth")
