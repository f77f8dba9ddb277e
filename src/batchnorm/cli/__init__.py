"""The command ``batchnorm``: one file per subcommand; here they are only collected."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``batchnorm`` and ``python -m batchnorm``."""
    try:
        import typer

        from batchnorm.cli.bench import bench
        from batchnorm.cli.fold import fold
        from batchnorm.cli.race import race
        from batchnorm.cli.recalibrate import recalibrate
        from batchnorm.cli.reproduce import reproduce
    except ModuleNotFoundError as error:
        print(f"batchnorm: the command line needs {error.name}: pip install 'batchnorm[race]'", file=sys.stderr)
        sys.exit(2)
    app = typer.Typer(
        help="Batch normalization for PyTorch: train in fewer steps, and see by how much.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.command()(race)
    app.command()(bench)
    app.command()(recalibrate)
    app.command()(fold)
    app.command()(reproduce)
    app()
