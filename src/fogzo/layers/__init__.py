"""Quantized layers: attaching quantizers to a model, and the weights that an estimator refines."""

from fogzo.layers.attach import (
    dequantize_,
    measure_step_sizes_,
    quantize_,
    quantized_weights,
)
from fogzo.layers.calibration import calibrate_
from fogzo.layers.parameter_groups import parameter_groups
from fogzo.layers.quantized_layer import QuantizedLayer
from fogzo.layers.weights import QuantizedWeight

__all__ = [
    "QuantizedLayer",
    "QuantizedWeight",
    "calibrate_",
    "dequantize_",
    "measure_step_sizes_",
    "parameter_groups",
    "quantize_",
    "quantized_weights",
]
