"""Runs a command of `batchnorm` in this process: each of its own takes three seconds or more to import torch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
import typer
from typer.testing import CliRunner


def invoke(command: Callable[..., Any], folder: Path, *options: str) -> CompletedProcess[str]:
    """As a user who stands in the folder; his module `mine` and what the command set are forgotten afterwards."""
    app = typer.Typer()
    app.command()(command)
    directory, path, environment, threads = Path.cwd(), list(sys.path), dict(os.environ), torch.get_num_threads()
    os.chdir(folder)
    sys.modules.pop("mine", None)
    try:
        done = CliRunner().invoke(app, options, catch_exceptions=False)
    finally:
        os.chdir(directory)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        sys.modules.pop("mine", None)
    return CompletedProcess(options, done.exit_code, done.stdout, done.stderr)
