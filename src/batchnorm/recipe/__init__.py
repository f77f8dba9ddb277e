"""Changes to training that batch normalization permits, as one value; and a test of learning rates."""

from batchnorm.recipe.accelerate import accelerate
from batchnorm.recipe.muon import Muon
from batchnorm.recipe.range_test import find_learning_rate
from batchnorm.recipe.recipe import RECIPES, Recipe

__all__ = ["RECIPES", "Muon", "Recipe", "accelerate", "find_learning_rate"]
