"""Trainings that nobody here wrote, monai's and transformers', raced as they are: a Task of a few lines each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import pytest
import torch
import transformers
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

import batchnorm as bn


def blobs(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Noisy images (1, 32, 32) with a disc in them, and where it is, (1, 32, 32)."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    found = []
    for y, x, r in (torch.rand(n, 3, generator=draw) * torch.tensor([16, 16, 6]) + torch.tensor([8, 8, 4])).tolist():
        label = ((rows - y) ** 2 + (columns - x) ** 2 < r**2)[None].long()
        found.append({"image": label + 0.5 * torch.randn(1, 32, 32, generator=draw), "label": label})
    return found


def sentences(n: int, seed: int) -> list[dict[str, Any]]:
    """Between 5 and 12 of 20 words; the label says whether word 3 is among them."""
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(1, 20, (length,), generator=draw) for length in torch.randint(5, 13, (n,), generator=draw)]
    return [{"input_ids": some, "labels": int((some == 3).any())} for some in words]


def padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As transformers' collators do it."""
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([i["labels"] for i in items])}


def boxes(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Images, and a dict for each of what is in it: classes and boxes (center and size, as shares)."""
    places = [item["label"][0].nonzero().float() / 32 for item in items]
    found = [torch.cat([(p.amin(0) + p.amax(0)).flip(0) / 2, (p.amax(0) - p.amin(0)).flip(0)])[None] for p in places]
    labels = [{"class_labels": torch.zeros(1, dtype=torch.long), "boxes": each} for each in found]
    return {"pixel_values": torch.stack([item["image"].expand(3, -1, -1) for item in items]), "labels": labels}


def unet() -> bn.Task:
    def model() -> nn.Module:
        return monai.networks.nets.UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), norm="batch")

    return bn.Task(
        "monai's UNet", model, blobs(200, 0), blobs(60, 1), batch_size=10,
        forward=lambda model, batch: model(batch["image"]), loss=DiceLoss(to_onehot_y=True, softmax=True),
        metric=lambda outputs, labels: DiceMetric(num_classes=2)(outputs.argmax(1, keepdim=True), labels).mean(),
        metric_name="Dice", optimizer=lambda p: AdamW(p, lr=1e-3), clip_grad_norm=12.0,
    )  # fmt: skip


def bert() -> bn.Task:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=20, num_labels=2, hidden_dropout_prob=0.0)
    return bn.Task(
        "BERT", lambda: transformers.BertForSequenceClassification(config), sentences(800, 0), sentences(200, 1),
        collate=padded, optimizer=lambda p: AdamW(p, lr=1e-3), batch_size=16,
        scheduler=lambda optimizer, steps: transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps),
    )  # fmt: skip


def segformer() -> bn.Task:
    def batch(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images = torch.stack([item["image"].expand(3, -1, -1) for item in items])
        return {"pixel_values": images, "labels": torch.stack([item["label"][0] for item in items])}

    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16, "num_labels": 2}
    config = transformers.SegformerConfig(**sizes, num_attention_heads=[1, 1, 2, 2])
    return bn.Task(
        "SegFormer", lambda: transformers.SegformerForSemanticSegmentation(config), metric="loss", batch_size=10,
        train=DataLoader(blobs(200, 0), 10, shuffle=True, collate_fn=batch), test=blobs(60, 1), collate=batch,
        optimizer=lambda p: AdamW(p, lr=3e-3),
    )  # fmt: skip


def yolos() -> bn.Task:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=1)
    return bn.Task(
        "YOLOS", lambda: transformers.YolosForObjectDetection(config), blobs(200, 0), blobs(60, 1), collate=boxes,
        metric="loss", optimizer=lambda p: AdamW(p, lr=1e-3), clip_grad_norm=0.1, batch_size=10,
    )  # fmt: skip


RACES: dict[str, tuple[Callable[[], bn.Task], list[str], int]] = {
    "monai's UNet": (unet, ["as-is", "without-bn", "paper@2", "fast@2", "fused"], 60),
    "BERT": (bert, ["baseline", "bn-x5@2"], 60),
    "SegFormer": (segformer, ["as-is", "without-bn", "fused"], 30),
    "YOLOS": (yolos, ["baseline", "bn-x5@2"], 40),
}


@pytest.mark.parametrize("name", RACES)
def test_raced_as_it_is(name: str, tmp_path: Path) -> None:
    make, contenders, steps = RACES[name]
    results = bn.race(make(), contenders, steps=steps, seeds=1, mode="quick", out=tmp_path / "o")
    sign = -1 if results["lower_is_better"] else 1
    lines = [line.split(",") for line in (tmp_path / "o" / "curves.csv").read_text().splitlines()]
    first = {row[0]: float(row[lines[0].index("score")]) for row in reversed(lines[1:])}
    assert results["target"] is not None
    for row in results["contenders"]:
        assert "diverged" not in row["status"]
        assert sign * row["end"] > sign * first[row["name"]], row["name"]


@pytest.mark.parametrize("task", [unet, bert, yolos])
def test_the_page_shows_them_as_they_stand(task: Callable[[], bn.Task]) -> None:
    source = inspect.getsource(task).replace("  # fmt: skip", "")
    assert source in (Path(__file__).parents[2] / "docs" / "race.md").read_text()
    assert len(source.splitlines()) <= 12
