"""Quantizers as plain values, for files: ``from_description(describe(quantizer)) == quantizer``."""

import dataclasses
import math
from typing import Any

import torch

from fogzo.quantizers import smoothing
from fogzo.quantizers.companding import Bell
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.quantizer import Quantizer
from fogzo.quantizers.rotations import Hadamard
from fogzo.quantizers.scales import Scale
from fogzo.quantizers.smoothing import SmoothingLaw
from fogzo.quantizers.surrogates import (
    DRAWN_SURROGATE_NAMES,
    SURROGATE_NAMES,
    Surrogate,
    resolve_surrogate,
)


def describe(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer in values that JSON holds.

    >>> import fogzo
    >>> describe(fogzo.ternary())["scale"]
    {'rule': 'abs_mean', 'kind': 'dynamic', 'value': None, 'detached': True}

    Raises:
        ValueError: If it has a surrogate of your own that only your code knows.
    """
    dtype = quantizer.scale_dtype
    return {
        "grid": dataclasses.asdict(quantizer.grid),
        "scale": dataclasses.asdict(quantizer.scale),
        "surrogate": _describe_surrogate(quantizer),
        "rotation": None if quantizer.rotation is None else quantizer.rotation.block,
        "granularity": quantizer.granularity,
        "scale_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "stochastic": quantizer.stochastic,
        "companding": None if quantizer.companding is None else "bell",
        "noise": quantizer.noise,
    }


def from_description(values: dict[str, Any]) -> Quantizer:
    """The quantizer that `describe` was given."""
    rotation, dtype, surrogate = values["rotation"], values["scale_dtype"], values["surrogate"]
    return Quantizer(
        Grid(**values["grid"]),
        Scale(**values["scale"]),
        surrogate if isinstance(surrogate, str) else _surrogate_from(surrogate),
        None if rotation is None else Hadamard(rotation),
        values["granularity"],
        None if dtype is None else getattr(torch, dtype),
        values["stochastic"],
        None if values["companding"] is None else Bell(),
        values.get("noise", 0.0),  # files of earlier versions have none
    )


def _describe_surrogate(quantizer: Quantizer) -> str | dict[str, Any]:
    """Its name if that says all, else its parts."""
    surrogate = resolve_surrogate(quantizer.surrogate, quantizer.grid)
    if surrogate.name in (*SURROGATE_NAMES, *DRAWN_SURROGATE_NAMES):
        named = resolve_surrogate(surrogate.name, quantizer.grid)
        if named == surrogate:
            return surrogate.name
    if surrogate.kernel is not None:
        raise ValueError(
            f"the surrogate {surrogate.name!r} has a kernel of its own, a function that no file "
            "holds: use a named surrogate with its default width, or a law of "
            'fogzo.quantizers.smoothing, Surrogate("mine", law, law)'
        )
    slack = surrogate.range_slack
    return {
        "name": surrogate.name,
        "law": None if surrogate.law is None else _describe_law(surrogate.law),
        "perturbation": _describe_law(surrogate.perturbation),
        "range_slack": "unbounded" if slack == math.inf else slack,  # JSON has no infinity
        "least_probability": surrogate.least_probability,
    }


def _surrogate_from(values: dict[str, Any]) -> Surrogate:
    law, slack = values["law"], values["range_slack"]
    return Surrogate(
        values["name"],
        None if law is None else _law_from(law),
        _law_from(values["perturbation"]),
        math.inf if slack == "unbounded" else slack,
        least_probability=values.get("least_probability"),
    )


def _describe_law(law: SmoothingLaw) -> dict[str, Any]:
    cls = type(law)
    if getattr(smoothing, cls.__name__, None) is not cls:
        raise ValueError(
            f"the smoothing law {cls.__name__} is your own, and no file can name it: use one of "
            "fogzo.quantizers.smoothing"
        )
    found: dict[str, Any] = {"kind": cls.__name__}
    for field in dataclasses.fields(law):  # type: ignore[arg-type]
        value = getattr(law, field.name)
        found[field.name] = _describe_law(value) if isinstance(value, SmoothingLaw) else value
    return found


def _law_from(values: dict[str, Any]) -> SmoothingLaw:
    arguments = {
        name: _law_from(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name != "kind"
    }
    law: SmoothingLaw = getattr(smoothing, values["kind"])(**arguments)
    return law
