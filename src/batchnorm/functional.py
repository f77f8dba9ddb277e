"""Batch normalization as a function: checks its arguments once and calls the op.

Shapes: N examples, C channels, S places (none for (N, C)). ``input`` is (N, C, ...); m = N * S, values per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from batchnorm import ops
from batchnorm.ops import split
from batchnorm.ops.activations import NO_ACTIVATION, REFUSED, ROWS, Activation, activation_named, activation_of
from batchnorm.ops.arguments import Affine, Moments, Running

# None, a name, (name, parameters ...), or a torch.nn module (or its class) of one of these kinds.
ActivationLike = str | tuple[Any, ...] | nn.Module | type[nn.Module] | None

_KNOWN = f"Known: {', '.join(dict.fromkeys(row.module.__name__ for row in ROWS.values()))}."

_DTYPES = "weight, bias, running_mean and running_var have input's dtype, or all are float32 beside a 16-bit input"
_dispatched: Any = handle_torch_function
_NO_STATISTICS = "without running statistics (track_running_stats=False) eval normalizes by the batch too"
_PLAIN = {Tensor, nn.Parameter, nn.Buffer, type(None)}
# What to do about torch's errors, by the words that they contain.
_ADVICE = {
    "not implemented for": "batch normalization takes float16, bfloat16, float32 or float64: pass input.float()",
    "Expected more than 1 value per channel": "one value has no variance. Use a larger batch, or drop the last "
    "incomplete one (DataLoader(drop_last=True))",
    "eps must be": "eps keeps the division finite where a channel is constant; torch's default is 1e-5",
    "should contain": "channels are in dimension 1; weight, bias, running_mean and running_var take one value for each "
    "of them (num_features of a layer)",
    "must be defined in evaluation mode": "pass both running statistics, or training=True for the batch's own",
    "mixed dtype": _DTYPES,
    "expected scalar type": _DTYPES,
}


def parse_activation(activation: ActivationLike) -> Activation:
    """The activation that a user means; see ``batch_norm``."""
    if activation is None:
        return NO_ACTIVATION
    if isinstance(activation, type) and issubclass(activation, nn.Module):  # as timm's act_layer=nn.ReLU
        known = any(row.module is activation for row in ROWS.values())
        return parse_activation(activation() if known else activation.__new__(activation))
    if isinstance(activation, nn.Module):
        found = activation_of(activation)
        if found is None:  # a subclass may compute anything
            kind = type(activation)
            why = f": {REFUSED[kind]}" if kind in REFUSED else ""
            raise TypeError(f"cannot fuse activation {kind.__name__}{why}. {_KNOWN} Put others after the layer.")
        return found
    given = (activation,) if isinstance(activation, str) else activation
    name, *parameters = given if isinstance(given, tuple) and given else (None,)
    if not (isinstance(name, str) and all(isinstance(value, int | float) for value in parameters)):
        raise TypeError(
            'activation takes a name, "relu", a tuple with parameters, ("leaky_relu", slope), or a torch.nn module, '
            f"got {activation!r}. {_KNOWN}"
        )
    if name not in ROWS:
        raise ValueError(f'unknown activation "{name}". Known: {", ".join(ROWS)}.')
    wanted = ROWS[name].parameters
    if not isinstance(activation, str) and len(parameters) != len(wanted):
        takes = f'takes ("{name}", {", ".join(wanted)})' if wanted else "has no parameters"
        raise ValueError(f'activation "{name}" {takes}, got {activation!r}: pass "{name}" alone for torch\'s defaults.')
    return activation_named(name, *parameters)


@overload
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    return_statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    return_statistics: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel, add a residual, apply an activation (Ioffe & Szegedy 2015, Algorithm 1).

        y = activation(weight * (input - mu) / sqrt(var + eps) + bias + residual)

    In training mu and var are mean and biased variance of each channel over this batch, and the running
    statistics move towards them, in place: running = (1 - momentum) * running + momentum * batch, with the unbiased
    variance m / (m - 1) * var. Otherwise mu and var are the running statistics, and nothing is changed.
    Without the keyword-only arguments this is ``torch.nn.functional.batch_norm``.

    Args:
        input: (N, C, ...), float16, bfloat16, float32 or float64.
        running_mean, running_var: (C,), of input's dtype, or float32 beside a 16-bit input. In training, None for
            both of them keeps none.
        weight, bias: (C,), gamma and beta of the paper; None stands for 1 and 0. Dtypes as for running_mean.
        training: normalize with batch statistics instead of the running ones.
        momentum: share of the batch in the new running statistics.
        eps: added to the variance; above 0 in training.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", "gelu", "gelu_tanh",
            "elu", "mish", "hardtanh", or the torch.nn module of one of them. ("leaky_relu", 0.2), ("elu", 0.5),
            ("hardtanh", -2, 2) give parameters; without them they are torch's defaults.
        residual: of input's shape; added before the activation, with type promotion as in ``y + residual``.
        mask: bool, (N, ...) or (N, 1, ...) with input's places, True where a place counts (the opposite of
            attention's ``key_padding_mask``). The others enter no statistics, get no gradient, and are 0 in y. A batch
            without any place that counts leaves the running statistics alone.
        return_statistics: change nothing in place, return ``(y, new_running_mean, new_running_var)`` instead. The
            new statistics carry no gradient; in evaluation they equal the given ones. Made for ``torch.func``: under
            ``vmap`` the running statistics need not be batched.

    Returns:
        y, of input's shape and memory format.

    Raises:
        ValueError: one value per channel in training, eps too small, an unknown activation, a residual or a mask of
            another shape, return_statistics without running statistics.
        TypeError: a module that is not one of the activations; a mask that is not bool.
        RuntimeError: sizes or dtypes of the (C,) tensors do not fit input.

    Example:
        >>> import torch, batchnorm as bn
        >>> x, mean, var = torch.randn(8, 3, 4, 4), torch.zeros(3), torch.ones(3)
        >>> y = bn.batch_norm(x, mean, var, training=True, activation="relu")
        >>> y, new_mean, new_var = bn.batch_norm(x, mean, var, training=True, return_statistics=True)

    Source: Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if overridden(*tensors):
        keywords = {
            "activation": activation,
            "residual": residual,
            "mask": mask,
            "return_statistics": return_statistics,
        }
        return _dispatched(batch_norm, tensors, *tensors[:5], training, momentum, eps, **keywords)
    refuse_others(input=input, residual=residual)
    running = Running(running_mean, running_var, momentum=momentum)
    affine = Affine(weight, bias, residual, eps, *parse_activation(activation))
    if return_statistics:
        if running_mean is None or running_var is None:
            raise ValueError(
                "return_statistics=True needs running_mean and running_var, got None: "
                "start with torch.zeros(C) and torch.ones(C)."
            )
        # The new tensors are batched wherever input is: what vmap asks of tensors that are updated in place.
        new = [t.detach() + input.new_zeros(t.shape, dtype=t.dtype) for t in (running_mean, running_var)]
        running = running._replace(mean_C=new[0], var_C=new[1])
    if mask is None:
        y = of_whole_batch(input, affine, running, training)
    elif training:
        y = of_source(split.of_batch, input, affine, running, as_mask(mask, input))
    else:
        y = masked_in_eval(input, affine, running, as_mask(mask, input))
    return y if not return_statistics else (y, running.mean_C, running.var_C)  # type: ignore[return-value]


def overridden(*tensors: Tensor | None) -> bool:
    """Whether one is of a subclass with a ``__torch_function__`` (MONAI's MetaTensor, fastai's), as torch asks too."""
    for t in tensors:
        if type(t) not in _PLAIN and isinstance(t, Tensor) and not torch.compiler.is_compiling():
            own = type(t).__torch_function__ is not torch._C._disabled_torch_function_impl
            if own and torch._C._is_torch_function_enabled():
                return True
    return False


def of_whole_batch(input: Tensor, affine: Affine, running: Running, training: bool) -> Tensor:
    """``ops.batch_norm``, with advice in torch's errors."""
    _, bias, residual, _, activation, *_ = affine
    if residual is not None and residual.shape != input.shape:
        raise ValueError(_other_shape(residual, input))
    if activation and bias is not None and bias.requires_grad:
        affine = _steady(affine)
    try:
        return ops.batch_norm(input, affine, running, training)
    except (RuntimeError, ValueError) as error:
        _advise(error, input, running)
        raise


def of_source(
    normalize: Callable[[Tensor, Affine, Tensor | None], tuple[Tensor, Moments]],
    input: Tensor,
    affine: Affine,
    running: Running,
    mask: Tensor | None,
    one_value: bool = False,
) -> Tensor:
    """Training with moments that ``normalize`` gives with y; ``one_value`` per channel may be enough for it."""
    residual = affine.residual_NCS
    if residual is not None and residual.shape != input.shape:
        raise ValueError(_other_shape(residual, input))
    affine = _steady(affine) if affine.activation else affine
    try:
        split.check(input, running, affine, one_value)
    except (RuntimeError, ValueError) as error:
        _advise(error, input, running)
        raise
    y, moments = normalize(input, affine, mask)
    if running.mean_C is not None and running.var_C is not None:
        values = None if mask is not None or one_value else input.numel() // max(input.shape[1], 1)
        split.update_running_(running, moments, values)
    return y


def masked_in_eval(input: Tensor, affine: Affine, running: Running, mask: Tensor) -> Tensor:
    """Evaluation, with 0 and no gradient where the mask is False, whatever is there."""
    residual = affine.residual_NCS
    affine = affine._replace(residual_NCS=None if residual is None else residual.where(mask, 0))
    return of_whole_batch(input.where(mask, 0), affine, running, False).where(mask, 0)


def as_mask(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as (N, 1, ...), beside input."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, True where a place counts, got {type(mask).__name__}.")
    places = input.shape[2:]
    allowed = (input.shape[:1] + places, (input.shape[0], 1, *places))
    if not any(mask.shape == torch.Size(shape) for shape in allowed):  # compared, not hashed: sizes may be symbols
        raise ValueError(
            f"mask must be {' or '.join(str(tuple(shape)) for shape in allowed)} for input {tuple(input.shape)}, got "
            f"{tuple(mask.shape)}: one value for each place of each example."
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool, True where a place counts, got {mask.dtype}: pass mask.bool() or mask > 0."
        )
    if mask.device != input.device:
        raise ValueError(f"mask must be on the device of input, {input.device}, got {mask.device}.")
    return mask.reshape(allowed[1])


def _steady(affine: Affine) -> Affine:
    """With a copy of the bias if it alone is trained: an activation's backward reads it, torch's batch_norm does not,
    so that there it may move between two backwards of one forward, where nothing else does."""
    weight, bias = affine.weight_C, affine.bias_C
    alone = bias is not None and bias.requires_grad and (weight is None or not weight.requires_grad)
    return affine._replace(bias_C=bias.clone()) if alone and torch.is_grad_enabled() else affine  # type: ignore[union-attr]


def refuse_others(**tensors: object) -> None:
    """Refuse arrays and lists.

    Raises:
        TypeError: one is no tensor, with its name.
    """
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}: pass torch.as_tensor({name}).")


def _other_shape(residual: Tensor, input: Tensor) -> str:
    return (
        f"residual must have the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}: "
        "expand it, or add it yourself."
    )


def _advise(error: RuntimeError | ValueError, input: Tensor, running: Running) -> None:
    """Raise the error with torch's words, what arrived and what to do, where that is known."""
    advice = next((advice for words, advice in _ADVICE.items() if words in str(error)), None)
    if advice is None:
        return
    if "more than 1 value" in str(error):
        advice = f"{advice}, or call .eval()" if running.mean_C is not None else f"{advice}: {_NO_STATISTICS}"
    if advice == _DTYPES and running.mean_C is not None and input.dtype != running.mean_C.dtype:
        advice = f"{advice}. Here running_mean has {running.mean_C.dtype}: pass input.to({running.mean_C.dtype})"
    raise type(error)(f"{error}: got input {tuple(input.shape)} of {input.dtype}; {advice}.") from error
