"""Quantized models and estimators in other libraries, one module for each.

fogzo.integrations.transformers.refine(trainer, kappa=0.01)

Each module imports its library when it is used, and this package imports nothing.
"""

from importlib import import_module
from types import ModuleType

MODULES = ("accelerate", "brevitas", "lightning", "peft", "torchao", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
