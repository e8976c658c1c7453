"""Recipes: configs, data and the plain loop behind the commands."""

from fogzo.recipes.config import TrainConfig
from fogzo.recipes.registry import RECIPES
from fogzo.recipes.train import train

__all__ = ["RECIPES", "TrainConfig", "train"]
