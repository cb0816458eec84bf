"""Losses: pure functions of logits and masks, and `CRITERIA`, those a configuration can name.

A criterion takes the model's output and the batch's mask and resizes the logits to the mask itself. Ignored pixels
(`IGNORE_INDEX`) never count. Each loss is a mean over images, every image normalised by itself and one without a
labelled pixel counting 0: a batch has the same loss and gradient in one piece and in equal ones, whatever the
micro-batch. Auxiliary losses of layers are not here: the model sums them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl.matching import hungarian_match
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.task import IGNORE_INDEX

Seeds = Sequence[int] | None
"""One for each image of a batch."""


@dataclass(frozen=True)
class Criterion:
    """A training loss of the model's output and the batch's mask ``(B, H, W)``.

    Attributes:
        head: the mask decoder it trains: ``binary``, ``class_tokens`` or ``queries``.
        function: computes the loss, a scalar, from output, mask and seeds.
    """

    head: str
    function: Callable[[SegmentationOutput, Tensor, Seeds], Tensor]

    def __call__(self, output: SegmentationOutput, mask: Tensor, seeds: Seeds = None) -> Tensor:
        """Compute the loss.

        Args:
            output: of the network.
            mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown.
            seeds: one per image, of what the criterion draws by chance; None draws from torch's generator, and then
                the draws depend on which images come together.
        """
        return self.function(output, mask, seeds)


def structure_loss(logits: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross entropy plus boundary-weighted IoU loss, as published (PraNet, Fan et al., 2020, section 2.3).

    The published code passes ``reduce="none"`` to the cross entropy, which torch reads as "reduce": its weights cancel
    and the plain mean is left. Only the IoU part is weighted, and that is what the published scores were made with.
    With ignored pixels, which the published loss does not know, that mean is one of each image's own pixels.

    Args:
        logits: ``(B, H, W)``.
        mask: ``(B, H, W)`` of 0 and 1, any number type.
        valid: ``(B, H, W)`` bool, pixels that count; None for all.
    """
    return _structure(logits, mask, valid, weighted_bce=False)


def structure_loss_weighted(logits: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """`structure_loss` as its authors meant it: the cross entropy carries the boundary weights too."""
    return _structure(logits, mask, valid, weighted_bce=True)


def _structure(logits: Tensor, mask: Tensor, valid: Tensor | None, *, weighted_bce: bool) -> Tensor:
    logits, target = logits.float(), mask.float()
    # The 31 x 31 mean as two passes of 31: the same sums, and no longer the dearest step of training on a CPU.
    mean = F.avg_pool2d(target[:, None], (31, 1), stride=1, padding=(15, 0))
    mean = F.avg_pool2d(mean, (1, 31), stride=1, padding=(0, 15))[:, 0]
    weight = 1 + 5 * (mean - target).abs()
    valid = torch.ones_like(target) if valid is None else valid.float()
    weight = weight * valid
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce_weight = weight if weighted_bce else valid
    bce_per_image = (bce_weight * bce).sum(dim=(1, 2)) / bce_weight.sum(dim=(1, 2)).clamp(min=1)
    probability = logits.sigmoid()
    intersection = (probability * target * weight).sum(dim=(1, 2))
    union = ((probability + target) * weight).sum(dim=(1, 2)) - intersection
    return (bce_per_image + 1 - (intersection + 1) / (union + 1)).mean()


def balanced_bce(logits: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross entropy with both classes weighing the same in each image (shadow detection, SBU).

    ``pos / (pos + neg) * BCE(pos_weight=neg / pos)``, counted over one image as in HED (Xie and Tu, 2015, section 3.1)
    and as in the published runs, whose micro-batches held one. Finite on an image without foreground, where it is the
    plain mean over the background scaled by what one foreground pixel would give.

    Args:
        logits: ``(B, H, W)``.
        mask: ``(B, H, W)`` of 0 and 1.
        valid: ``(B, H, W)`` bool, pixels that count; None for all.
    """
    logits, target = logits.float(), mask.float()
    valid = torch.ones_like(target) if valid is None else valid.float()
    positive = (target * valid).sum(dim=(1, 2), keepdim=True).clamp(min=1)
    total = valid.sum(dim=(1, 2), keepdim=True).clamp(min=2)
    negative = (total - positive).clamp(min=1)
    weight = torch.where(target > 0, negative, positive) / total
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * bce * valid / total).sum(dim=(1, 2)).mean()


def ce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy plus soft Dice over classes, for one map of logits per class.

    Args:
        logits: ``(B, K, H, W)``.
        mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown.
    """
    return _ce_dice(logits, mask, balanced=False)


def balanced_ce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """`ce_dice` whose cross entropy weighs the classes of an image by the inverse root of their pixels in it.

    The smoothed inverse frequency that Cui et al., "Class-Balanced Loss", 2019, section 2, trace through earlier work:
    a class of a hundredth of the pixels counts as a tenth of the image, not as a hundredth, nor as much as all others.

    Args:
        logits: ``(B, K, H, W)``.
        mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown.
    """
    return _ce_dice(logits, mask, balanced=True)


def _ce_dice(logits: Tensor, mask: Tensor, *, balanced: bool) -> Tensor:
    logits = logits.float()
    valid = mask != IGNORE_INDEX
    known = torch.where(valid, mask, 0)
    target = F.one_hot(known, logits.shape[1]).permute(0, 3, 1, 2).float() * valid[:, None]
    pixels = target.sum(dim=(2, 3))
    per_class = pixels.clamp(min=1).rsqrt() if balanced else torch.ones_like(pixels)
    weight = (target * per_class[:, :, None, None]).sum(1)
    cross_entropy = F.cross_entropy(logits, known, reduction="none")
    # Of an image without a labelled pixel both sums are 0; no other sum is below one pixel's weight.
    total = weight.sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    cross_entropy = (cross_entropy * weight).sum(dim=(1, 2)) / total
    probability = logits.softmax(dim=1) * valid[:, None]
    dice = 1 - (2 * (probability * target).sum(dim=(2, 3)) + 1) / ((probability + target).sum(dim=(2, 3)) + 1)
    present = pixels > 0
    return (cross_entropy + (dice * present).sum(1) / present.sum(1).clamp(min=1)).mean()


def set_criterion(
    output: SegmentationOutput,
    mask: Tensor,
    seeds: Seeds = None,
    *,
    points: int = 12_544,
    oversample: float = 3.0,
    importance: float = 0.75,
    no_object: float = 0.1,
) -> Tensor:
    """Match queries to the classes of each image and train them to it (Mask2Former, Cheng et al., 2022, section 3).

    Matching costs: class 1, mask 5, Dice 5. Loss weights: class 2, mask 5, Dice 5, "no object" 0.1. Mask terms are
    computed on sampled points: candidates are drawn `oversample` times over and the most uncertain share kept. The
    paper divides by what the whole batch holds; here each image divides by its own.

    Args:
        output: with class logits.
        mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown; such points never count.
        seeds: one per image, of its points; None draws from torch's generator.
        points: sampled points per image.
        oversample: candidates per kept point.
        importance: share of points chosen by uncertainty.
        no_object: weight of unmatched queries in the class loss.
    """
    class_logits = output.class_logits
    if class_logits is None:
        raise ValueError("set_criterion needs a mask decoder with a classification layer (num_classes given).")
    losses = []
    for i in range(len(class_logits)):
        if not (mask[i] != IGNORE_INDEX).any():
            losses.append(class_logits[i, :0].float().sum())  # 0, with a gradient of 0
            continue
        generator = None if seeds is None else torch.Generator(mask.device).manual_seed(seeds[i])
        draws = _Draws(points, oversample, importance, generator)
        losses.append(_image_set_loss(output.mask_logits[i], class_logits[i].float(), mask[i], draws, no_object))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class _Draws:
    """How the points of an image are drawn."""

    points: int
    oversample: float
    importance: float
    generator: torch.Generator | None


def _image_set_loss(
    mask_logits: Tensor, class_logits: Tensor, mask: Tensor, draws: _Draws, no_object: float
) -> Tensor:
    """Return the loss of one image: ``mask_logits (Q, h, w)``, ``class_logits (Q, K + 1)``, ``mask (H, W)``."""
    present = torch.unique(mask[mask != IGNORE_INDEX])
    one_hot = (mask[None] == present[:, None, None]).float()
    known = (mask != IGNORE_INDEX).float()
    everywhere = torch.rand(1, draws.points, 2, device=mask.device, generator=draws.generator)
    with torch.no_grad():
        cost = _matching_cost(
            sample_points(mask_logits[None].float(), everywhere)[0],
            sample_points(one_hot[None], everywhere, mode="nearest")[0],
            sample_points(known[None, None], everywhere, mode="nearest")[0, 0],
            class_logits.softmax(-1)[:, present],
        )
        query, which = hungarian_match(cost)
    queries, entries = class_logits.shape
    class_target = torch.full((queries,), entries - 1, device=mask.device)
    class_target[query] = present[which]
    weight = torch.ones(entries, device=mask.device)
    weight[-1] = no_object
    class_loss = F.cross_entropy(class_logits, class_target, weight=weight)
    logits = mask_logits[query].float()[:, None]
    known_maps = known.expand(len(which), 1, -1, -1)
    place = uncertain_points(
        logits.detach(), known_maps, draws.points, draws.oversample, draws.importance, draws.generator
    )
    logits = sample_points(logits, place)[:, 0]
    target = sample_points(one_hot[which][:, None], place, mode="nearest")[:, 0]
    valid = sample_points(known_maps, place, mode="nearest")[:, 0]
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    mask_loss = ((bce * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
    probability = logits.sigmoid()
    overlap, size = (probability * target * valid).sum(1), ((probability + target) * valid).sum(1)
    return 2 * class_loss + 5 * mask_loss + 5 * (1 - (2 * overlap + 1) / (size + 1)).mean()


def _matching_cost(logits: Tensor, target: Tensor, valid: Tensor, class_probability: Tensor) -> Tensor:
    """Return the cost ``(Q, T)`` of giving target t to query q, from logits ``(Q, P)`` and targets ``(T, P)``."""
    target = target * valid
    positive = F.softplus(-logits) @ target.t()
    negative = F.softplus(logits) @ (valid - target).t()
    probability = logits.sigmoid() * valid
    dice = 1 - (2 * probability @ target.t() + 1) / (probability.sum(1)[:, None] + target.sum(1)[None] + 1)
    return 5 * (positive + negative) / valid.sum().clamp(min=1) + 5 * dice - class_probability


def sample_points(maps: Tensor, place: Tensor, mode: str = "bilinear") -> Tensor:
    """Read ``maps (B, C, H, W)`` at points ``(B or 1, P, 2)`` of x, y in 0..1; returns ``(B, C, P)``."""
    place = place.expand(len(maps), -1, -1)
    return F.grid_sample(maps, 2 * place[:, :, None] - 1, mode=mode, align_corners=False)[..., 0]


def uncertain_points(
    logits: Tensor,
    known: Tensor,
    points: int,
    oversample: float,
    importance: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw points ``(B, points, 2)`` where ``logits (B, 1, H, W)`` are closest to zero, the rest uniformly.

    PointRend (Kirillov et al., 2020, section 3.1). Where ``known (B, 1, H, W)`` is 0 nothing teaches the logits and
    they stay close to zero, so such points are taken last.
    """
    batch = len(logits)
    chosen = int(importance * points)
    candidates = torch.rand(batch, int(oversample * points), 2, device=logits.device, generator=generator)
    doubt = -sample_points(logits, candidates)[:, 0].abs()
    doubt = doubt.masked_fill(sample_points(known, candidates, mode="nearest")[:, 0] == 0, -torch.inf)
    best = doubt.topk(chosen, dim=1).indices
    kept = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(batch, points - chosen, 2, device=logits.device, generator=generator)
    return torch.cat([kept, anywhere], dim=1)


def _binary(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Criterion:
    """Turn a loss over ``(B, H, W)`` foreground logits into a criterion."""

    def criterion(output: SegmentationOutput, mask: Tensor, _: Seeds) -> Tensor:
        logits = _resize_to(output.mask_logits, mask)[:, 0]
        valid = mask != IGNORE_INDEX
        return function(logits, torch.where(valid, mask, 0), valid)

    return Criterion("binary", criterion)


def _resize_to(logits: Tensor, mask: Tensor) -> Tensor:
    return F.interpolate(logits.float(), size=mask.shape[-2:], mode="bilinear", align_corners=False)


def _classes(function: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
    """Turn a loss over ``(B, K, H, W)`` logits of classes into a criterion."""

    def criterion(output: SegmentationOutput, mask: Tensor, _: Seeds) -> Tensor:
        return function(_resize_to(output.mask_logits, mask), mask)

    return Criterion("class_tokens", criterion)


CRITERIA: dict[str, Criterion] = {
    "structure": _binary(structure_loss),
    "structure_weighted": _binary(structure_loss_weighted),
    "balanced_bce": _binary(balanced_bce),
    "ce_dice": _classes(ce_dice),
    "balanced_ce_dice": _classes(balanced_ce_dice),
    "set_criterion": Criterion("queries", set_criterion),
}
