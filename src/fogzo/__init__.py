"""Train low-bit networks with gradients that ask the quantized loss.

fogzo.quantize_(model, fogzo.lsq(bits=2))
estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
...
loss.backward()
estimator.refine_grads_(lambda: loss_fn(model(x), y), expected_loss=loss)
optimizer.step()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # Torch takes a second or more to import, and comes with the first name that is asked for:
    # before it, a command must be able to answer Ctrl-C, and a worker to see its parent die.
    if not name.startswith("__") and "quantize_" not in globals():
        sources = ("activations", "attach", "estimators", "quantizers", "schedules", "weights")
        found = [vars(import_module(f"{__name__}.{source}")) for source in sources]
        globals().update({n: names[n] for names in found for n in __all__ if n in names})
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
