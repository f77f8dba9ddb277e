"""A checkpoint file whose model's running statistics are exchanged, everything else in it kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.common.files import replacing
from batchnorm.population.files import few, read, whole_model
from batchnorm.population.names import fit, twins

PLACES = ("state_dict", "model_state_dict", "model", "module")  # of the model's state within a larger checkpoint
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Checkpoint:
    """One file: ``load_into`` a model, ``update_from`` it, ``write``.

    Args:
        file: of ``torch.save`` (read with ``weights_only=True``: no code in it runs), or of safetensors.
        key: where the model's state is in it, with dots between the names of dicts in dicts; default: the whole
            file, or the first of ``PLACES``, or the only dict with running statistics.
        prefix: before the model's names in it; default: the one, if any, without which they are the model's.

    Attributes:
        said: what ``load_into`` left off before names, for the user; or nothing.

    Raises:
        ValueError: the file is not a checkpoint, or does not hold a model's state there.
    """

    def __init__(self, file: Path, key: str | None = None, prefix: str | None = None) -> None:
        self.file, self.prefix = file, prefix
        self.content, self.safe, self.metadata = read(file)
        self.state = self._find(key)
        self.names: dict[str, str] = {}  # of the model -> of the file
        self.said = ""

    def _find(self, key: str | None) -> dict[Any, Any]:
        """The dict under the key, or the only one in there that can be meant."""
        states = dict(_states(self.content))
        inside = {place: state for place, state in states.items() if not key or f"{place}.".startswith(f"{key}.")}
        chosen = _chosen(inside, key or "")
        if chosen is not None:
            return inside[chosen]
        if inside:
            raise ValueError(f"{self.file}: which state_dict is the model's? Name it with --key: {few(inside)}.")
        if "" in states:
            raise ValueError(f'{self.file} holds no state_dict under "{key}": it is one itself, leave --key away.')
        if states:
            raise ValueError(f'{self.file} holds no state_dict under "{key}": it has one under {few(states)}.')
        if any(isinstance(value, nn.Module) for _, held in _dicts(self.content) for value in held.values()):
            raise whole_model(self.file)
        if not self.content:
            raise ValueError(f"{self.file} is an empty dict: save model.state_dict() by torch.save.")
        has = few(f"{name} ({type(value).__name__})" for name, value in self.content.items())
        raise ValueError(f"{self.file} holds no state_dict: it has {has}. Save model.state_dict() by torch.save.")

    def load_into(self, model: nn.Module) -> None:
        """The model's parameters and buffers from the file, under whatever wrapper it was saved.

        Of tensors that the model shares (a module under two names, tied weights) one name is enough. Files from before
        ``num_batches_tracked`` may lack it.

        Raises:
            ValueError: it is the checkpoint of another model, or of several that fit.
        """
        wanted = model.state_dict(keep_vars=True)
        names = fit(_tensors(self.state), wanted, self.prefix)
        self.names, same = names.pairs, twins(wanted)
        given = {name: next((twin for twin in same[name] if twin in self.names), None) for name in wanted}
        missing = [name for name, by in given.items() if by is None and not name.endswith("num_batches_tracked")]
        left_off = names.said()
        self.said = f"{self.file}: {left_off}" if left_off else ""
        which = f"{self.file} does not fit {type(model).__name__}"
        if missing or names.more:
            lists = ((missing, "missing"), (names.more, "not in the model"))
            differs = "; ".join(f"{what}: {few(sorted(keys))}" for keys, what in lists if keys)
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
        with replacing(file) as part:
            if self.safe:
                from safetensors.torch import save_file

                save_file(self.content, part, self.metadata)
            else:
                torch.save(self.content, part)


def _dicts(held: dict[Any, Any], place: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """A dict and those in it, under names that --key takes."""
    yield place, held
    for name, value in held.items():
        if isinstance(value, dict) and isinstance(name, str):
            yield from _dicts(value, f"{place}.{name}" if place else name)


def _states(content: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dicts that hold tensors by name: nothing else, or a layer's running statistics among them."""
    for place, held in _dicts(content):
        tensors = _tensors(held)
        if any(isinstance(held[name], Tensor) for name in tensors) and (
            len(tensors) == len(held) or _has_statistics(tensors)
        ):
            yield place, held


def _chosen(states: dict[str, dict[Any, Any]], key: str) -> str | None:
    """The place of the one that is meant: under the key itself, the only one, or the first by ``PLACES``."""
    if key in states:
        return key
    within = f"{key}." if key else ""
    for place in PLACES:
        under = [name for name in states if f"{name}.".startswith(f"{within}{place}.")]
        chosen = _chosen({name: states[name] for name in under}, within + place) if under else None
        if chosen is not None:
            return chosen
    models = [name for name, state in states.items() if _has_statistics(state)]
    return models[0] if len(models) == 1 else None


def _has_statistics(names: Any) -> bool:
    return any(str(name).rpartition(".")[2] == "running_var" for name in names)


def _tensors(state: dict[Any, Any]) -> list[str]:
    """The names of tensors, and of what modules add to them in ``get_extra_state``."""
    return [
        name
        for name, value in state.items()
        if isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
    ]
