"""The activations that a layer can apply, a row each; the kernels' are in csrc/activations.h and cuda_activations.py.

Shapes: z and y are tensors of any shape. a and b are an activation's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of z (or y), a and b.
Function = Callable[[Tensor, float, float], Tensor]


def always(a: float) -> bool:
    """dg/dz follows from y = g(z) whatever the parameters."""
    return True


def never(a: float) -> bool:
    """dg/dz does not follow from y = g(z)."""
    return False


def from_0_on(a: float) -> bool:
    """dg/dz follows from y = g(z) where g keeps the sign."""
    return a >= 0


@dataclass(frozen=True)
class Row:
    """An activation g.

    Args:
        name: of the activation, here and in the kernels.
        module: torch's module.
        value: g(z).
        derivative: dg/dz at z; at a kink the one-sided derivative that torch takes.
        in_place: g of a tensor that nobody else reads: in place where autograd needs the result alone, elsewhere that
            would copy it for backward.
        result_tells: whether dg/dz follows from y = g(z), for this a.
        from_result: dg/dz from y, where it is not ``derivative`` at y (z and y on the same side of all kinks).
        parameters: a and b: the names by which torch's module and function have them, and torch's defaults.
        fixed: settings of torch's module that tell this row from others of the same module.
        homogeneous: g(c z) = c g(z) for c >= 0.
        kinks: the z at which dg/dz jumps, for a and b.
    """

    name: str
    module: type[nn.Module]
    value: Function
    derivative: Function
    in_place: Function
    result_tells: Callable[[float], bool] = always
    from_result: Function | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    homogeneous: bool = False
    kinks: Callable[[float, float], Sequence[float]] = lambda a, b: ()

    @property
    def function(self) -> str:
        """The name of torch's function in torch.nn.functional."""
        return self.name.removesuffix("_tanh") if self.fixed else self.name


def _phi(z: Tensor) -> Tensor:
    """The normal distribution's density."""
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _normal(z: Tensor) -> Tensor:
    """The normal distribution function."""
    return torch.erfc(-z / math.sqrt(2)) / 2


def _gelu_tanh_gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) z (1 + 0.044715 z^2); and sigmoid(-2 |u|).

    By way of the latter, since sigmoid's gradient s (1 - s) cancels where s is near 1.
    """
    w = 2 * math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z)
    small = torch.where(w > 0, -w, w).sigmoid()
    return torch.where(w > 0, 1 - small, small), small


def _gelu_tanh_slope(z: Tensor, a: float, b: float) -> Tensor:
    gate, small = _gelu_tanh_gate(z)
    return gate + z * small * (1 - small) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)


def _mish_slope(z: Tensor, a: float, b: float) -> Tensor:
    t = F.softplus(z).tanh()
    return t + z * z.sigmoid() * (1 - t**2)


_ROWS = (
    Row(
        "relu",
        nn.ReLU,
        value=lambda z, a, b: F.relu(z),
        derivative=lambda z, a, b: z > 0,
        in_place=lambda y, a, b: y.relu_(),
        homogeneous=True,
        kinks=lambda a, b: (0.0,),
    ),
    Row(
        "relu6",
        nn.ReLU6,
        value=lambda z, a, b: F.relu6(z),
        derivative=lambda z, a, b: (z > 0) & (z < 6),
        in_place=lambda y, a, b: F.relu6(y),
        kinks=lambda a, b: (0.0, 6.0),
    ),
    Row(
        "leaky_relu",
        nn.LeakyReLU,
        value=lambda z, a, b: F.leaky_relu(z, a),
        derivative=lambda z, a, b: torch.where(z > 0, torch.ones_like(z), a),
        in_place=lambda y, a, b: F.leaky_relu(y, a, inplace=a >= 0),
        result_tells=from_0_on,
        parameters={"negative_slope": 0.01},
        homogeneous=True,
        kinks=lambda a, b: (0.0,),
    ),
    Row(
        "silu",
        nn.SiLU,
        value=lambda z, a, b: z * z.sigmoid(),
        derivative=lambda z, a, b: z.sigmoid() * (1 + z * (1 - z.sigmoid())),
        in_place=lambda y, a, b: F.silu(y),
        result_tells=never,
    ),
    Row(
        "hardswish",
        nn.Hardswish,
        value=lambda z, a, b: z * F.relu6(z + 3) / 6,
        derivative=lambda z, a, b: torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5)),
        in_place=lambda y, a, b: F.hardswish(y),
        result_tells=never,
        kinks=lambda a, b: (-3.0, 3.0),
    ),
    Row(
        "sigmoid",
        nn.Sigmoid,
        value=lambda z, a, b: z.sigmoid(),
        derivative=lambda z, a, b: z.sigmoid() * (1 - z.sigmoid()),
        in_place=lambda y, a, b: y.sigmoid_(),
        from_result=lambda y, a, b: y * (1 - y),
    ),
    Row(
        "tanh",
        nn.Tanh,
        value=lambda z, a, b: z.tanh(),
        derivative=lambda z, a, b: 1 - z.tanh() ** 2,
        in_place=lambda y, a, b: y.tanh_(),
        from_result=lambda y, a, b: 1 - y * y,
    ),
    Row(
        "gelu",
        nn.GELU,
        value=lambda z, a, b: z * _normal(z),
        derivative=lambda z, a, b: _normal(z) + z * _phi(z),
        in_place=lambda y, a, b: F.gelu(y),
        result_tells=never,
        fixed={"approximate": "none"},
    ),
    Row(
        "gelu_tanh",
        nn.GELU,
        value=lambda z, a, b: z * _gelu_tanh_gate(z)[0],
        derivative=_gelu_tanh_slope,
        in_place=lambda y, a, b: F.gelu(y, approximate="tanh"),
        result_tells=never,
        fixed={"approximate": "tanh"},
    ),
    Row(
        "elu",
        nn.ELU,
        value=lambda z, a, b: torch.where(z > 0, z, a * torch.expm1(z.clamp(max=0))),
        derivative=lambda z, a, b: torch.where(z > 0, 1.0, a * torch.exp(z.clamp(max=0))),
        in_place=lambda y, a, b: F.elu(y, a),
        result_tells=never,  # y + a would cancel, and be nothing of a y in 16 bits
        parameters={"alpha": 1.0},
        kinks=lambda a, b: (0.0,),
    ),
    Row(
        "mish",
        nn.Mish,
        value=lambda z, a, b: z * F.softplus(z).tanh(),
        derivative=_mish_slope,
        in_place=lambda y, a, b: F.mish(y),
        result_tells=never,
    ),
    Row(
        "hardtanh",
        nn.Hardtanh,
        value=lambda z, a, b: F.hardtanh(z, a, b),
        derivative=lambda z, a, b: (z > a) & (z < b),
        in_place=lambda y, a, b: F.hardtanh(y, a, b),
        result_tells=never,  # in 16 bits the bounds may be other numbers: y at one looks as if it were inside
        parameters={"min_val": -1.0, "max_val": 1.0},
        kinks=lambda a, b: (a, b),
    ),
)
ROWS = {row.name: row for row in _ROWS}
NAMES = (None, *ROWS)  # ops and kernels take the place in it

# Torch's activations that no layer takes over, and why.
REFUSED: dict[type[nn.Module], str] = {
    nn.PReLU: "its slope is a parameter that is trained, which the layer would take from the model",
    nn.RReLU: "its slope is random in training",
}


class Activation(NamedTuple):
    """A row with its parameters, as the ops take it: their last three arguments."""

    code: int = 0  # place in NAMES
    a: float = 0.0
    b: float = 0.0

    @property
    def row(self) -> Row:
        return _ROWS[self.code - 1]

    @property
    def name(self) -> str | None:
        return NAMES[self.code]

    @property
    def parameters(self) -> dict[str, float]:
        """As torch names them."""
        return {} if self.code == 0 else dict(zip(self.row.parameters, (self.a, self.b), strict=False))

    @property
    def result_tells(self) -> bool:
        """Whether dg/dz follows from y = g(z): then a layer with a residual keeps y for backward, else the residual."""
        return self.code != 0 and self.row.result_tells(self.a)

    def value(self, z: Tensor) -> Tensor:
        """g(z)."""
        return z if self.code == 0 else self.row.value(z, self.a, self.b)

    def derivative(self, z: Tensor) -> Tensor:
        """dg/dz at z."""
        return self.row.derivative(z, self.a, self.b)

    def from_result(self, y: Tensor) -> Tensor:
        """dg/dz from y = g(z), where ``result_tells``."""
        return (self.row.from_result or self.row.derivative)(y, self.a, self.b)

    def in_place(self, y: Tensor) -> Tensor:
        """g of a tensor that nobody else reads."""
        return y if self.code == 0 else self.row.in_place(y, self.a, self.b)

    def module(self) -> nn.Module:
        """Torch's module."""
        return nn.Identity() if self.code == 0 else self.row.module(**self.row.fixed, **self.parameters)

    def as_users_write_it(self) -> str | tuple[str | float, ...] | None:
        """None, a name, or (name, parameters ...)."""
        return self.name if not self.parameters else (str(self.name), *self.parameters.values())


NO_ACTIVATION = Activation()


def activation_named(name: str, *parameters: float) -> Activation:
    """The row of this name, with torch's defaults or these parameters, which must be all."""
    values = parameters or tuple(ROWS[name].parameters.values())
    return Activation(NAMES.index(name), *map(float, values))


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module of torch's is; of a subclass, which may compute anything, None."""
    for row in _ROWS:
        if type(module) is row.module and all(getattr(module, k) == v for k, v in row.fixed.items()):
            values = [getattr(module, name) for name in row.parameters]  # a tensor may change unseen
            return activation_named(row.name, *values) if all(isinstance(v, int | float) for v in values) else None
    return None


def activation_called(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """The activation that a call of torch's function of this name is; ``args`` without the tensor."""
    for row in _ROWS:
        given = {**row.parameters, **dict(zip(row.parameters, args, strict=False)), **kwargs}
        same = all(given.get(key, "none") == value for key, value in row.fixed.items())
        values = [given[name] for name in row.parameters]
        if row.function == function and same and all(isinstance(value, int | float) for value in values):
            return activation_named(row.name, *values)
    return None
