"""A checkpoint file whose model's running statistics are exchanged, everything else in it kept.

Comes from: files of ``torch.save`` or safetensors. Goes to: ``cli/recalibrate.py``; a new file, whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

PREFIXES = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.")  # of DDP, Lightning, torch.compile
PLACES = ("state_dict", "model_state_dict", "model", "module")  # of the model's state within a larger checkpoint


class Checkpoint:
    """One file: ``load_into`` a model, ``update_from`` it, ``write``.

    Args:
        file: of ``torch.save`` (read with ``weights_only=True``: no code in it runs), or ``*.safetensors``.
        key: where the model's state is in it; default: the whole file, or the first of ``PLACES``.

    Raises:
        ValueError: the file is not a checkpoint, or does not hold a model's state there.
    """

    def __init__(self, file: Path, key: str | None = None) -> None:
        self.file, self.safe = file, file.suffix == ".safetensors"
        self.content, self.metadata = _read_safetensors(file) if self.safe else (_read(file), None)
        self.state, self.prefix = self._find(key), ""

    def _find(self, key: str | None) -> dict[str, Tensor]:
        if key is not None:
            if not _is_state(self.content.get(key)):
                raise ValueError(f'{self.file} holds no state_dict under "{key}": it has {_few(self.content)}.')
            return cast(dict[str, Tensor], self.content[key])
        if _is_state(self.content):
            return self.content
        for place in PLACES:
            if _is_state(self.content.get(place)):
                return cast(dict[str, Tensor], self.content[place])
        raise ValueError(
            f"{self.file} is not a state_dict and holds none under {', '.join(PLACES)}: it has {_few(self.content)}. "
            "Name the place with --key."
        )

    def load_into(self, model: nn.Module) -> None:
        """The model's parameters and buffers from the file, under whatever wrapper it was saved.

        Raises:
            ValueError: it is the checkpoint of another model.
        """
        wanted = set(model.state_dict())
        self.prefix = max(PREFIXES, key=lambda prefix: len(wanted & self._without(prefix).keys()))
        found = self._without(self.prefix)
        try:
            model.load_state_dict(found)
        except RuntimeError as error:
            missing, more = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
            what = [
                f"{name}: {_few(keys)}" for name, keys in (("missing", missing), ("not in the model", more)) if keys
            ]
            differs = "; ".join(what) or str(error).splitlines()[-1].strip()
            raise ValueError(
                f"{self.file} does not fit {type(model).__name__}: {differs}. Is it the checkpoint of this model?"
            ) from error

    def _without(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.state.items() if key.startswith(prefix)}

    def update_from(self, model: nn.Module) -> None:
        """Take over the model's running statistics; parameters stay as they were in the file."""
        for key, t in model.state_dict().items():
            if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
                name = self.prefix + key
                self.state[name] = t.detach().to(self.state[name]).clone()

    def write(self, file: Path) -> None:
        """The whole checkpoint: an unfinished file never has this name."""
        part = file.with_name(f"{file.name}.part{os.getpid()}")
        try:
            if self.safe:
                from safetensors.torch import save_file

                save_file(self.content, part, self.metadata)
            else:
                torch.save(self.content, part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as tensors and plain values ({str(error).splitlines()[0]}). Objects in it "
            "may run code when they are loaded, so they are refused: save model.state_dict() by itself."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state_dict.")
    return content


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError(f"{file}: for *.safetensors, pip install safetensors.") from error
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata()  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{file} cannot be read as safetensors ({str(error).splitlines()[0]}).") from error


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(t, Tensor) for t in value.values())


def _few(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
