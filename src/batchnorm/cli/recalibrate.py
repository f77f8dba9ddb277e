"""``batchnorm recalibrate``: population statistics for a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from batchnorm.cli.loading import check_files, end, made, model_of, user_code
from batchnorm.population import recalibrate as run
from batchnorm.population.checkpoint import Checkpoint
from batchnorm.population.estimate import Shift


def recalibrate(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint: a file of torch.save, or *.safetensors.")],
    model: Annotated[str, typer.Option(help="Your function that returns the model: package.module:function.")],
    batches: Annotated[
        str, typer.Option(help="Your function that returns batches, a DataLoader of training data, say.")
    ],
    out: Annotated[Path, typer.Option(help="File for the new checkpoint.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file, even the input.")] = False,
    key: Annotated[
        str | None, typer.Option(help="Key of the model's state in the checkpoint.", show_default="found by itself")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of the model's names in the checkpoint, net. say.", show_default="found by itself"),
    ] = None,
    max_batches: Annotated[int | None, typer.Option(help="Read at most so many batches.", show_default="all")] = None,
    estimator: Annotated[str, typer.Option(help="pooled, or batch_mean.")] = "pooled",
    upstream: Annotated[str, typer.Option(help="batch, or population (reads the batches once per depth).")] = "batch",
    device: Annotated[str, typer.Option(help="Device that the model runs on.")] = "cpu",
) -> None:
    """Write a checkpoint again with population statistics in place of the moving averages; weights stay as they are."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        check_files(checkpoint, out, overwrite)
        network = model_of(model)  # first: the user's file may allow objects in checkpoints
        content = Checkpoint(checkpoint, key, prefix)
        if out.suffix != checkpoint.suffix and content.safe != (out.suffix == ".safetensors"):
            kept = "safetensors" if content.safe else "torch.save"
            raise ValueError(f"--out {out}: {checkpoint} is of {kept}, and its format is kept: choose another suffix.")
        content.load_into(network)
        with user_code(f"--device {device}"):
            network.to(torch.device(device))
        given = made("--batches", batches)
        with user_code(f"--batches {batches}: the model does not run on them"):
            report = run(
                network, given, max_batches=max_batches, estimator=estimator, upstream=upstream, device=device,
                progress=sys.stderr.isatty(),
            )  # fmt: skip
        if not report:
            raise ValueError(f"--model {model}: no layer with running statistics was reached.")
        content.update_from(network)
        with user_code(f"--out {out}: cannot be written"):
            content.write(out)
    except (ValueError, OSError) as error:
        end("recalibrate", error)
    console.print(table_of(report))
    if content.said:
        console.print(content.said, highlight=False, markup=False)
    console.print(
        f"{out}: {len(report)} layers recalibrated, on up to {max(row.values for row in report):,} values each"
    )


def table_of(report: list[Shift]) -> Table:
    """How far each layer's moving averages had been from the population."""
    table = Table("layer", "values", "mean off by (deviations)", "variance over the population's", box=None)
    for row in report:
        low, high = row.variance_ratio
        table.add_row(row.layer, f"{row.values:,}", f"{row.mean_shift:.3g}", f"{low:.3g} to {high:.3g}")
    return table
