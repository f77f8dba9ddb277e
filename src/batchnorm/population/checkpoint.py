"""A checkpoint file whose model's running statistics are exchanged, everything else in it kept.

Comes from: files of ``torch.save`` or safetensors. Goes to: ``cli/recalibrate.py``, ``cli/fold.py``; a new file, whole
or not at all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from batchnorm.population.names import fit, twins

PLACES = ("state_dict", "model_state_dict", "model", "module")  # of the model's state within a larger checkpoint
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Checkpoint:
    """One file: ``load_into`` a model, ``update_from`` it, ``write``.

    Args:
        file: of ``torch.save`` (read with ``weights_only=True``: no code in it runs), or ``*.safetensors``.
        key: where the model's state is in it; default: the whole file, or the first of ``PLACES``.
        prefix: before the model's names in it; default: the one, if any, without which they are the model's.

    Attributes:
        said: what ``load_into`` left off before names, for the user; or nothing.

    Raises:
        ValueError: the file is not a checkpoint, or does not hold a model's state there.
    """

    def __init__(self, file: Path, key: str | None = None, prefix: str | None = None) -> None:
        self.file, self.safe, self.prefix = file, file.suffix == ".safetensors", prefix
        self.content, self.metadata = _read_safetensors(file) if self.safe else (_read(file), None)
        self.state = self._find(key)
        self.names: dict[str, str] = {}  # of the model -> of the file
        self.said = ""

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

        Of tensors that the model shares (a module under two names, tied weights) one name is enough. Files from before
        ``num_batches_tracked`` may lack it.

        Raises:
            ValueError: it is the checkpoint of another model, or of several that fit.
        """
        wanted = model.state_dict(keep_vars=True)
        names = fit(self.state, wanted, self.prefix)
        self.names, same = names.pairs, twins(wanted)
        given = {name: next((twin for twin in same[name] if twin in self.names), None) for name in wanted}
        missing = [name for name, by in given.items() if by is None and not name.endswith("num_batches_tracked")]
        left_off = names.said()
        self.said = f"{self.file}: {left_off}" if left_off else ""
        which = f"{self.file} does not fit {type(model).__name__}"
        if missing or names.more:
            lists = ((missing, "missing"), (names.more, "not in the model"))
            differs = "; ".join(f"{what}: {_few(sorted(keys))}" for keys, what in lists if keys)
            more = f" ({left_off})" if left_off else ""
            raise ValueError(f"{which}: {differs}{more}. Is it the checkpoint of this model?")
        if names.rivals:
            raise ValueError(
                f"{self.file} holds several sets of names that fit {type(model).__name__}, under "
                f"{', '.join((names.of_file, *names.rivals))}: name one with --prefix."
            )
        try:
            model.load_state_dict({name: self.state[self.names[by]] for name, by in given.items() if by is not None})
        except RuntimeError as error:
            last = str(error).splitlines()[-1].strip().rstrip(".")
            raise ValueError(f"{which}: {last}. Is it the checkpoint of this model?") from error

    def update_from(self, model: nn.Module) -> None:
        """Take over the model's running statistics under the names that the file has; the rest stays as it was."""
        for key, t in model.state_dict().items():
            if key in self.names and key.rpartition(".")[2] in _STATISTICS:
                name = self.names[key]
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
        objects = _objects(file)
        if objects:
            raise ValueError(
                f"{file} holds objects that may run code when they are loaded ({_few(objects)}), so they are refused: "
                "save model.state_dict() by itself, or, where you trust the file, call "
                f"torch.serialization.add_safe_globals([{', '.join(objects)}]) in the file of your functions."
            ) from error
        raise ValueError(
            f"{file} cannot be read as tensors and plain values ({_first_line(error)}): save model.state_dict() by "
            "itself, by torch.save."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state_dict.")
    return content


def _objects(file: Path) -> list[str]:
    """What ``weights_only=True`` refuses in there, by name."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of the format before torch 1.6, or no checkpoint
        return []


def _first_line(error: Exception) -> str:
    """Of what torch says; of what it refuses, that. Without the terminal's escape codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    if refused:
        return f"{refused[1]} is refused, since it may run code"
    sentence = re.split(r"\.\s|\n", text.strip())[0].rstrip(".")  # the next ones are of torch.load's options
    return sentence if " " in sentence else f"{type(error).__name__} {sentence}".strip()


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError(f"{file}: for *.safetensors, pip install safetensors.") from error
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata()  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{file} cannot be read as safetensors ({_first_line(error)}).") from error


def _is_state(value: Any) -> bool:
    """Tensors, and what modules add to them in ``get_extra_state``."""
    if not isinstance(value, dict) or not any(isinstance(t, Tensor) for t in value.values()):
        return False
    return all(isinstance(t, Tensor) or str(key).endswith("_extra_state") for key, t in value.items())


def _few(names: Any) -> str:
    names = [str(name) for name in names] or ["nothing"]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
