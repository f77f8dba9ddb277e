"""The command ``batchnorm``: one file per subcommand; here they are only collected."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version


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

    def say_version(asked: bool) -> None:
        if asked:
            print(f"batchnorm {version('batchnorm')}")
            raise typer.Exit

    about = typer.Option(False, "--version", callback=say_version, is_eager=True, help="Print the version.")

    @app.callback()
    def options(_: bool = about) -> None:
        pass

    app.command()(race)
    app.command()(bench)
    app.command()(recalibrate)
    app.command()(fold)
    app.command()(reproduce)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends its processes itself
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's scheduler ends a run as Ctrl-C does
    app()
