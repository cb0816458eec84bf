"""Losses against the published formulas, and the contract every criterion keeps; and the matching under one of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl.losses import (
    CRITERIA,
    balanced_bce,
    balanced_ce_dice,
    ce_dice,
    set_criterion,
    structure_loss,
    structure_loss_weighted,
    uncertain_points,
)
from semseg_automl.matching import hungarian_match
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.task import IGNORE_INDEX

CLASSES = 3
QUERIES = 5


def blobs(size: tuple[int, int] = (48, 64), classes: int = CLASSES) -> Tensor:
    """Draw two masks ``(2, H, W)`` of class indices with smooth borders, every class in each."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size[0]), torch.linspace(-1, 1, size[1]), indexing="ij")
    masks = torch.zeros(2, *size, dtype=torch.int64)
    for c in range(1, classes):
        masks[0][(rows + 0.5) ** 2 + (columns - 0.9 * c + 1.2) ** 2 < 0.15] = c
        masks[1][(rows - 0.2) ** 2 + 2 * (columns - 0.8 * c + 1.1) ** 2 < 0.2] = c
    return masks


def blobs_for(name: str) -> Tensor:
    """Draw masks of the kind of task the criterion is for."""
    return blobs(classes=2 if CRITERIA[name].head == "binary" else CLASSES)


def random_output(name: str, size: tuple[int, int] = (48, 64), scale: float = 2.0) -> SegmentationOutput:
    """Draw logits of the head the criterion trains, for two images."""
    maps = {"binary": 1, "class_tokens": CLASSES, "queries": QUERIES}[CRITERIA[name].head]
    class_logits = torch.randn(2, QUERIES, CLASSES + 1) if CRITERIA[name].head == "queries" else None
    return SegmentationOutput(scale * torch.randn(2, maps, *size), class_logits)


def confident_output(name: str, mask: Tensor) -> SegmentationOutput:
    """Return logits that predict `mask` and are sure of it; queries beyond the classes say "no object"."""
    if CRITERIA[name].head == "binary":
        return SegmentationOutput(40.0 * mask[:, None] - 20.0, None)
    one_hot = F.one_hot(mask, CLASSES).permute(0, 3, 1, 2).float()
    if CRITERIA[name].head == "class_tokens":
        return SegmentationOutput(40.0 * one_hot - 20.0, None)
    spare = torch.full((len(mask), QUERIES - CLASSES, *mask.shape[1:]), -20.0)
    entries = torch.tensor([*range(CLASSES), *[CLASSES] * (QUERIES - CLASSES)])
    class_logits = 20.0 * F.one_hot(entries, CLASSES + 1).float().expand(len(mask), -1, -1)
    return SegmentationOutput(torch.cat([40.0 * one_hot - 20.0, spare], dim=1), class_logits)


def loss_of(name: str, output: SegmentationOutput, mask: Tensor) -> Tensor:
    """Compute a criterion with the points it draws fixed."""
    torch.manual_seed(0)
    return CRITERIA[name](output, mask)


def published_structure(logits: Tensor, mask: Tensor, *, weighted_bce: bool) -> Tensor:
    """Compute PraNet's loss from its formula, literally: 31 x 31 means, float64."""
    pred, gt = logits.double()[:, None], mask.double()[:, None]
    weight = 1 + 5 * (F.avg_pool2d(gt, kernel_size=31, stride=1, padding=15) - gt).abs()
    if weighted_bce:
        pixel = F.binary_cross_entropy_with_logits(pred, gt, reduction="none")
        bce = (weight * pixel).sum((2, 3)) / weight.sum((2, 3))
    else:  # what reduce="none" gives: a mean, so that weighting and unweighting it cancel
        bce = F.binary_cross_entropy_with_logits(pred, gt)
    inter = (pred.sigmoid() * gt * weight).sum((2, 3))
    union = ((pred.sigmoid() + gt) * weight).sum((2, 3))
    return (bce + 1 - (inter + 1) / (union - inter + 1)).mean()


@pytest.mark.parametrize("size", [(48, 64), (20, 24)])
@pytest.mark.parametrize("weighted", [False, True])
def test_structure_loss__random_logits__equals_the_published_formula(weighted: bool, size: tuple[int, int]) -> None:
    logits, mask = 3 * torch.randn(2, *size), blobs(size, classes=2)
    loss = (structure_loss_weighted if weighted else structure_loss)(logits, mask)
    expected = published_structure(logits, mask, weighted_bce=weighted)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_structure_loss__all_pixels_valid__equals_no_validity_given() -> None:
    logits, mask = torch.randn(2, 20, 24), blobs((20, 24), classes=2)
    for function in (structure_loss, structure_loss_weighted, balanced_bce):
        torch.testing.assert_close(function(logits, mask, torch.ones_like(mask).bool()), function(logits, mask))


def test_balanced_bce__random_logits__equals_the_formula_of_each_image() -> None:
    logits, mask = torch.randn(2, 48, 64), blobs(classes=2)
    expected = []
    for image, truth in zip(logits.double(), mask.double(), strict=True):
        positive, total = truth.sum(), truth.numel()
        entropy = F.binary_cross_entropy_with_logits(image, truth, pos_weight=(total - positive) / positive)
        expected.append(positive / total * entropy)
    loss = balanced_bce(logits, mask).double()
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0, 1])
def test_balanced_bce__one_class_only__is_finite_and_teaches_it(value: int) -> None:
    logits = torch.zeros(2, 16, 16, requires_grad=True)
    loss = balanced_bce(logits, torch.full((2, 16, 16), value))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert (logits.grad.sign() == 1 - 2 * value).all()


@pytest.mark.parametrize("balanced", [False, True])
def test_ce_dice__random_logits__equals_the_formula_over_classes_that_occur_in_each_image(balanced: bool) -> None:
    mask = blobs(classes=3)  # of four classes, the last occurs nowhere, the third in the second image alone
    mask[0][mask[0] == 2] = 0
    mask[0, :10] = IGNORE_INDEX
    logits = torch.randn(2, 4, 48, 64)
    expected = []
    for image, truth in zip(logits.double(), mask, strict=True):
        known = truth != IGNORE_INDEX
        probability = image.softmax(0)[:, known]
        dice, weight = [], torch.zeros(4, dtype=torch.float64)
        for c in truth[known].unique():
            target = (truth[known] == c).double()
            weight[c] = target.sum() ** -0.5 if balanced else 1
            overlap = (probability[c] * target).sum()
            dice.append(1 - (2 * overlap + 1) / (probability[c].sum() + target.sum() + 1))
        # torch divides by the sum of the weights of all pixels
        entropy = F.cross_entropy(image[None], truth[None], weight=weight, ignore_index=IGNORE_INDEX)
        expected.append(entropy + torch.stack(dice).mean())
    loss = (balanced_ce_dice if balanced else ce_dice)(logits, mask).double()
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion__perfect_prediction__is_near_zero_and_a_wrong_one_is_not(name: str) -> None:
    mask = blobs_for(name)
    perfect = confident_output(name, mask)
    assert loss_of(name, perfect, mask) < 0.3
    inverted = SegmentationOutput(-perfect.mask_logits, perfect.class_logits)
    assert loss_of(name, inverted, mask) > 2
    assert loss_of(name, random_output(name), mask) > 2 * loss_of(name, perfect, mask)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_criterion__large_logits_at_a_quarter_of_the_size__has_finite_gradients(dtype: torch.dtype, name: str) -> None:
    drawn = random_output(name, (12, 16), scale=100.0)
    leaves = [t.to(dtype).requires_grad_() for t in (drawn.mask_logits, drawn.class_logits) if t is not None]
    loss = loss_of(name, SegmentationOutput(leaves[0], leaves[1] if len(leaves) > 1 else None), blobs_for(name))
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.any()


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion__logits_of_ignored_pixels__change_nothing(name: str) -> None:
    mask = blobs_for(name)
    mask[:, 8:40, 10:50] = IGNORE_INDEX
    output = random_output(name)
    changed = output.mask_logits.clone()
    changed[:, :, 10:38, 12:48] = 30 * torch.randn(28, 36)  # away from the edge, across which points are interpolated
    before, after = loss_of(name, output, mask), loss_of(name, SegmentationOutput(changed, output.class_logits), mask)
    assert torch.equal(before, after)
    changed[:, 0, 3, 3] += 5
    assert name == "set_criterion" or loss_of(name, SegmentationOutput(changed, output.class_logits), mask) != before


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("whole_batch", [False, True])
def test_criterion__image_without_a_known_pixel__is_finite(whole_batch: bool, name: str) -> None:
    mask = blobs_for(name)
    mask[slice(None) if whole_batch else 1] = IGNORE_INDEX
    output = random_output(name)
    logits = output.mask_logits.requires_grad_()
    loss = loss_of(name, output, mask)
    (loss + 0 * logits.sum()).backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any(), "nothing is known of the second image's masks"


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion__image_of_background_alone__is_finite(name: str) -> None:
    assert torch.isfinite(loss_of(name, random_output(name), torch.zeros(2, 48, 64, dtype=torch.int64)))


def eight_images(name: str) -> tuple[SegmentationOutput, Tensor]:
    """Draw eight unequal images: ignored pixels in some, one without a known pixel, one of background alone."""
    mask = torch.cat([blobs_for(name), blobs_for(name).flip(1), blobs_for(name).flip(2), blobs_for(name).roll(7, 2)])
    mask[1, :20] = IGNORE_INDEX
    mask[2, :, 5:30] = IGNORE_INDEX
    mask[3] = 0
    mask[4] = IGNORE_INDEX
    drawn = [random_output(name) for _ in range(4)]
    classes = [each.class_logits for each in drawn if each.class_logits is not None]
    mask_logits = torch.cat([each.mask_logits for each in drawn])
    return SegmentationOutput(mask_logits, torch.cat(classes) if classes else None), mask


def some_images(output: SegmentationOutput, rows: list[int]) -> SegmentationOutput:
    """Return the output for some of its images."""
    class_logits = None if output.class_logits is None else output.class_logits[rows]
    return SegmentationOutput(output.mask_logits[rows], class_logits)


def loss_and_gradient(name: str, pieces: int, seeds: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Accumulate loss and gradient of the eight images over so many equal pieces, as Lightning does."""
    torch.manual_seed(0)
    output, mask = eight_images(name)
    leaves = [each.requires_grad_() for each in (output.mask_logits, output.class_logits) if each is not None]
    total = torch.zeros(())
    for chunk in torch.arange(8).chunk(pieces):
        rows = chunk.tolist()
        loss = CRITERIA[name](some_images(output, rows), mask[rows], [seeds[row] for row in rows]) / pieces
        loss.backward()
        total += loss.detach()
    return total, [each.grad for each in leaves if each.grad is not None]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_criterion__batch_in_equal_pieces__has_the_loss_and_gradient_of_the_whole(pieces: int, name: str) -> None:
    seeds = list(range(50, 58))
    whole, gradients = loss_and_gradient(name, 1, seeds)
    loss, accumulated = loss_and_gradient(name, pieces, seeds)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-7)
    assert len(accumulated) == len(gradients) > 0
    for mine, theirs in zip(accumulated, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_set_criterion__seeds_of_the_images__fix_its_points_and_leave_torch_alone() -> None:
    seeds = list(range(8))
    before = torch.get_rng_state()
    output, mask = eight_images("set_criterion")
    torch.set_rng_state(before)
    first = CRITERIA["set_criterion"](output, mask, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(CRITERIA["set_criterion"](output, mask, seeds), first)
    assert not torch.equal(CRITERIA["set_criterion"](output, mask, seeds[::-1]), first)
    assert not torch.equal(CRITERIA["set_criterion"](output, mask), CRITERIA["set_criterion"](output, mask))


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion__image_without_a_known_pixel__counts_as_one_of_loss_0(name: str) -> None:
    output, mask = eight_images(name)
    assert CRITERIA[name](some_images(output, [4]), mask[4:5]) == 0
    seeds = list(range(8))
    others = [row for row in range(8) if row != 4]
    loss = CRITERIA[name](some_images(output, others), mask[others], [seeds[row] for row in others])
    torch.testing.assert_close(CRITERIA[name](output, mask, seeds), 7 / 8 * loss)


def test_set_criterion__queries_in_another_order__give_the_same_loss() -> None:
    mask = blobs()
    output = confident_output("set_criterion", mask)
    output = SegmentationOutput(
        0.1 * output.mask_logits + torch.randn_like(output.mask_logits),
        0.1 * output.class_logits if output.class_logits is not None else None,
    )
    assert output.class_logits is not None
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = SegmentationOutput(output.mask_logits[:, order], output.class_logits[:, order])
    before, after = loss_of("set_criterion", output, mask), loss_of("set_criterion", permuted, mask)
    # The sampled points go with the order of the queries: equal up to their noise.
    torch.testing.assert_close(after, before, rtol=0.02, atol=0)
    # A head that gives the masks to other classes is far off that.
    mixed = SegmentationOutput(output.mask_logits[:, order], output.class_logits)
    assert loss_of("set_criterion", mixed, mask) > 1.2 * before


def test_set_criterion__without_class_logits__says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        set_criterion(SegmentationOutput(torch.zeros(2, 3, 48, 64), None), blobs())


def test_uncertain_points__mostly_known_image__are_drawn_at_small_logits_of_known_pixels() -> None:
    logits = torch.full((2, 1, 8, 16), 9.0)
    logits[..., :4] = 0.1  # uncertain, known
    logits[..., 12:] = 0.0  # most uncertain, unknown
    known = torch.ones(2, 1, 8, 16)
    known[..., 12:] = 0
    place = uncertain_points(logits, known, points=400, oversample=8.0, importance=0.75)
    assert place.shape == (2, 400, 2)
    assert ((place >= 0) & (place <= 1)).all()
    assert (place[:, :300, 0] < 0.27).all(), "the chosen three quarters lie in the first quarter of the columns"
    assert (place[:, 300:, 0] > 0.5).any(), "the rest lies anywhere"


@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (4, 4), (2, 4)])
def test_hungarian_match__random_costs__finds_what_brute_force_finds(queries: int, targets: int) -> None:
    for _ in range(5):
        cost = torch.randn(queries, targets, dtype=torch.float64)
        query, target = hungarian_match(cost)
        assert len(set(query.tolist())) == len(set(target.tolist())) == min(queries, targets)
        tall = cost if queries >= targets else cost.t()
        choices = itertools.permutations(range(len(tall)), tall.shape[1])
        best = min(sum(float(tall[row, column]) for column, row in enumerate(chosen)) for chosen in choices)
        assert float(cost[query, target].sum()) == pytest.approx(best, abs=1e-12)


def test_hungarian_match__costs_with_gradient_in_half_precision__gives_whole_numbers() -> None:
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    query, target = hungarian_match(cost)
    assert query.dtype == target.dtype == torch.int64
    assert target.tolist() == [0, 1]
