"""The mask decoder and the model around it: size, shapes, parity with segment_anything, and from logits to labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl.errors import ConfigError
from semseg_automl.models.mask_decoder import MaskDecoder, SegmentationOutput
from semseg_automl.models.segmentation_model import SegmentationModel, hard_labels, semantic_scores
from semseg_automl.models.tiny_vit import TinyViT
from semseg_automl.third_party import segment_anything

HEADS: dict[str, dict[str, Any]] = {
    "binary": {},
    "class_tokens": {"num_mask_tokens": 5},
    "queries": {"num_mask_tokens": 7, "num_classes": 4},
    "binary_detail": {"detail": True},
    "queries_detail": {"num_mask_tokens": 7, "num_classes": 4, "detail": True},
}


def small_decoder(**options: Any) -> MaskDecoder:
    """Build a decoder of width 32."""
    return MaskDecoder(32, mlp_dim=64, **options).eval()


def small_model(**options: Any) -> SegmentationModel:
    """Build a model of stride 16 with a decoder of width 32."""
    encoder = TinyViT(embed_dim=32, depth=2, num_heads=2, out_channels=32, grid=4)
    return SegmentationModel(encoder, small_decoder(**options)).eval()


def embeddings_and_images(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Draw embeddings of a 3 x 4 grid and the images they would come from."""
    return torch.randn(batch, 32, 3, 4), torch.randn(batch, 3, 48, 64)


def test_mask_decoder__decoder_only_training__has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        decoder = MaskDecoder()
    assert sum(p.numel() for p in decoder.parameters()) == 3_505_536


@pytest.mark.parametrize("head", HEADS)
def test_mask_decoder__each_head__gives_maps_at_a_quarter_of_the_input(head: str) -> None:
    output = small_decoder(**HEADS[head])(*embeddings_and_images())
    tokens, classes = HEADS[head].get("num_mask_tokens", 1), HEADS[head].get("num_classes")
    assert output.mask_logits.shape == (2, tokens, 12, 16)
    if classes is None:
        assert output.class_logits is None
    else:
        assert output.class_logits is not None
        assert output.class_logits.shape == (2, tokens, classes + 1)


@pytest.mark.parametrize("head", HEADS)
def test_mask_decoder__batch_of_one__equals_its_row_of_a_larger_batch(head: str) -> None:
    decoder = small_decoder(**HEADS[head])
    embeddings, images = embeddings_and_images(3)
    with torch.no_grad():
        together, apart = decoder(embeddings, images), decoder(embeddings[1:2], images[1:2])
    torch.testing.assert_close(apart.mask_logits, together.mask_logits[1:2], rtol=1e-4, atol=1e-5)
    if together.class_logits is not None:
        torch.testing.assert_close(apart.class_logits, together.class_logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["class_tokens", "queries"])
def test_mask_decoder__several_tokens__differ_before_the_first_step(head: str) -> None:
    output = small_decoder(**HEADS[head])(*embeddings_and_images(1))
    maps = output.mask_logits[0].flatten(1)
    apart = torch.pdist(maps) / maps.norm(dim=1).mean()
    assert apart.min() > 1e-2, "tokens that start alike get the same gradient and stay alike"
    if output.class_logits is not None:
        assert torch.pdist(output.class_logits[0]).min() > 1e-2


def test_detail_branch__other_images__change_the_maps_only_with_it() -> None:
    embeddings, images = embeddings_and_images(1)
    for detail in (False, True):
        decoder = small_decoder(detail=detail)
        same = torch.equal(decoder(embeddings, images).mask_logits, decoder(embeddings, -images).mask_logits)
        assert same is not detail


@pytest.mark.parametrize("grid", [(3, 4), (5, 5)])
def test_mask_decoder__weights_of_segment_anything__gives_its_masks(grid: tuple[int, int]) -> None:
    theirs = segment_anything.modeling.MaskDecoder(
        transformer_dim=32,
        transformer=segment_anything.modeling.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=64),
        num_multimask_outputs=0,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms too, so that nothing hides behind 1 and 0
    state = {n: t for n, t in theirs.state_dict().items() if not n.startswith("iou_prediction_head.")}
    ours = small_decoder()
    left = ours.load_state_dict(state, strict=False)
    assert left.unexpected_keys == []
    matrix = "positional_encoding_gaussian_matrix"
    assert left.missing_keys == [matrix, "no_mask_embed"], "all but those of the prompt encoder have one name"
    embeddings = torch.randn(1, 32, *grid)
    image_pe = ours.image_position(*grid).transpose(1, 2).unflatten(2, grid)
    with torch.no_grad():
        expected, _ = theirs(
            image_embeddings=embeddings,
            image_pe=image_pe,
            sparse_prompt_embeddings=torch.zeros(1, 0, 32),
            dense_prompt_embeddings=torch.zeros(1, 32, *grid),
            multimask_output=False,
        )
        got = ours(embeddings, torch.zeros(1, 3, 16 * grid[0], 16 * grid[1])).mask_logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_image_position__same_frequencies__equals_segment_anything() -> None:
    decoder = small_decoder()
    theirs = segment_anything.modeling.prompt_encoder.PositionEmbeddingRandom(16)
    theirs.positional_encoding_gaussian_matrix.copy_(decoder.positional_encoding_gaussian_matrix)
    expected = theirs((5, 9)).flatten(1).t()[None]
    torch.testing.assert_close(decoder.image_position(5, 9), expected, rtol=0, atol=1e-5)


def test_semantic_scores__one_map__is_the_sigmoid_of_the_upsampled_logits() -> None:
    logits = torch.tensor([[[[0.0, 2.0], [-2.0, 0.5]]]])
    scores = semantic_scores(SegmentationOutput(logits, None), (2, 2))
    torch.testing.assert_close(scores, 1 / (1 + torch.exp(-logits)))
    larger = semantic_scores(SegmentationOutput(logits, None), (5, 6))
    expected = F.interpolate(logits, size=(5, 6), mode="bilinear", align_corners=False).sigmoid()
    torch.testing.assert_close(larger, expected)


def test_semantic_scores__one_map_per_class__is_their_softmax() -> None:
    logits = torch.tensor([math.log(1.0), math.log(2.0), math.log(5.0)]).view(1, 3, 1, 1)
    scores = semantic_scores(SegmentationOutput(logits, None), (1, 1))
    torch.testing.assert_close(scores.flatten(), torch.tensor([0.125, 0.25, 0.625]))


def test_semantic_scores__queries__are_mixed_by_their_class_probabilities() -> None:
    # Two queries, two classes and "no object" last; probabilities (0.5, 0.25, 0.25) and (0.1, 0.8, 0.1).
    class_logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]).log()
    mask_logits = torch.tensor([0.6, 0.9]).logit().view(1, 2, 1, 1)
    scores = semantic_scores(SegmentationOutput(mask_logits, class_logits), (2, 3))
    assert scores.shape == (1, 2, 2, 3)
    expected = torch.tensor([0.5 * 0.6 + 0.1 * 0.9, 0.25 * 0.6 + 0.8 * 0.9])
    torch.testing.assert_close(scores, expected.view(1, 2, 1, 1).expand(1, 2, 2, 3))


def test_semantic_scores__half_precision_logits__are_scored_in_full_precision() -> None:
    output = SegmentationOutput(torch.randn(1, 3, 4, 4).bfloat16(), torch.randn(1, 3, 5).bfloat16())
    assert semantic_scores(output, (8, 8)).dtype == torch.float32


def test_hard_labels__one_map__is_foreground_above_the_threshold() -> None:
    scores = torch.tensor([[[0.2, 0.5, 0.7]]])
    assert hard_labels(scores).tolist() == [[0, 0, 1]]
    assert hard_labels(scores, threshold=0.1).tolist() == [[1, 1, 1]]
    assert hard_labels(scores, threshold=0.7).tolist() == [[0, 0, 0]]


def test_hard_labels__one_map_per_class__is_the_largest() -> None:
    scores = torch.tensor([[[0.1, 0.5]], [[0.7, 0.2]], [[0.2, 0.3]]])
    labels = hard_labels(scores)
    assert labels.tolist() == [[1, 0]]
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("size", [(40, 64), (64, 20)])
def test_segmentation_model__side_not_divisible_by_the_stride__is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"{size[0]} x {size[1]} pixels.*divisible by 16"):
        small_model()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("head", HEADS)
def test_segmentation_model__whole_numbers_or_floats__gives_the_same_logits(head: str) -> None:
    model = small_model(**HEADS[head])
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(images).mask_logits, model(images.float()).mask_logits)


def test_segmentation_model__layers_with_auxiliary_losses__are_summed() -> None:
    model = small_model()
    assert model.aux_loss().shape == ()
    assert model.aux_loss() == 0
    model.encoder.blocks[0].aux_loss = torch.tensor(0.5)
    model.mask_decoder.transformer.aux_loss = torch.tensor(0.25, dtype=torch.bfloat16)
    assert model.aux_loss() == 0.75
