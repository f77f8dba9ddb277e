"""How many Python functions one call of a layer goes through: ours and torch's, in training, in eval, for each source.

Prints the table of docs/architecture.md, "One call"; with a name (`train`, say) the functions of that call of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import batchnorm as bn

x = torch.randn(8, 4, 5, 5)
mask = torch.ones(8, 5, 5, dtype=torch.bool)
CALLS: dict[str, tuple[nn.Module, nn.Module | None, tuple[Any, ...], bool]] = {
    "train": (bn.BatchNorm2d(4), nn.BatchNorm2d(4), (), True),
    "train, relu and residual": (bn.BatchNorm2d(4, activation="relu"), None, (x,), True),
    "train, mask": (bn.BatchNorm2d(4), None, (None, mask), True),
    "train, Ghost": (bn.BatchNorm2d(4, statistics=bn.Ghost(4)), None, (), True),
    "train, Renorm": (bn.BatchNorm2d(4, statistics=bn.Renorm()), None, (), True),
    "eval, with gradients": (bn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).eval(), (), True),
    "eval, without": (bn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).eval(), (), False),
}


def functions(call: Callable[[], Any]) -> list[str]:
    """The Python functions that a call enters, in order."""
    seen: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            seen.append(f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen[1:-1] if seen[-1].endswith("setprofile") else seen[1:]


def counted(layer: nn.Module, more: tuple[Any, ...], gradients: bool) -> list[str]:
    """Of the second call: the first one makes what later ones find."""
    leaf = x.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        layer(leaf, *more)
        return functions(lambda: layer(leaf, *more))


if __name__ == "__main__":
    chosen = sys.argv[1:]
    if not chosen:
        print(f"{'call':26} {'ours':>6} {'torch':>6}")
    for name, (ours, stock, more, gradients) in CALLS.items():
        found = counted(ours, more, gradients)
        if name in chosen:
            print("\n".join(found))
        elif not chosen:
            print(f"{name:26} {len(found):6} {len(counted(stock, more, gradients)) if stock else '':>6}")
