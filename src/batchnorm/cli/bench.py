"""``batchnorm bench``: our layer against torch's on this machine, for a table of shapes or for whole networks."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from batchnorm.bench import layers
from batchnorm.bench.layers import ACTIVATIONS, DTYPES, LAYOUTS, SIDES, Case, Row, geometric_mean
from batchnorm.bench.networks import NETWORKS, bench_network, kinds_of
from batchnorm.bench.tables import DEFAULT, TABLES

NAMES = {"ours compiled": "ours under torch.compile", "eager": "torch", "compiled": "torch under torch.compile"}
STEPS = 9  # of each kind of layer, for --network


def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="A shape, 32,64,56,56 say; repeat for more.", show_default="a table")
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(help=f"Of shapes: {', '.join(TABLES)}.", show_default="cpu; with --device cuda resnet50-64"),
    ] = None,
    device: Annotated[str, typer.Option(help=", ".join(DEFAULT))] = "cpu",
    network: Annotated[
        str | None, typer.Option(help=f"A whole network instead: {', '.join(NETWORKS)} (needs transformers).")
    ] = None,
    layout: Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS)}, or both.")] = "both",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    activation: Annotated[str, typer.Option(help=", ".join(ACTIVATIONS))] = "relu",
    residual: Annotated[bool, typer.Option("--residual", help="Add a second tensor before the activation.")] = False,
    inference: Annotated[
        bool, typer.Option("--inference", help="Time evaluation mode, forward only; networks also folded.")
    ] = False,
    forward: Annotated[bool, typer.Option("--forward", help="Time training mode without backward.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Skip torch.compile, which takes long.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="torch's default")] = None,
    seconds: Annotated[float, typer.Option(help="Time spent on each line, after the warm-up.")] = 2.0,
    default_allocator: Annotated[
        bool,
        typer.Option("--default-allocator", help="Let malloc return memory to the system: times include page faults."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG file.")] = None,
) -> None:
    """Forward + backward of BN and what follows it: ours, torch's layer, both under torch.compile, and a plain copy.

    A case whose results are wrong is not timed, and the exit code is 1 then.
    """
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        if network is not None and network not in NETWORKS:
            raise ValueError(f'unknown network "{network}". Known: {", ".join(NETWORKS)}.')
        if device not in DEFAULT:
            raise ValueError(f'unknown device "{device}". Known: {", ".join(DEFAULT)}.')
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here (torch.cuda.is_available() is False).")
        if table is not None and table not in TABLES:
            raise ValueError(f'unknown table "{table}". Known: {", ".join(TABLES)}.')
        shapes = tuple(map(_shape, shape)) if shape else TABLES[table or DEFAULT[device]]
        case = Case((), "", dtype, activation, residual, not inference, not forward, device)
        cases = cases_of(shapes, layout, case)
        if seconds <= 0 or (threads is not None and threads < 1):
            raise ValueError(f"--seconds and --threads must be above 0 (got {seconds}, {threads}).")
        for file in (json_file, plot):
            if file is not None and not file.absolute().parent.is_dir():
                raise ValueError(f"{file}: there is no directory {file.absolute().parent}.")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    if network is not None:
        _network(network, layout, device, threads, not inference, console)
        return
    sides = tuple(side for side in SIDES if not (no_compile and side.endswith("compiled")))
    made = layers.bench(cases, sides, seconds=seconds, threads=threads, keep_memory=not default_allocator)
    rows = list(track(made, "Timing", total=len(cases), console=Console(stderr=True), transient=True))
    what = {
        "torch": torch.__version__, **machine(device, threads), "dtype": dtype, "activation": activation,
        "residual": residual, "training": not inference, "backward": not (inference or forward),
    }  # fmt: skip
    if device == "cpu":
        what["malloc"] = "default" if default_allocator else "keeps freed memory"
    console.print(table_of(rows, sides))
    console.print(", ".join(f"{name} {value}" for name, value in what.items()))
    if json_file is not None:
        json_file.write_text(json.dumps({"what": what, "rows": [row.as_json() for row in rows]}, indent=1))
    if plot is not None:
        kind = "inference" if inference else "training, forward alone" if forward else "training"
        draw(rows, sides, plot, f"BN + {'residual + ' if residual else ''}{activation}, {dtype}, {kind}")
    if any(row.error for row in rows):
        sys.exit(1)


def machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """The machine that the times were taken on."""
    if device == "cuda":
        return {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    return {"processor": platform.processor() or platform.machine(), "threads": threads or torch.get_num_threads()}


def _network(name: str, layout: str, device: str, threads: int | None, training: bool, console: Console) -> None:
    """A step or the inference of a whole network, at the usual size of 224 and batch of 32, on CUDA 64 in bfloat16."""
    if threads is not None:
        torch.set_num_threads(threads)
    kinds = kinds_of(device, training)
    table = Table("network", "layout", box=None)
    for kind in kinds:
        for name_of in (f"{kind} (ms)", "spread", *(["peak (GB)"] if device == "cuda" else [])):
            table.add_column(name_of, justify="right")
    for kind in kinds[1:]:
        table.add_column(f"torch / {kind}", justify="right")
    table.add_column("BN's share", justify="right")
    for chosen in LAYOUTS if layout == "both" else (layout,):
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"{name}, {chosen}", total=len(kinds) * (STEPS + 2))
            row = bench_network(
                name, batch=64 if device == "cuda" else 32, size=224, channels_last=chosen == "channels-last",
                steps=STEPS, device=device, training=training, report=partial(progress.advance, bar),
            )  # fmt: skip
        cells = []
        for kind in kinds:
            cells += [f"{1e3 * row.seconds[kind]:.0f}", f"{100 * row.spread[kind]:.0f}%"]
            cells += [f"{row.peak[kind] / 1e9:.1f}"] if device == "cuda" else []
        ratios = [f"{row.seconds['torch'] / row.seconds[kind]:.2f}" for kind in kinds[1:]]
        table.add_row(name, chosen, *cells, *ratios, f"{100 * row.share:.0f}%")
    console.print(table)


def table_of(rows: list[Row], sides: tuple[str, ...]) -> Table:
    """Milliseconds of ours with their spread; how many times longer each other side takes."""
    table = Table("shape", "layout", "ours (ms)", "spread", box=None)
    others = [side for side in sides if side not in ("ours", "copy")]
    for name in (*(f"{side} / ours" for side in others), "ours / copy", "ours / floor"):
        table.add_column(name, justify="right")
    for row in rows:
        shape = "x".join(map(str, row.case.shape))
        if row.error is not None:
            table.add_row(shape, row.case.layout, "not timed", row.error)
            continue
        ratios = [*(row.ratio(side) for side in others), row.ratio("ours", "copy"), row.over_floor()]
        table.add_row(
            shape, row.case.layout, f"{1e3 * row.seconds['ours']:.3g}", f"{100 * row.spread['ours']:.0f}%",
            *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
        )  # fmt: skip
    means = [geometric_mean([r for row in rows if (r := row.ratio(side))]) for side in others]
    table.add_row("geometric mean", "", "", "", *(f"{mean:.2f}" if mean else "-" for mean in means), end_section=True)
    return table


def draw(rows: list[Row], sides: tuple[str, ...], file: Path, title: str) -> None:
    """How many times faster than each other side, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = [side for side in sides if side not in ("ours", "copy")]
    rows = [row for row in rows if row.error is None]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.22 * len(rows) * len(others)), layout="constrained")
    height = 0.8 / len(others)
    for number, (side, color) in enumerate(zip(others, ("#4c78a8", "#9ecae9", "#bab0ac"), strict=False)):
        places = [place + number * height for place in range(len(rows))]
        values = [row.ratio(side) or 0.0 for row in rows]
        axes.barh(places, values, height, label=NAMES[side], color=color)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.1f}", (value, place), (2, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    names = [f"{'x'.join(map(str, row.case.shape))} {row.case.layout}" for row in rows]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], names, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("time over ours (1: as fast)")
    mean = geometric_mean([r for row in rows if (r := row.ratio("eager"))])
    axes.set_title(f"{title}: {mean:.1f} times as fast as torch" if mean else title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(others) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(others))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def cases_of(shapes: tuple[tuple[int, ...], ...], layout: str, like: Case) -> list[Case]:
    """The case ``like``, for each shape in the layouts that it has."""
    for name, value, known in (("dtype", like.dtype, DTYPES), ("activation", like.activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f'unknown {name} "{value}". Known: {", ".join(known)}.')
    if layout not in (*LAYOUTS, "both"):
        raise ValueError(f'unknown layout "{layout}". Known: {", ".join(LAYOUTS)}, both.')
    cases = []
    for given in shapes:
        layouts = LAYOUTS if layout == "both" else (layout,)
        for chosen in layouts if len(given) in (4, 5) else ("contiguous",):
            cases.append(replace(like, shape=given, layout=chosen))
    return cases


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 5 or any(size < 1 for size in shape):
        raise ValueError(f'--shape "{text}": expected 2 to 5 sizes above 0, N,C,..., as 32,64,56,56.')
    if shape[0] * torch.Size(shape[2:]).numel() < 2:
        raise ValueError(f'--shape "{text}": one value per channel has no variance.')
    return shape
