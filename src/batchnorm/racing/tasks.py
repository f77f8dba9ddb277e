"""The tasks that are built in, by name; each function takes the directory of ``--data``."""

from __future__ import annotations

from collections.abc import Callable

from batchnorm.racing import tabular, zoo, zoo_imagenet
from batchnorm.racing.task import Task

TASKS: dict[str, Callable[[str | None], Task]] = {
    "inception": zoo.inception_task,
    "mlp": zoo.mlp_task,
    "covertype": tabular.covertype_task,
    "imagenet": zoo_imagenet.inception_task,
    "imagenet-resnet50": zoo_imagenet.resnet50_task,
}
