"""Sources of training statistics."""

from batchnorm.nn.sources.batch import Batch
from batchnorm.nn.sources.domains import Domains
from batchnorm.nn.sources.ghost import Ghost
from batchnorm.nn.sources.renorm import Renorm
from batchnorm.nn.sources.source import Source
from batchnorm.nn.sources.synced import Synced

__all__ = ["Batch", "Domains", "Ghost", "Renorm", "Source", "Synced"]
