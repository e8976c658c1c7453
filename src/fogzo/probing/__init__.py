"""Measuring losses at perturbed weights, with everything borrowed given back."""
