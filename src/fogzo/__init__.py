"""Train low-bit networks: quantizers, straight-through rules and FOGZO's measured gradients.

fogzo.quantize_(model, fogzo.lsq(bits=2))
estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
...
loss = estimator.record(compute_loss, x, y)
loss.backward()
estimator.refine_grads_()
optimizer.step()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fogzo.estimators import (
        ControlVariateEstimator,
        FogzoEstimator,
        GradientEstimator,
        PlaceboEstimator,
        RefineStats,
        SpsaEstimator,
        every,
        linear_noise_share,
    )
    from fogzo.inspection import Inspection, Watch, inspect
    from fogzo.layers import (
        QuantizedLayer,
        QuantizedWeight,
        calibrate_,
        dequantize_,
        measure_step_sizes_,
        parameter_groups,
        quantize_,
        quantized_weights,
    )
    from fogzo.probing import LinearizedLoss
    from fogzo.quantizers import Quantizer, abs_max, bbq, fixed, lsq, quest, sign, ternary

__version__ = "0.1.0"

__all__ = [
    "ControlVariateEstimator",
    "FogzoEstimator",
    "GradientEstimator",
    "Inspection",
    "LinearizedLoss",
    "PlaceboEstimator",
    "QuantizedLayer",
    "QuantizedWeight",
    "Quantizer",
    "RefineStats",
    "SpsaEstimator",
    "Watch",
    "abs_max",
    "bbq",
    "calibrate_",
    "dequantize_",
    "every",
    "fixed",
    "inspect",
    "linear_noise_share",
    "lsq",
    "measure_step_sizes_",
    "parameter_groups",
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
        sources = ("estimators", "inspection", "layers", "probing", "quantizers")
        found = [vars(import_module(f"{__name__}.{source}")) for source in sources]
        globals().update({n: names[n] for names in found for n in __all__ if n in names})
        for room in ("methods", "integrations"):  # fogzo.methods.cage, and the like
            import_module(f"{__name__}.{room}")
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
