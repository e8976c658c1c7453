"""Gradient estimators: FOGZO and the family it is compared with."""

from fogzo.estimators.base import GradientEstimator
from fogzo.estimators.family import (
    ControlVariateEstimator,
    FogzoEstimator,
    PlaceboEstimator,
    SpsaEstimator,
)
from fogzo.estimators.schedules import every, linear_noise_share
from fogzo.estimators.stats import RefineStats

__all__ = [
    "ControlVariateEstimator",
    "FogzoEstimator",
    "GradientEstimator",
    "PlaceboEstimator",
    "RefineStats",
    "SpsaEstimator",
    "every",
    "linear_noise_share",
]
