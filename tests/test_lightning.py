"""lightning.py: what is validated and saved has population statistics, and training does not notice (pains 1, 21)."""

import copy
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from processes import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import batchnorm as bn
from batchnorm.lightning import Recalibrate

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
HELD_OUT = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|`enable_checkpointing`|isinstance.treespec).*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def network(layer: type[nn.Module] = bn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), layer(8, momentum=0.001), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def loss(y: Tensor, x: Tensor) -> Tensor:
    return (y - x.sin().sum(1, keepdim=True)).square().mean()


class Regression(pl.LightningModule):
    """Keeps the states that it was evaluated with."""

    def __init__(self, layer: type[nn.Module] = bn.BatchNorm1d) -> None:
        super().__init__()
        self.net = network(layer)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss(self(batch[0]), batch[0])

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen.append(copy.deepcopy(self.net.state_dict()))
        self.log("val", loss(self(batch), batch))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X), batch_size=20, **{"shuffle": True, **options})


def val_loader() -> DataLoader[Any]:
    return DataLoader(HELD_OUT, batch_size=40)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    checkpoints = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": checkpoints}
    return pl.Trainer(
        callbacks=list(callbacks), logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **defaults | options,
    )  # fmt: skip


def assert_population(state: dict[str, Tensor], x: Tensor = X, **tolerance: float) -> None:
    """The statistics in there are those of all of x under the weights in there."""
    hidden = x.double() @ state["0.weight"].double().T + state["0.bias"].double()
    torch.testing.assert_close(state["1.running_mean"].double(), hidden.mean(0), **tolerance or TOLERANCE)
    torch.testing.assert_close(state["1.running_var"].double(), hidden.var(0), **tolerance or TOLERANCE)


TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 buffers


def saved(file: Path | str) -> dict[str, Tensor]:
    return {k.removeprefix("net."): t for k, t in torch.load(file, weights_only=True)["state_dict"].items()}


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_the_metric_is_that_of_the_population_statistics(tmp_path: Path, layer: type[nn.Module]) -> None:
    module, callback = Regression(layer), Recalibrate()
    t = trainer(tmp_path, callback)
    t.fit(module, train_loader(), val_loader())
    initial, *evaluated = module.seen
    assert initial["1.running_mean"].eq(0).all()  # the sanity check
    assert len(evaluated) == 2
    for state in evaluated:
        assert_population(state)
    net = network(layer).eval()
    net.load_state_dict(evaluated[-1])
    expected = loss(net(HELD_OUT), HELD_OUT).item()
    assert t.callback_metrics["val"].item() == pytest.approx(expected, rel=1e-5)
    (row,) = callback.report
    assert (row.layer, row.values) == ("net.1", 60)
    for evaluate in (t.validate, t.test):
        evaluate(module, val_loader(), verbose=False)
        assert t.callback_metrics["val"].item() == pytest.approx(expected, rel=1e-5)
    plain = Regression(layer)
    trainer(tmp_path).fit(plain, train_loader(), val_loader())
    with pytest.raises(AssertionError, match="not close"):
        assert_population(plain.seen[-1])


@pytest.mark.parametrize(
    ("options", "validated"),
    [({}, True), ({}, False), ({"every_n_train_steps": 2}, True), ({"save_weights_only": True}, False),
     ({"save_weights_only": True, "every_n_epochs": 1, "save_on_train_epoch_end": False}, True)],
    ids=str,
)  # fmt: skip
def test_checkpoints_hold_them(tmp_path: Path, options: dict[str, Any], validated: bool) -> None:
    files = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **options)
    trainer(tmp_path, files, Recalibrate()).fit(Regression(), train_loader(), val_loader() if validated else None)
    found = list(tmp_path.glob("*.ckpt"))
    assert len(found) == (3 if options.get("every_n_train_steps") else 2)
    for file in found:
        assert_population(saved(file))


def test_with_nothing_to_evaluate_the_trained_model_has_them(tmp_path: Path) -> None:
    module = Regression()
    trainer(tmp_path, Recalibrate()).fit(module, train_loader())
    assert_population(module.net.state_dict())
    trainer(tmp_path, Recalibrate()).fit(module, train_loader())  # on from there
    assert_population(module.net.state_dict())


class Noisy(Dataset[Any]):
    """Python's random numbers as augmentation."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (X[i] + random.random(),)


@pytest.mark.parametrize(
    "options",
    [{}, {"generator": torch.Generator()}, {"num_workers": 1, "persistent_workers": True},
     {"dataset": Noisy}],
    ids=["plain", "generator", "workers", "noisy"],
)  # fmt: skip
def test_training_does_not_notice(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = []
    for callbacks in ([], [Recalibrate()]):
        module, mine = Regression(), {"batch_size": 12, "shuffle": True} | options
        if "generator" in mine:
            mine["generator"].manual_seed(5)
        loader = DataLoader(mine.pop("dataset", lambda: TensorDataset(X))(), **mine)
        pl.seed_everything(3, verbose=False)
        trainer(tmp_path, *callbacks, val_check_interval=2).fit(module, loader, val_loader())
        weights.append({k: t for k, t in module.net.state_dict().items() if "running" not in k and "batches" not in k})
        assert module.training
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    files = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    trainer(tmp_path, files, Recalibrate(), max_epochs=1).fit(Regression(), train_loader(), val_loader())
    module = Regression()
    trainer(tmp_path, Recalibrate(), max_epochs=3).fit(
        module, train_loader(), val_loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), weights_only=True
    )
    loaded, _, last = module.seen
    assert all(torch.equal(t, loaded[key]) for key, t in saved(tmp_path / "epoch=0.ckpt").items())
    assert not torch.equal(last["0.weight"], loaded["0.weight"])
    assert_population(last)


def test_averaged_weights_get_their_own(tmp_path: Path) -> None:
    files = ModelCheckpoint(dirpath=tmp_path)
    module = Regression()
    t = trainer(tmp_path, EMAWeightAveraging(decay=0.5), Recalibrate(), files)
    t.fit(module, train_loader(), val_loader())
    averaged = saved(files.best_model_path)
    assert_population(averaged)
    for state in (module.seen[-1], module.net.state_dict()):
        assert_population(state)
        assert torch.equal(state["0.weight"], averaged["0.weight"])
    current = torch.load(files.best_model_path, weights_only=True)["current_model_state"]
    assert not torch.equal(current["net.0.weight"], averaged["0.weight"])


def test_batches_forward_and_limits(tmp_path: Path) -> None:
    module, batches = Regression(), [{"x": part} for part in X[:48].split(12)]
    callback = Recalibrate(3, batches, forward=lambda module, batch: module(batch["x"]), estimator="batch_mean")
    trainer(tmp_path, callback).fit(module, train_loader(), val_loader())
    assert module.seen[0]["1.running_mean"].eq(0).all()  # the sanity check
    assert callback.report[0].values == 36
    torch.testing.assert_close(module.net[1].running_mean, module.net[0](X[:36]).mean(0), **TOLERANCE)
    callback = Recalibrate()
    trainer(tmp_path, callback, limit_train_batches=2).fit(module, train_loader())
    assert callback.report[0].values == 40


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_under_the_trainers_precision(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    module, dtypes = Regression(), set()
    callback = Recalibrate(forward=lambda module, batch: dtypes.add(module(batch[0]).dtype))
    trainer(tmp_path, callback, precision=precision).fit(module, train_loader(), val_loader())
    assert dtypes == {dtype}
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    assert_population(module.seen[-1], **tolerance)


def trained_on_a_rank(rank: int, world: int, folder: Path) -> str:
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does: the trainer starts no processes
    files = ModelCheckpoint(dirpath=folder)
    t = trainer(folder, files, Recalibrate(), devices=world, strategy="ddp", max_epochs=1)
    assert t.world_size == world
    t.fit(Regression(), train_loader(), val_loader())
    return files.best_model_path


def test_two_processes_pool_their_values(tmp_path: Path) -> None:
    file, _ = on_ranks(2, trained_on_a_rank, tmp_path)
    assert_population(saved(file))


def test_a_bad_batch_warns_and_training_goes_on(tmp_path: Path) -> None:
    module = Regression()
    with pytest.warns(UserWarning, match="no population statistics at step 3: layer net.1 saw values that are not"):
        trainer(tmp_path, Recalibrate(batches=[X * torch.inf]), max_epochs=1).fit(module, train_loader())
    assert module.net[1].running_mean.isfinite().all()


def test_a_checkpoint_of_an_exception_is_saved_as_things_are(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise OSError("full")

    files = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True)
    with pytest.raises(OSError, match="full"):
        trainer(tmp_path, Recalibrate(), files, Fails()).fit(Regression(), train_loader())
    (file,) = tmp_path.glob("*.ckpt")
    assert saved(file)["1.num_batches_tracked"] == 1


def test_without_training_batches_it_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="knows no training batches here.*pass batches="):
        trainer(tmp_path, Recalibrate()).test(Regression(), val_loader(), verbose=False)
    module = Regression()
    trainer(tmp_path, Recalibrate(batches=[X])).test(module, val_loader(), verbose=False)
    assert_population(module.net.state_dict())


class Hooks:
    """Each does its part of what a training batch is; those of validation are no lists."""

    def on_before_batch_transfer(self, batch: Any, index: int) -> Any:
        return [batch[0] / 2] if isinstance(batch, list) else batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        return [batch[0].to(device) + 5] if isinstance(batch, list) else batch

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        module = self.trainer.lightning_module  # type: ignore[attr-defined]
        in_training = self.trainer.training and module.training and module.net.training  # type: ignore[attr-defined]
        return [batch[0] * 7] if isinstance(batch, list) and in_training else batch


class Hooked(Hooks, Regression):
    pass


class Data(Hooks, pl.LightningDataModule):
    pass


@pytest.mark.parametrize("given", ["loader", "batches", "forward"])
@pytest.mark.parametrize("hooks", ["module", "data"])
def test_batches_go_the_way_of_training(tmp_path: Path, hooks: str, given: str) -> None:
    """Before validation too, when trainer and modules are in evaluation."""
    options: dict[str, Any] = {
        "loader": {},
        "batches": {"batches": [[part] for part in X.split(20)]},
        "forward": {"forward": lambda module, batch: module(batch[0])},
    }[given]
    module, data = (Hooked(), pl.LightningDataModule()) if hooks == "module" else (Regression(), Data())
    data.train_dataloader, data.val_dataloader = train_loader, val_loader  # type: ignore[method-assign]
    trainer(tmp_path, Recalibrate(**options), max_epochs=1).fit(module, datamodule=data)
    for state in (module.seen[-1], module.net.state_dict()):
        assert_population(state, (X / 2 + 5) * 7)


class Graphs:
    """As of PyG: knows how to go to a device."""

    def __init__(self, x: Tensor, moved: bool = False) -> None:
        self.x, self.moved = x, moved

    def to(self, *_: Any, **__: Any) -> "Graphs":
        return Graphs(self.x, True)


def test_batches_that_are_objects_or_mappings(tmp_path: Path) -> None:
    class OnGraphs(Regression):
        def forward(self, x: Any) -> Tensor:
            assert x.moved
            return super().forward(x.x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(batch).square().mean()

    class ByName(Regression):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * scale)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(**batch).square().mean()

    for kind, collate in (
        (OnGraphs, lambda rows: Graphs(torch.stack(rows))),
        (ByName, lambda rows: {"x": torch.stack(rows), "scale": torch.tensor(1.0)}),
    ):
        module = kind()
        loader = DataLoader(X, batch_size=20, collate_fn=collate)  # type: ignore[arg-type]
        trainer(tmp_path, Recalibrate(), max_epochs=1).fit(module, loader)
        assert_population(module.net.state_dict())


class WithoutForward(Regression):
    """Calls its network by itself."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss(self.net(batch[0]), batch[0])


def test_a_module_without_forward_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    def fit(callback: Recalibrate) -> WithoutForward:
        module = WithoutForward()
        trainer(tmp_path, callback, max_epochs=1).fit(module, train_loader())
        return module

    with pytest.raises(TypeError, match="WithoutForward has no forward: pass forward="):
        fit(Recalibrate())
    assert_population(fit(Recalibrate(forward=lambda module, batch: module.net(batch[0]))).net.state_dict())


class OfTwo(Regression):
    """Trained on a labelled loader beside another one, as semi-supervised training is."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = first_of(batch)
        return loss(self(x), x)


def first_of(batch: Any) -> Tensor:
    x: Tensor = batch["a"][0] if isinstance(batch, dict) else batch[0][0]
    return x


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("loaders", "mode"), [({"a": 20, "b": 10}, "max_size_cycle"), ([20, 30], "min_size"), ([20], "max_size")]
)
def test_several_loaders_read_together(given: bool, loaders: Any, mode: Any, tmp_path: Path) -> None:
    """As training_step gets them; the random order of the epochs stays."""

    def combined(shuffle: bool = True) -> CombinedLoader:
        def one(size: int) -> DataLoader[Any]:
            generator = torch.Generator().manual_seed(1)
            return DataLoader(TensorDataset(X), batch_size=size, shuffle=shuffle, generator=generator)

        made = {k: one(n) for k, n in loaders.items()} if isinstance(loaders, dict) else [one(n) for n in loaders]
        return CombinedLoader(made, mode)

    def forward(module: Any, batch: Any) -> Tensor:
        return module(first_of(batch))  # type: ignore[no-any-return]

    plain = OfTwo()
    trainer(tmp_path).fit(plain, combined(), val_loader())
    module = OfTwo()
    callback = Recalibrate(batches=combined() if given else None, forward=forward)
    trainer(tmp_path, callback).fit(module, combined(), val_loader())
    for name, p in plain.named_parameters():
        assert torch.equal(p, module.get_parameter(name))
    assert callback.report[0].values == {"min_size": 40, "max_size": 60, "max_size_cycle": 120}[mode]
    if mode == "max_size":
        assert_population(module.net.state_dict())


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"batches is a Tensor of shape \(60, 4\), whose rows"):
        Recalibrate(batches=X)
    with pytest.raises(TypeError, match=r"several times, got an iterator \(list_iterator\)"):
        Recalibrate(batches=iter([X]))
    with pytest.raises(ValueError, match='unknown estimator "ema"'):
        Recalibrate(estimator="ema")
    with pytest.raises(ValueError, match="max_batches must be a whole number, at least 1"):
        Recalibrate(0)
    with pytest.raises(TypeError, match="takes batches of 2 training loaders: pass forward="):
        trainer(tmp_path, Recalibrate()).fit(Regression(), [train_loader(), train_loader()])
