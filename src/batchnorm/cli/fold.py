"""``batchnorm fold``: a checkpoint without batch normalization, as weights or as an exported program."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from batchnorm.cli.loading import check_files, end, made, model_of, user_code
from batchnorm.population.checkpoint import Checkpoint
from batchnorm.surgery import fold as run
from batchnorm.surgery.export import FORMATS, write


def fold(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint: a file of torch.save, or *.safetensors.")],
    model: Annotated[str, typer.Option(help="Your function that returns the model: package.module:function.")],
    example: Annotated[
        str, typer.Option(help="The shape of an input, 2x3x224x224 say, or your function that returns an input.")
    ],
    out: Annotated[Path, typer.Option(help=f"Where it goes: {', '.join(FORMATS)}.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file, even the input.")] = False,
    key: Annotated[
        str | None, typer.Option(help="Key of the model's state in the checkpoint.", show_default="found by itself")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of the model's names in the checkpoint, net. say.", show_default="found by itself"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="The largest error allowed, compared to float64.", show_default="by dtype: 1e-4 in float32"),
    ] = None,
) -> None:
    """Fold batch normalization into the layers beside it, check the result, and write it.

    *.pt, *.safetensors: the folded model's state_dict. *.pt2: a program of torch.export; *.onnx: ONNX. Those two run
    without the model's code, and, from an example of two inputs or more, at any batch size. They are read again and run
    beside the model: beyond the tolerance nothing is written, and the exit code is 2.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        check_files(checkpoint, out, overwrite)
        if out.suffix not in FORMATS:
            raise ValueError(f"--out {out}: a file that ends in one of {', '.join(FORMATS)}.")
        network = model_of(model)
        content = Checkpoint(checkpoint, key, prefix)
        content.load_into(network)
        inputs = _example(example, network)
        with user_code(f"--example {example}: the model does not run on it"):
            folded: Any = run(network.eval(), inputs, tolerance=tolerance)
        with user_code(f"--out {out}: cannot be written"):
            found = write(folded, inputs, out, tolerance)
    except (ValueError, OSError) as error:
        end("fold", error)
    if content.said:
        console.print(content.said, highlight=False, markup=False)
    for row in folded.batchnorm_report:
        if row.done != "folded":
            console.print(f"{row.layer}: {row.done}: {row.why}", highlight=False)
    done = Counter(row.done for row in folded.batchnorm_report)
    console.print(f"{out}: {done['folded']} layers folded, {done.total() - done['folded']} left alone. {found}")


def _example(given: str, model: nn.Module) -> Any:
    """Normal random numbers of a shape, or what the user's function returns."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", given):
        if ":" not in given:
            raise ValueError(
                f"--example {given}: expected a shape NxCxHxW, 2x3x224x224 say, or a function of yours, "
                "package.module:function."
            )
        return made("--example", given)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return torch.randn(*map(int, given.split("x")), generator=torch.Generator().manual_seed(0)).to(dtype)
