"""Files of experiments: ``report.md``, ``results.json`` and a picture each."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.experiments import load
from batchnorm.experiments.claim import Result


def write(results: Mapping[str, Result], directory: Path, what: Mapping[str, Any]) -> None:
    """All files; ``what``: how the results came about."""
    from matplotlib.figure import Figure

    for name, result in results.items():
        figure = Figure()
        result.draw(figure)
        figure.savefig(directory / f"{name}.png", dpi=150)
    (directory / "report.md").write_text(markdown(results, what))
    rows = {
        name: {"verdict": r.verdict, "headline": r.headline, "rows": list(r.rows), "notes": list(r.notes)}
        for name, r in results.items()
    }
    (directory / "results.json").write_text(json.dumps({"what": dict(what), "results": rows}, indent=1))


def markdown(results: Mapping[str, Result], what: Mapping[str, Any]) -> str:
    """Claim, what decides, protocol, verdict, table and picture of each experiment."""
    lines = ["# The paper's claims, re-run", "", ", ".join(f"{key}: {value}" for key, value in what.items()), ""]
    lines += ["| experiment | verdict | finding |", "|---|---|---|"]
    lines += [f"| [{name}](#{name}) | {r.verdict} | {r.headline} |" for name, r in results.items()]
    for name, result in results.items():
        claim = load(name).claim
        lines += ["", f"## {name}", "", f"*{claim.sentence}* ({claim.where})", "", protocol(name), ""]
        lines += [
            f"Confirmed if {claim.confirmed_if}.",
            "",
            f"**{result.verdict.capitalize()}.** {result.headline}",
            "",
        ]
        lines += [*table(result), "", *(f"- {note}" for note in result.notes), "", f"![{name}]({name}.png)"]
    return "\n".join([*lines, ""])


def table(result: Result) -> list[str]:
    """The rows in Markdown."""
    if not result.rows:
        return []
    headings = list(result.rows[0])
    rule = "|".join(["---", *["---:"] * (len(headings) - 1)])
    return [f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(row.values())} |" for row in result.rows)]


def protocol(name: str) -> str:
    """The protocol: the experiment's docstring after its first line."""
    documentation = inspect.getdoc(sys.modules[load(name).measure.__module__]) or ""
    return documentation.partition("\n\n")[2]
