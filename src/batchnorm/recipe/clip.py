"""Adaptive gradient clipping: no unit's gradient is longer than a share of the unit itself.

Source: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization",
https://arxiv.org/abs/2102.06171 (2021), Section 4; there the least length of a unit is 1e-3.
Shapes: U units of a weight: its first dimension; E elements of all vectors one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1.0  # length that a shorter unit counts as: about that of a row at initialization; what begins at 0 can move
_TINY = 1e-30


def clipped(params: Sequence[Tensor], grads: Sequence[Tensor], share: float) -> list[Tensor]:
    r"""The gradients, each unit's cut to a share of the unit's length.

        G_u <- G_u min(1, share max(|W_u|, 1) / |G_u|)

    A unit u is what one output has: a row of a weight's matrix (its first dimension by all others), one element of a
    vector or a number (gamma, beta, a bias).

    Args:
        params: of any shapes.
        grads: of the same, dense. They stay as they are.
        share: above 0.

    Returns:
        A gradient for each; the very bits of the one given where nothing is cut.

    Example:
        >>> weight, gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 9.0], [0.0, 0.01]])
        >>> clipped([weight], [gradient], 0.02)[0]
        tensor([[0.0000, 0.1000],
                [0.0000, 0.0100]])

    Source: Brock et al. 2021, equation 3.
    """
    found = list(grads)
    vectors: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, p in enumerate(params):
        if p.ndim == 1:
            vectors.setdefault((p.dtype, p.device), []).append(i)
        else:
            found[i] = _rows(p, grads[i], share)
    for some in vectors.values():  # small and many: as one
        limit_E = torch.cat([params[i] for i in some]).abs_().clamp_(min=LEAST).mul_(share)
        G_E = torch.cat([grads[i] for i in some]).clamp_(-limit_E, limit_E)
        for i, part in zip(some, G_E.split([len(params[i]) for i in some]), strict=True):
            found[i] = part
    return found


def _rows(p: Tensor, gradient: Tensor, share: float) -> Tensor:
    others, wide = tuple(range(1, p.ndim)), torch.promote_types(p.dtype, torch.float32)
    limit_U = torch.linalg.vector_norm(p, dim=others, keepdim=True, dtype=wide).clamp_(min=LEAST).mul_(share)
    length_U = torch.linalg.vector_norm(gradient, dim=others, keepdim=True, dtype=wide).clamp_(min=_TINY)
    return gradient * limit_U.div_(length_U).clamp_(max=1).to(p.dtype)
