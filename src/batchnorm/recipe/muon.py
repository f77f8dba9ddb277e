"""Muon for the weights that batch normalization follows, SGD for all other parameters: one optimizer.

Source: Jordan et al., "Muon", https://kellerjordan.github.io/posts/muon/ (2024); that the norm of the weights is free:
Ioffe & Szegedy 2015, Section 3.3.
Shapes: W weights of one shape, P their parameters; K matrices, M x N of them, M the smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from batchnorm.recipe.clip import clipped

Quintic = tuple[float, float, float]
STEP: Quintic = (3.4445, -4.7750, 2.0315)  # steepest at 0; singular values end near 1, not at 1
STEPS = (STEP,) * 5
_TINY = 1e-18  # its square is a number in float32: what has a smaller norm counts as no gradient


def orthogonalized(x: Tensor, steps: Sequence[Quintic] = STEPS) -> Tensor:
    r"""Each matrix with its singular values near 1, in the same directions, by Newton-Schulz iterations.

        X = U S V^T / |S|;    X <- a X + (b X X^T + c (X X^T)^2) X, once per step;    U S' V^T with S' near 1

    Args:
        x: (..., M, N); on CUDA multiplied in bfloat16, if it is not in float64.
        steps: (a, b, c) of each. By default singular values of at least 1% of their norm |S| end within 0.68 and 1.14,
            smaller ones below 1.21. ``[(15/8, -5/4, 3/8)] * 20`` goes to 1.

    Returns:
        (..., M, N), in the dtype of ``x``. Zeros stay zeros.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
        >>> U, _, V = torch.linalg.svd(x)
        >>> torch.allclose(orthogonalized(x, [(15 / 8, -5 / 4, 3 / 8)] * 20), U @ V, atol=1e-5)
        True

    Source: Jordan et al. 2024.
    """
    wide = x.shape[-2] <= x.shape[-1]
    small = x.is_cuda and x.dtype != torch.float64
    X_KMN = (x if wide else x.mT).reshape(-1, *sorted(x.shape[-2:]))
    X_KMN = X_KMN / torch.linalg.vector_norm(X_KMN, dim=(1, 2), keepdim=True).clamp(min=_TINY)
    # Entries whose fourth power is no normal number count as zero: products of subnormal ones take 40 times as long on
    # a CPU. Dead units have them: their momentum falls by 0.9 a step, and is there after 200.
    least = torch.finfo(X_KMN.dtype).tiny ** 0.25
    X_KMN = X_KMN.bfloat16() if small else nn.functional.hardshrink(X_KMN, least)
    for a, b, c in steps:
        G_KMM = torch.bmm(X_KMN, X_KMN.mT)
        G_KMM = torch.baddbmm(G_KMM, G_KMM, G_KMM, beta=b, alpha=c)
        X_KMN = torch.baddbmm(X_KMN, G_KMM, X_KMN, beta=a)
    return (X_KMN if wide else X_KMN.mT).to(x.dtype).reshape(x.shape)


class Muon(Optimizer):
    r"""Orthogonalized momentum for weights whose norm is free, SGD with Nesterov's momentum for the rest.

        V <- momentum V + gradient,    D = orthogonalized(gradient + momentum V)
        W <- W - lr |W_0| D / |D|,    W <- W |W_0| / |W|

    Batch normalization behind a layer makes the norm of its weight do nothing: BN((aW)u) = BN(Wu). So a step is a share
    ``lr`` of the norm |W_0| that the weight had at its first step, and the norm is put back: the learning rate says
    how far a step turns the weight (by arcsin(lr) at most), whatever the scale of weights and gradients.

    The matrix of a weight is its first dimension by all others: outputs x inputs. A convolution maps a patch
    to a place's outputs; a transposed one a place's inputs to a patch, and is inputs x outputs. With groups
    the map is block diagonal, and its orthogonal factor that of each block: ``blocks``.

    The rest has SGD of clipped gradients, a unit u (a row of a matrix, an element of gamma, beta or a bias) at a time:

        G_u <- G_u min(1, clip max(|W_u|, 1) / |G_u|)

    A rate is stable up to about 2 over the loss's curvature. Above that a loss with bounded gradients (cross-entropy)
    swings; of a squared error they grow with the error, and training diverges. Clipped they are bounded for any loss
    and any scale of the targets: what is too steep swings by a share of the weight that goes to 0 with the rate.

    Args:
        params: parameters, (name, parameter) or groups of them, as torch's optimizers take them. A group says by
            ``orthogonalize=False`` that it is SGD's, by ``keep_norm=False`` that norms are not put back (in a network
            without batch normalization), by ``blocks=[1, 4, ...]`` how many blocks each weight has.
        lr: of groups that are orthogonalized: the share of a weight's norm that a step is long.
        sgd_lr: ``lr`` of the other groups.
        momentum: of both, Nesterov's.
        weight_decay: of the other groups, times the parameter, added to its gradient.
        clip: of the other groups: a unit's gradient is at most this share of the unit; 0: not clipped.

    Raises:
        ValueError: a value that is negative; in a group that is orthogonalized, a parameter of fewer than two
            dimensions, weight decay, clip, or blocks that do not divide it; at the first step, a weight that is zero.
        RuntimeError: complex or sharded parameters; sparse gradients.

    Parameters without a gradient are left alone. State is a momentum per parameter and a norm per weight, in the
    parameter's dtype. In DistributedDataParallel all ranks compute the same.

    Example:
        >>> layer, norm = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)
        >>> others = {"params": norm.parameters(), "orthogonalize": False}
        >>> optimizer = Muon([{"params": layer.parameters()}, others])
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.03, 0.5]
        >>> before = layer.weight.norm().item()
        >>> norm(layer(torch.randn(4, 3, 5, 5))).relu().sum().backward()
        >>> optimizer.step()
        >>> abs(layer.weight.norm().item() / before - 1) < 1e-6
        True

    Source: Jordan et al. 2024; Ioffe & Szegedy 2015, Section 3.3; of ``clip``: Brock et al. 2021.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.03,
        momentum: float = 0.9,
        *,
        sgd_lr: float = 0.5,
        weight_decay: float = 0.0,
        clip: float = 0.02,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "orthogonalize": True}
        super().__init__(params, own | {"sgd_lr": sgd_lr, "weight_decay": weight_decay, "clip": clip})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's; what was saved when gradients were not clipped goes on without."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("clip", 0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; checks the group.

        Raises:
            ValueError: see the class.
            RuntimeError: complex or sharded parameters.
        """
        orthogonalize = param_group.get("orthogonalize", True)
        own = {"weight_decay": 0.0, "clip": 0.0} if orthogonalize else {"lr": self.defaults["sgd_lr"]}
        super().add_param_group(own | param_group)
        self.param_groups[-1].pop("sgd_lr")
        try:
            _check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss that ``closure``, if there is one, computes again.

        Raises:
            ValueError: a weight that is to be orthogonalized is zero, or not finite, at its first step.
            RuntimeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._begin()
        for group in self.param_groups:
            if group["orthogonalize"]:
                _step_by_shape(group, self.state)
            else:
                _step_by_sgd(group, self.state)
        return loss

    def _begin(self) -> None:
        """State of the parameters that have a gradient for the first time. Looks at all before anything changes."""
        new = []
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(f"Muon does not support sparse gradients, and {_name(group, i)} has one.")
                if not self.state.get(p):
                    new.append((group, i, p))
        norms = {id(p): _norm(p) for group, _, p in new if group["orthogonalize"]}
        for group, i, p in new:
            if id(p) in norms and not 0 < norms[id(p)] < torch.inf:
                raise ValueError(
                    f"Muon keeps the norm of a weight, and that of {_name(group, i)} is {norms[id(p)]:g}: initialize "
                    "it otherwise, or put it in a group with orthogonalize=False."
                )
        for _, _, p in new:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if id(p) in norms:
                self.state[p]["norm"] = norms[id(p)]


def _norm(p: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p, dtype=_wide(p)).to(p.dtype)


def _norms(x_WP: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_WP, dim=1, keepdim=True)


def _wide(p: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(p.dtype, torch.float32)


def _name(group: dict[str, Any], i: int) -> str:
    return str(group["param_names"][i]) if "param_names" in group else f"one of shape {tuple(group['params'][i].shape)}"


def _check(group: dict[str, Any]) -> None:
    for key in ("lr", "momentum", "weight_decay", "clip"):
        if not group[key] >= 0:
            raise ValueError(f"Muon: {key} must be at least 0 (got {group[key]}).")
    if any(p.is_complex() for p in group["params"]):
        raise RuntimeError("Muon does not support complex parameters.")
    if any(hasattr(p, "placements") for p in group["params"]):  # DTensor
        raise RuntimeError("Muon does not support parameters that are sharded (fully_shard): it needs whole matrices.")
    if not group["orthogonalize"]:
        return
    group.setdefault("keep_norm", True)
    blocks = group.setdefault("blocks", [1] * len(group["params"]))
    if group["weight_decay"]:
        raise ValueError(
            "Muon: weight decay changes the norm of a weight, which is put back: it is for groups with "
            f"orthogonalize=False (got {group['weight_decay']})."
        )
    if group["clip"]:
        raise ValueError(
            "Muon: the gradients of weights that are orthogonalized are not clipped, as their lengths do nothing: clip "
            f"is for groups with orthogonalize=False (got {group['clip']})."
        )
    if len(blocks) != len(group["params"]):
        raise ValueError(f"Muon: blocks is one number for each of {len(group['params'])} weights (got {len(blocks)}).")
    for i, (p, number) in enumerate(zip(group["params"], blocks, strict=True)):
        if p.ndim < 2:
            raise ValueError(
                f"Muon orthogonalizes matrices, and {_name(group, i)} has shape {tuple(p.shape)}: put gamma, beta and "
                "biases in a group with orthogonalize=False."
            )
        if number < 1 or p.shape[0] % number:
            raise ValueError(f"Muon: {_name(group, i)}, of shape {tuple(p.shape)}, has no {number} equal blocks.")


def _step_by_sgd(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    params = [p for p in group["params"] if p.grad is not None]
    grads: list[Any] = [p.grad for p in params]
    if group["clip"]:
        grads = clipped(params, grads, group["clip"])
    pairs = zip(params, grads, strict=True)
    alike = all(p.stride() == g.stride() and p.device.type in ("cpu", "cuda") for p, g in pairs)  # one kernel for all
    if params:
        sgd(
            params, grads, [state[p]["momentum_buffer"] for p in params],
            fused=alike, foreach=False if alike else None, weight_decay=group["weight_decay"],
            momentum=group["momentum"], lr=group["lr"], dampening=0, nesterov=group["momentum"] > 0, maximize=False,
        )  # fmt: skip


def _step_by_shape(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Weights of one shape are one product."""
    alike: dict[Any, list[Tensor]] = {}
    for p, blocks in zip(group["params"], group["blocks"], strict=True):
        if p.grad is not None:
            alike.setdefault((p.shape, p.dtype, p.device, blocks), []).append(p)
    for (shape, _, _, blocks), weights in alike.items():
        grads: list[Any] = [p.grad for p in weights]
        moments = [state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(moments, group["momentum"])
        torch._foreach_add_(moments, grads)
        ahead_WP = torch.stack(moments).to(_wide(weights[0])).mul_(group["momentum"]).add_(torch.stack(grads))
        D_WP = orthogonalized(ahead_WP.reshape(len(weights), blocks, shape[0] // blocks, -1)).flatten(1)
        norm_W1 = torch.stack([state[p]["norm"] for p in weights]).to(D_WP.dtype).unsqueeze(1)
        W_WP = torch.stack(weights).to(D_WP.dtype).flatten(1)
        W_WP.sub_(D_WP.mul_(group["lr"] * norm_W1 / _norms(D_WP).clamp(min=_TINY)))
        if group["keep_norm"]:
            W_WP.mul_(norm_W1 / _norms(W_WP))
        torch._foreach_copy_(weights, list(W_WP.reshape(len(weights), *shape).unbind()))
