"""Measuring losses at perturbed weights, with everything borrowed given back."""

from fogzo.probing.linearized import LinearizedLoss

__all__ = ["LinearizedLoss"]
