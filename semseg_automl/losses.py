"""Losses: pure functions of logits and masks, and `CRITERIA`, those a configuration can name.

A criterion takes the model's output and the batch's mask and resizes the logits to the mask itself. Ignored pixels
(`IGNORE_INDEX`) never count. Auxiliary losses of layers are not here: the model sums them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from semseg_automl.matching import hungarian_match
from semseg_automl.models.mask_decoder import SegmentationOutput
from semseg_automl.task import IGNORE_INDEX


@dataclass(frozen=True)
class Criterion:
    """A training loss of the model's output and the batch's mask ``(B, H, W)``.

    Attributes:
        head: the mask decoder it trains: ``binary``, ``class_tokens`` or ``queries``.
        function: computes the loss, a scalar.
    """

    head: str
    function: Callable[[SegmentationOutput, Tensor], Tensor]

    def __call__(self, output: SegmentationOutput, mask: Tensor) -> Tensor:
        """Compute the loss."""
        return self.function(output, mask)


def structure_loss(logits: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross entropy plus boundary-weighted IoU loss, as published (PraNet, Fan et al., 2020, section 2.3).

    The published code passes ``reduce="none"`` to the cross entropy, which torch reads as "reduce": its weights cancel
    and the plain mean is left. Only the IoU part is weighted, and that is what the published scores were made with.

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
    if weighted_bce:
        bce_per_image = (weight * bce).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)
    else:
        bce_per_image = ((valid * bce).sum() / valid.sum().clamp(min=1)).expand(len(target))
    probability = logits.sigmoid()
    intersection = (probability * target * weight).sum(dim=(1, 2))
    union = ((probability + target) * weight).sum(dim=(1, 2)) - intersection
    return (bce_per_image + 1 - (intersection + 1) / (union + 1)).mean()


def balanced_bce(logits: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross entropy with both classes weighing the same over the batch (shadow detection, SBU).

    ``pos / (pos + neg) * BCE(pos_weight=neg / pos)``; finite on a batch without foreground, where it is the plain
    mean over the background scaled by what one foreground pixel would give.

    Args:
        logits: ``(B, H, W)``.
        mask: ``(B, H, W)`` of 0 and 1.
        valid: ``(B, H, W)`` bool, pixels that count; None for all.
    """
    logits, target = logits.float(), mask.float()
    valid = torch.ones_like(target) if valid is None else valid.float()
    positive = (target * valid).sum().clamp(min=1)
    total = valid.sum().clamp(min=2)
    negative = (total - positive).clamp(min=1)
    weight = torch.where(target > 0, negative, positive) / total
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * bce * valid).sum() / total


def soft_dice_loss(probability: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return one minus the Dice overlap per class, over the batch, averaged over classes that occur in it.

    Args:
        probability: ``(B, K, H, W)`` in 0..1.
        target: ``(B, K, H, W)`` one-hot.
        valid: ``(B, 1, H, W)``, 1 where the pixel counts.
    """
    dims = (0, 2, 3)
    overlap = (probability * target * valid).sum(dims)
    size = ((probability + target) * valid).sum(dims)
    present = (target * valid).sum(dims) > 0
    dice = 1 - (2 * overlap + 1) / (size + 1)
    return (dice * present).sum() / present.sum().clamp(min=1)


def ce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy plus soft Dice over classes, for one map of logits per class.

    Args:
        logits: ``(B, K, H, W)``.
        mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown.
    """
    logits = logits.float()
    valid = mask != IGNORE_INDEX
    known = torch.where(valid, mask, 0)
    cross_entropy = F.cross_entropy(logits, known, reduction="none")
    cross_entropy = (cross_entropy * valid).sum() / valid.sum().clamp(min=1)
    one_hot = F.one_hot(known, logits.shape[1]).permute(0, 3, 1, 2).float()
    return cross_entropy + soft_dice_loss(logits.softmax(dim=1), one_hot, valid[:, None].float())


def set_criterion(
    output: SegmentationOutput,
    mask: Tensor,
    *,
    points: int = 12_544,
    oversample: float = 3.0,
    importance: float = 0.75,
    no_object: float = 0.1,
) -> Tensor:
    """Match queries to the classes of each image and train them to it (Mask2Former, Cheng et al., 2022, section 3).

    Matching costs: class 1, mask 5, Dice 5. Loss weights: class 2, mask 5, Dice 5, "no object" 0.1. Mask terms are
    computed on sampled points: candidates are drawn `oversample` times over and the most uncertain share kept.

    Args:
        output: with class logits.
        mask: ``(B, H, W)`` int64 class indices, `IGNORE_INDEX` where unknown; such points never count.
        points: sampled points per image.
        oversample: candidates per kept point.
        importance: share of points chosen by uncertainty.
        no_object: weight of unmatched queries in the class loss.
    """
    class_logits = output.class_logits
    if class_logits is None:
        raise ValueError("set_criterion needs a mask decoder with a classification layer (num_classes given).")
    batch, queries, entries = class_logits.shape
    class_target = torch.full((batch, queries), entries - 1, device=mask.device)
    matched_logits, matched_targets, matched_valid = [], [], []
    for i in range(batch):
        present = torch.unique(mask[i][mask[i] != IGNORE_INDEX])
        if not len(present):
            continue
        one_hot = (mask[i][None] == present[:, None, None]).float()
        known = (mask[i] != IGNORE_INDEX).float()
        everywhere = torch.rand(1, points, 2, device=mask.device)
        with torch.no_grad():
            cost = _matching_cost(
                sample_points(output.mask_logits[i][None].float(), everywhere)[0],
                sample_points(one_hot[None], everywhere, mode="nearest")[0],
                sample_points(known[None, None], everywhere, mode="nearest")[0, 0],
                class_logits[i].float().softmax(-1)[:, present],
            )
            query, which = hungarian_match(cost)
        class_target[i, query] = present[which]
        logits = output.mask_logits[i, query].float()[:, None]
        known_maps = known.expand(len(which), 1, -1, -1)
        place = uncertain_points(logits.detach(), known_maps, points, oversample, importance)
        matched_logits.append(sample_points(logits, place)[:, 0])
        matched_targets.append(sample_points(one_hot[which][:, None], place, mode="nearest")[:, 0])
        matched_valid.append(sample_points(known_maps, place, mode="nearest")[:, 0])
    weight = torch.ones(entries, device=mask.device)
    weight[-1] = no_object
    loss = 2 * F.cross_entropy(class_logits.float().flatten(0, 1), class_target.flatten(), weight=weight)
    if matched_logits:
        logits, target, valid = torch.cat(matched_logits), torch.cat(matched_targets), torch.cat(matched_valid)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = loss + 5 * ((bce * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
        probability = logits.sigmoid()
        overlap, size = (probability * target * valid).sum(1), ((probability + target) * valid).sum(1)
        loss = loss + 5 * (1 - (2 * overlap + 1) / (size + 1)).mean()
    return loss


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


def uncertain_points(logits: Tensor, known: Tensor, points: int, oversample: float, importance: float) -> Tensor:
    """Draw points ``(B, points, 2)`` where ``logits (B, 1, H, W)`` are closest to zero, the rest uniformly.

    PointRend (Kirillov et al., 2020, section 3.1). Where ``known (B, 1, H, W)`` is 0 nothing teaches the logits and
    they stay close to zero, so such points are taken last.
    """
    batch = len(logits)
    chosen = int(importance * points)
    candidates = torch.rand(batch, int(oversample * points), 2, device=logits.device)
    doubt = -sample_points(logits, candidates)[:, 0].abs()
    doubt = doubt.masked_fill(sample_points(known, candidates, mode="nearest")[:, 0] == 0, -torch.inf)
    best = doubt.topk(chosen, dim=1).indices
    kept = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([kept, torch.rand(batch, points - chosen, 2, device=logits.device)], dim=1)


def _binary(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Criterion:
    """Turn a loss over ``(B, H, W)`` foreground logits into a criterion."""

    def criterion(output: SegmentationOutput, mask: Tensor) -> Tensor:
        logits = _resize_to(output.mask_logits, mask)[:, 0]
        valid = mask != IGNORE_INDEX
        return function(logits, torch.where(valid, mask, 0), valid)

    return Criterion("binary", criterion)


def _resize_to(logits: Tensor, mask: Tensor) -> Tensor:
    return F.interpolate(logits.float(), size=mask.shape[-2:], mode="bilinear", align_corners=False)


def _ce_dice_criterion(output: SegmentationOutput, mask: Tensor) -> Tensor:
    return ce_dice(_resize_to(output.mask_logits, mask), mask)


CRITERIA: dict[str, Criterion] = {
    "structure": _binary(structure_loss),
    "structure_weighted": _binary(structure_loss_weighted),
    "balanced_bce": _binary(balanced_bce),
    "ce_dice": Criterion("class_tokens", _ce_dice_criterion),
    "set_criterion": Criterion("queries", set_criterion),
}
