"""What BN is worth: the steps with it over the steps without, to the same accuracy.

Fashion-MNIST pooled to 14 x 14, as vectors; perceptrons of 6, 12, 26 and 50 layers of 64 units (the input's and the
output's among them), ReLU, He's initialization, batches of 128; plain, and with skip connections: blocks act(x + f(x))
of two layers, the second of which begins smaller by the square root of the number of blocks. Each with BN before every
nonlinearity (the same weights, ``batchnorm.insert``) and without. Optimizers: SGD with momentum 0.9, AdamW, Muon (all
weights but the last layer's orthogonalized; the other parameters by SGD with Nesterov's momentum at 3 times its rate),
SOAP, all else at their defaults. Beside that: 12 plain layers with tanh and with sigmoid (Glorot's initialization);
and with batches of 32 and 512, of as many images in all (SGD and Muon).

Budgets are N / 16, N / 8, N / 4, N / 2 and N steps, N = 1,024 (with --quick 256; 6 and 26 layers, SGD and Muon). Each
run is trained for its budget from the start, its rate rising for 5% of the steps and then falling to zero, so that only
ends count: the mean of the accuracies at 90, 95 and 100% of the steps, with population statistics over 2,000 training
images; that of a run that diverged is chance. Rates are chosen for each side at each budget alike, by the same rule:
from a grid of four, a factor of 3 or so apart, the same for both sides, one run each; one more beyond an edge that is
best, up to two; the two best rates once more with another seed; then the better mean counts. They are chosen by 5,000
training images held out of training, with seeds that are not measured. At that rate as many runs as --seeds are
measured, by the 10,000 test images.

The target is what the network without BN ends at after N steps, mean over seeds less its standard error. A side's steps
to it are where its mean accuracy over budgets, made monotone (isotonic regression), is at the target, linear in
log(steps) in between; the share is that with BN over that without. Where BN does not reach the target within N steps,
the target is what BN ends at, and the share is above 1. "At most": BN is there with its smallest budget; "never": the
other side has not begun to learn (below 25%) after N steps. Intervals: from the seeds resampled with replacement, the
same ones on both sides, the target computed anew each time; of fewer than six seeds the range of all resamples, which
is no interval of 95%. The choice of the rates is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm.experiments import style
from batchnorm.experiments.annealing import OPTIMIZERS, annealed, chosen, network_of
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.racing.score import ENOUGH, Curves, level, resamples, tail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS, DIVISORS, STEPS, QUICK_STEPS, BATCH = (6, 12, 26, 50), (16, 8, 4, 2, 1), 1_024, 256, 128
OTHER_DEPTH, OTHER_ACTIVATIONS, OTHER_BATCHES = 12, ("tanh", "sigmoid"), (32, 512)
AT_CHANCE, DEEPEST = 0.25, 0.5
LOOKS = {
    "SGD": ("#444444", "--", "s"),
    "AdamW": ("#b0a060", ":", "D"),
    "Muon": ("#1f77b4", "-", "o"),
    "SOAP": ("#c8102e", "-.", "^"),
}
CLAIM = Claim(
    "worth",
    "The deeper and the more saturating a network, the more steps BN saves, whatever the optimizer.",
    "Sections 1, 3.3 and 4.2; the question of depth, skip connections and optimizers is ours",
    "for every optimizer: without skip connections the share of the steps falls (or stays) with each depth, and is at "
    f"most {DEEPEST:.0%} at the deepest; it falls (or stays) from ReLU to tanh to sigmoid; with skip connections BN "
    "still costs no steps, and saves no more than without them: at every depth the share is at most 1, and at least "
    "that of the plain network (point estimates; what is at most the smallest budget's, or never, counts as that)",
)
Case = tuple[int, bool, str, int]  # depth, skips, activation, batch
Key = tuple[Case, str]  # with an optimizer


def cells(quick: bool, seeds: int) -> list[Cell]:
    """Networks x optimizers x sides x budgets; the longest first. In each: the choice of a rate, and all seeds."""
    depths, optimizers = ((6, 26), ("SGD", "Muon")) if quick else (DEPTHS, tuple(OPTIMIZERS))
    cases = [((d, s, "relu", BATCH), o) for d in depths for s in (False, True) for o in optimizers]
    if not quick:
        cases += [((OTHER_DEPTH, False, act, BATCH), o) for act in OTHER_ACTIVATIONS for o in optimizers]
        cases += [((OTHER_DEPTH, False, "relu", batch), o) for batch in OTHER_BATCHES for o in ("SGD", "Muon")]
    found = [
        {
            "depth": depth, "skips": skips, "activation": act, "batch": batch, "optimizer": optimizer,
            "batch_norm": norm, "divisor": divisor, "seeds": seeds,
            "steps": (QUICK_STEPS if quick else STEPS) * BATCH // batch,
        }
        for ((depth, skips, act, batch), optimizer), norm, divisor in product(cases, (True, False), DIVISORS)
    ]  # fmt: skip
    return sorted(found, key=lambda c: -c["depth"] * c["steps"] / c["divisor"])


def measure(
    depth: int, skips: bool, activation: str, batch: int, optimizer: str, batch_norm: bool, divisor: int, seeds: int,
    steps: int,
) -> Record:  # fmt: skip
    """The rate, as it was chosen, and the ends of the runs at it."""
    kind = OPTIMIZERS[optimizer]

    def run(rate: float, seed: int, *score: str) -> dict[str, float]:
        network = network_of(depth, skips, activation, batch_norm=batch_norm, seed=seed)
        made = kind.make(network, rate, batch_norm)
        return annealed(network, made, steps=max(1, steps // divisor), batch=batch, seed=seed, score=score)

    choice = chosen(lambda rate, seed: run(rate, seed, "held out")["held out"], kind.rates)
    ends = [run(choice["rate"], seed, "held out", "test") for seed in range(seeds)]
    return choice | {"ends": [end["test"] for end in ends], "held_out": [end["held out"] for end in ends]}


@dataclass(frozen=True)
class Share:
    """Steps with BN over steps without; 0: never without BN; infinite: never with; nan: neither.

    ``bound``: "≤" or "≥" where the faster side is there with its smallest budget.
    """

    value: float
    bound: str = ""

    def __str__(self) -> str:
        known = {0.0: "never without", math.inf: "never with BN"}
        number = f"{self.value:.0%}" if self.value < 2 else f"{self.value:.1f}x"
        return "neither" if math.isnan(self.value) else known.get(self.value, self.bound + number)

    @property
    def counted(self) -> float:
        """As the claim counts it."""
        smallest = 1 / max(DIVISORS)
        return smallest if self.bound == "≤" or self.value < smallest else self.value


def share_of(without: Curves, with_bn: Curves, seeds: Any) -> Share:
    """From the ends of both sides, over the logarithm of their budgets; of some seeds."""
    both = (without, with_bn)
    learns, learns_with = (bool(side.scores[seeds, -1].mean() > AT_CHANCE) for side in both)
    if not (learns and learns_with):
        return Share(math.inf if learns else 0.0 if learns_with else math.nan)
    for side in both:
        ends = side.scores[seeds, -1]
        error = ends.std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
        slow, fast = (one.steps_to(float(ends.mean() - error), seeds) for one in both)
        if fast < math.inf:
            break
    first = float(without.steps[0])
    bound = "" if slow == fast else "≤" if fast == first else "≥" if slow == first else ""
    return Share(math.exp(fast - slow), bound)


def conclude(records: list[Record]) -> Result:
    """The table of shares, and what of the claim holds."""
    cases: dict[Key, dict[bool, list[Record]]] = {}
    for r in sorted(records, key=lambda r: -r["divisor"]):
        key = ((r["depth"], r["skips"], r["activation"], r["batch"]), r["optimizer"])
        cases.setdefault(key, {False: [], True: []})[r["batch_norm"]].append(r)
    optimizers = [o for o in OPTIMIZERS if any(key[1] == o for key in cases)]
    shares: dict[Key, Share] = {}
    intervals: dict[Key, tuple[Share, Share]] = {}
    for key, sides in cases.items():
        without, with_bn = (
            Curves(np.log([1 / r["divisor"] for r in side]), np.array([r["ends"] for r in side]).T)
            for side in sides.values()
        )
        number = len(without.scores)
        shares[key] = share_of(without, with_bn, np.arange(number))
        if number > 1:
            found = sorted((share_of(without, with_bn, seeds) for seeds in resamples(number)), key=_by_value)
            beyond = int(tail(number) * len(found)) if number >= ENOUGH else 0
            intervals[key] = (found[beyond], found[-1 - beyond])
    seeds = min(len(r["ends"]) for r in records)
    depths = sorted({case[0] for case, _ in cases if case[2:] == ("relu", BATCH)})
    holds = {o: _holds(shares, o, depths) for o in optimizers}
    held = {part: [o for o in optimizers if all(holds[o][part])] for part in holds[optimizers[0]]}

    def field(key: Key) -> str:
        if key not in shares:
            return "-"
        ends = [str(end) for end in intervals.get(key, ())]
        low_high = f" ({' to '.join(ends)})" if len(set(ends)) > 1 else ""
        without, with_bn = (f"{100 * np.mean(cases[key][norm][-1]['ends']):.1f}" for norm in (False, True))
        return f"{shares[key]}{low_high}; {without} → {with_bn}%"

    def over_optimizers(depth: int, skips: bool) -> str:
        some = sorted((shares[(depth, skips, "relu", BATCH), o] for o in optimizers), key=_by_value)
        return str(some[0]) if str(some[0]) == str(some[-1]) else f"{some[0]} to {some[-1]}"

    order = sorted({case for case, _ in cases}, key=lambda c: (c[3] != BATCH, c[2] != "relu", c[3], c[2], c[1], c[0]))
    plain, skips = ([over_optimizers(depth, skip) for depth in (depths[0], depths[-1])] for skip in (False, True))
    title = f"Steps with BN, of those without: at {depths[-1]} layers {plain[1]}, with skip connections {skips[1]}"
    return Result(
        all(len(some) == len(optimizers) for some in held.values()),
        f"Steps with BN, of those without to the same accuracy, over {', '.join(optimizers)}: at {depths[0]} layers "
        f"{plain[0]}, at {depths[-1]} {plain[1]}; with skip connections {skips[0]} and {skips[1]}.",
        [{"network": _name(case)} | {o: field((case, o)) for o in optimizers} for case in order],
        lambda figure: _draw(figure, title, shares, intervals, optimizers, depths),
        [
            f"A field: steps with BN over those without ({level(seeds)}); accuracy after N steps without BN → with.",
            *(f"The part on {part} holds with {', '.join(some) or 'no optimizer'}." for part, some in held.items()),
            *(f"Learning rates of {o}: {_rates(records, o)}." for o in optimizers),
            f"{sum(r['at_edge'] for r in records)} of {len(records)} rates are at the edge of what was tried for them.",
        ],
    )


def _holds(shares: dict[Key, Share], optimizer: str, depths: Sequence[int]) -> dict[str, list[bool]]:
    def counted(depth: int, skips: bool = False, activation: str = "relu") -> float:
        return shares[(depth, skips, activation, BATCH), optimizer].counted

    order = [counted(OTHER_DEPTH, False, a) for a in ("relu", *OTHER_ACTIVATIONS) if _has(shares, a)]
    plain = [counted(depth) for depth in depths]
    parts = {
        "depth": [*(a >= b for a, b in pairwise(plain)), plain[-1] <= DEEPEST],
        "saturation": [a >= b for a, b in pairwise(order)],
        "skips": [low <= counted(depth, True) <= 1 for depth, low in zip(depths, plain, strict=True)],
    }
    return {part: found for part, found in parts.items() if found}


def _has(shares: dict[Key, Share], activation: str) -> bool:
    return any(case == (OTHER_DEPTH, False, activation, BATCH) for case, _ in shares)


def _by_value(share: Share) -> float:
    """Sort key: unknown shares, as neither side trains, come last."""
    return math.inf if math.isnan(share.value) else share.value


def _name(case: Case) -> str:
    depth, skips, activation, batch = case
    known = [activation.replace("relu", "ReLU"), "skips" if skips else "plain", f"{depth} layers"]
    return ", ".join([*known, *([f"batches of {batch}"] if batch != BATCH else [])])


def _rates(records: Sequence[Record], optimizer: str) -> str:
    found = {
        n: [r["rate"] for r in records if (r["batch_norm"], r["optimizer"]) == (n, optimizer)] for n in (False, True)
    }
    return ", ".join(f"{min(r):g} to {max(r):g} {'with BN' if norm else 'without'}" for norm, r in found.items())


def _draw(
    figure: Figure,
    title: str,
    shares: dict[Key, Share],
    intervals: dict[Key, tuple[Share, Share]],
    optimizers: Sequence[str],
    depths: Sequence[int],
) -> None:
    """Depth to the right, the share of the steps upwards; plain networks left, with skip connections right."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure.set_size_inches(9, 4.8)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels = figure.subplots(1, 2, sharey=True)
    never, never_with = 1 / (2 * max(DIVISORS)), 2.0 * max(DIVISORS)  # where these are drawn

    def height(share: Share) -> float:
        return min(max(share.value, never), never_with)

    for axes, skips in zip(panels, (False, True), strict=True):
        for i, optimizer in enumerate(optimizers):
            keys: list[Key] = [((depth, skips, "relu", BATCH), optimizer) for depth in depths]
            x = [place + 0.08 * (i - (len(optimizers) - 1) / 2) for place in range(len(depths))]
            color, dash, marker = LOOKS[optimizer]
            axes.plot(x, [height(shares[key]) for key in keys], dash, color=color, marker=marker, label=optimizer)
            for place, key in zip(x, keys, strict=True):
                if key in intervals:
                    axes.plot([place] * 2, [height(end) for end in intervals[key]], color=color, linewidth=0.8)
                if shares[key].bound:
                    axes.annotate(shares[key].bound, (place, height(shares[key])), (-3, 6), textcoords="offset points")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
        axes.set_xlabel("layers")
        axes.set_title("with skip connections" if skips else "plain", fontsize=10)
        style.finish(axes)
    words = {never: "never without BN", never_with: "never with BN", 1: "as many steps"}
    drawn = [height(end) for key, share in shares.items() if key[0][2:] == ("relu", BATCH)
             for end in (share, *intervals.get(key, ()))]  # fmt: skip
    marks = [never * 2**i for i in range(round(math.log2(never_with / never)) + 1)]
    low = max(mark for mark in marks if mark <= min(0.5, *drawn))
    high = min(mark for mark in marks if mark >= max(2.0, *drawn))
    ticks = [mark for mark in marks if low <= mark <= high]
    panels[0].yaxis.set_major_locator(FixedLocator(ticks))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: words.get(y, f"{100 * y:.3g}%" if y < 1 else f"{y:g} times"))
    )
    panels[0].set_ylim(low * 0.85, high * 1.15)
    panels[0].set_ylabel("steps with BN, of the steps without")
    panels[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
