"""BatchNorm1d, BatchNorm2d, BatchNorm3d: torch's layers, with an activation, a residual, a mask and other statistics.

Shapes: N examples, C channels (``num_features``), then the places: none, (L), (H, W) or (D, H, W).
"""

from __future__ import annotations

import torch

from batchnorm.nn.base import FusedBatchNorm


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): ``torch.nn.BatchNorm1d`` with an activation and a residual.

        y = activation(weight * (x - mu) / sqrt(var + eps) + bias + residual)

    ``layer(x)`` or ``layer(x, residual)``, with a residual of x's shape. In train mu and var are mean and biased
    variance of each channel over the batch, and the running statistics move towards them by ``momentum`` (the
    running variance towards the unbiased one). In eval mu and var are the running statistics, or the batch's with
    ``track_running_stats=False``.

    ``layer(x, mask=mask)``, in train and eval, takes a bool mask (N, ...) or (N, 1, ...) of x's places, True where a
    place counts (the opposite of attention's ``key_padding_mask``): the others enter no statistics, get no gradient
    and are 0 in y. A batch without any place that counts leaves running statistics and ``num_batches_tracked`` alone.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None: their plain average over all batches.
        affine: learn weight (gamma) and bias (beta), each (C,).
        track_running_stats: keep running_mean, running_var, each (C,), and num_batches_tracked.
        device, dtype: of parameters and buffers. Input has this dtype, or is float16 or bfloat16 beside float32.
        bias: False leaves the bias out.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", "gelu", "gelu_tanh",
            "elu", "mish", "hardtanh", or the ``torch.nn`` module of one of them; ("leaky_relu", slope), ("elu", alpha),
            ("hardtanh", min, max) for other parameters than torch's defaults. Not in the state_dict, which is
            torch's.
        statistics: where training statistics come from: ``Batch()``, ``Ghost(size)``, ``Renorm()``, ``Synced()`` or
            ``Domains(number)``.

    Raises:
        ValueError: another number of dimensions, one value per channel in train, an unknown activation, a residual or
            a mask of another shape.
        TypeError: a module that is not one of the activations, a mask that is not bool, a ``statistics`` that is not
            one of the above; also from torch's ``convert_sync_batchnorm`` on a layer with an activation or other
            statistics, which it would drop (as ``torch.nn.utils.fuse_conv_bn_eval`` does, silently).

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(100, activation="relu")
        >>> layer(torch.randn(20, 100)).shape
        torch.Size([20, 100])

    Source: Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167.
    """

    _dims = (2, 3)


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W): ``torch.nn.BatchNorm2d`` with an activation and a residual.

        y = activation(weight * (x - mu) / sqrt(var + eps) + bias + residual)

    One mean, variance, weight and bias per channel, for all examples and places. The rest is as in ``BatchNorm1d``.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(100, activation=torch.nn.LeakyReLU(0.1))
        >>> x = torch.randn(20, 100, 35, 45)
        >>> layer(x, residual=x).shape
        torch.Size([20, 100, 35, 45])
        >>> layer.activation
        ('leaky_relu', 0.1)
    """

    _dims = (4,)


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): ``torch.nn.BatchNorm3d`` with an activation and a residual.

        y = activation(weight * (x - mu) / sqrt(var + eps) + bias + residual)

    One mean, variance, weight and bias per channel, for all examples and places. The rest is as in ``BatchNorm1d``.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm3d(100, activation="silu")
        >>> layer(torch.randn(2, 100, 5, 4, 4)).shape
        torch.Size([2, 100, 5, 4, 4])
    """

    _dims = (5,)


class AnyBatchNorm(FusedBatchNorm):
    """Our converters' counterpart of torch's ``SyncBatchNorm``, which does not know its number of dimensions."""

    _dims = (2, 3, 4, 5)
