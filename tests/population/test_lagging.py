"""The lagging average on real images: good in train, bad in eval, and mended."""

import torch
from torch import nn

import batchnorm as bn
from batchnorm.racing.data import load_images

STEPS, BATCH, HELD_OUT = 100, 128, 2000


def network():
    def block(*channels):
        return nn.Conv2d(*channels, 3, 2, 1, bias=False), bn.BatchNorm2d(channels[1], momentum=0.001, activation="relu")

    return nn.Sequential(
        *block(1, 16), *block(16, 32), *block(32, 64), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    )


def accuracy(model, x, labels):
    """In percent, in the mode that the model is in."""
    with torch.no_grad(), bn.preserve_state(model):
        return 100 * (model(x).argmax(1) == labels).float().mean().item()


def test_recalibrate_brings_eval_to_the_accuracy_of_train():
    """Seeds 0 to 5 had 77.3 to 80.2% in train mode, 9.7 to 32.7% in eval, and then that of train, to 0.3 points."""
    images = load_images()
    shuffled = torch.randperm(len(images.train_images))[: STEPS * BATCH]
    x, labels = images.train_images[shuffled, None].float() / 255, images.train_labels[shuffled].long()
    x_test, labels_test = images.test_images[:HELD_OUT, None].float() / 255, images.test_labels[:HELD_OUT].long()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x_batch, labels_batch in zip(x.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_batch), labels_batch).backward()
        optimizer.step()
    in_train = accuracy(model.train(), x_test, labels_test)
    lagging = accuracy(model.eval(), x_test, labels_test)
    bn.recalibrate(model, x.split(BATCH), max_batches=20)
    mended = accuracy(model, x_test, labels_test)
    assert in_train > 75
    assert lagging < in_train - 30
    assert abs(mended - in_train) < 1
