"""Bipartite matching of queries to targets, on top of SciPy's assignment solver."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def hungarian_match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Match queries to targets one to one at the lowest total cost.

    Args:
        cost: ``(Q, T)``, finite; at least as many queries as targets leaves no target out.

    Returns:
        Indices of the matched queries and of their targets, both ``(min(Q, T),)`` on the cost's device.

    >>> hungarian_match(torch.tensor([[0.0, 9.0], [1.0, 0.5], [0.2, 0.1]]))
    (tensor([0, 2]), tensor([0, 1]))
    """
    queries, targets = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return (
        torch.as_tensor(queries, device=cost.device, dtype=torch.int64),
        torch.as_tensor(targets, device=cost.device, dtype=torch.int64),
    )
