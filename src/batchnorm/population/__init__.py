"""Running statistics as users handle them: estimated anew, frozen, kept, updated once for several batches."""

from batchnorm.population.estimate import recalibrate
from batchnorm.population.frozen import freeze, unfreeze
from batchnorm.population.scopes import accumulate_statistics, preserve_state

__all__ = ["accumulate_statistics", "freeze", "preserve_state", "recalibrate", "unfreeze"]
