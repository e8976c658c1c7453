"""Train low-bit networks with gradients that ask the quantized loss.

fogzo.quantize_(model, fogzo.lsq(bits=2))
estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
...
loss.backward()
estimator.refine_grads_(lambda: loss_fn(model(x), y), expected_loss=loss)
optimizer.step()
"""

from fogzo.activations import calibrate_
from fogzo.attach import dequantize_, quantize_, quantized_weights
from fogzo.estimators import (
    ControlVariateEstimator,
    FogzoEstimator,
    PlaceboEstimator,
    SpsaEstimator,
)
from fogzo.quantizers import Quantizer, abs_max, fixed, lsq, quest, sign, ternary
from fogzo.schedules import every, linear_noise_share
from fogzo.weights import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "ControlVariateEstimator",
    "FogzoEstimator",
    "PlaceboEstimator",
    "QuantizedWeight",
    "Quantizer",
    "SpsaEstimator",
    "abs_max",
    "calibrate_",
    "dequantize_",
    "every",
    "fixed",
    "linear_noise_share",
    "lsq",
    "quantize_",
    "quantized_weights",
    "quest",
    "sign",
    "ternary",
]
