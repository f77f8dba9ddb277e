"""Learning-rate range tests of the race's network, without batch normalization and with it. From the root:

    python benchmarks/learning_rates.py --out docs/images/learning-rates.png

Batches of 256 training images of Fashion-MNIST, the same for both, the same initial weights. Prints the suggestions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import batchnorm as bn
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.loading import load_task
from batchnorm.racing.trainer import network_of

NETWORKS = {"without batch normalization": "baseline", "with batch normalization": "bn-x5"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("learning-rates.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("inception")
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
    batches = [task.train[indices] for indices in order.split(task.batch_size)[:100]]
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    for axes, (words, contender) in zip(figure.subplots(1, 2, sharex=True, sharey=True), NETWORKS.items(), strict=True):
        torch.manual_seed(0)
        found = bn.find_learning_rate(network_of(task, CONTENDERS[contender]), batches, highest=100)
        found.plot(axes)
        axes.set_title(f"{words}: the loss falls fastest at {found.rate:.2g}", loc="left")
        print(f"{words}: {found}")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
