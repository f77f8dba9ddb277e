"""The names in a checkpoint beside those of a model: the same but for what wrappers put before them.

DistributedDataParallel puts ``module.`` there, a LightningModule the attribute that holds the network, torch.compile
``_orig_mod.`` at any place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy


class Names(NamedTuple):
    """``pairs``: the model's name -> the file's; ``more``: of the file, with the prefix, and not the model's.

    ``of_file``, ``of_model``: the prefixes that were left off; ``rivals``: others of the file that fit as well.
    """

    pairs: dict[str, str]
    more: list[str]
    of_file: str
    of_model: str
    rivals: list[str]

    def said(self) -> str:
        """The prefix that was left off, for the user; empty where the names are the same."""
        parts = [f'"{prefix}" before {whose} names' for prefix, whose in self._left_off() if prefix]
        inside = any(".".join(_bare(name)) != name for pair in self.pairs.items() for name in pair)
        parts += ['"_orig_mod." in names'] if inside else []
        return f"left off: {', '.join(parts)}" if parts else ""

    def _left_off(self) -> tuple[tuple[str, str], ...]:
        return (self.of_file, "the file's"), (self.of_model, "the model's")


def fit(of_file: Iterable[str], of_model: Collection[str], prefix: str | None = None) -> Names:
    """The prefixes, of the file and of the model, without which most names are the same; none, if that does as well.

    ``prefix``: of the file, where it is known. The model's can only be one of all that are in modules
    (``AveragedModel`` counts in ``n_averaged``, and has all else in ``module.``).
    """
    theirs: dict[tuple[str, ...], str] = {}
    for name in of_file:
        theirs.setdefault(_bare(name), name)
    ours = {_bare(name): name for name in of_model}
    common = _common(ours)
    given = None if prefix is None else _bare(prefix.rstrip("."))
    hits: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    for length in range(len(common) + 1):
        short = {name[length:] for name in ours if len(name) > length}
        for parts in theirs:
            for i in range(len(parts)):
                if parts[i:] in short and (given is None or parts[:i] == given):
                    hits[parts[:i], common[:length]] += 1
    hits.setdefault((given or (), ()), 0)
    most = max(hits.values())
    best = [prefixes for prefixes, count in hits.items() if count == most]
    before, left = min(best, key=lambda both: len(both[0]) + len(both[1]))
    under = {name[len(before) :]: whole for name, whole in theirs.items() if name[: len(before)] == before}
    inside = {name[len(left) :]: whole for name, whole in ours.items() if name[: len(left)] == left}
    pairs = {whole: under[name] for name, whole in inside.items() if name in under}
    more = sorted(set(under.values()) - set(pairs.values()))
    rivals = [_prefix(other) for other, its_left in best if before and its_left == left and other != before]
    return Names(pairs, more, _prefix(before), _prefix(left), rivals)


def twins(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each name of a ``state_dict(keep_vars=True)`` those of the same tensor: shared modules, tied weights.

    Files may hold one of them: safetensors' ``save_model`` leaves out the others.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, t in state.items():
        place: tuple[object, ...] = (id(t),)
        if isinstance(t, Tensor) and not is_lazy(t) and not t.is_meta and t.numel():
            place = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        groups.setdefault(place, []).append(name)
    return {name: group for group in groups.values() for name in group}


def _bare(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part and part != "_orig_mod")


def _prefix(parts: tuple[str, ...]) -> str:
    return "".join(f"{part}." for part in parts)


def _common(names: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Before the last part of each name, what all have in common that have something there."""
    heads = [name[:-1] for name in names if len(name) > 1]
    pairs = zip(min(heads, default=()), max(heads, default=()), strict=False)
    return tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
