"""Options of the refinements that would fail, or say two things, only once training begins."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fogzo.estimators import FogzoEstimator, GradientEstimator, linear_noise_share
from fogzo.wording import nearest


def check_options(
    call: str,
    estimator: object,
    options: Mapping[str, Any],
    own: Sequence[str] = (),
    kappa: float | None = None,
    start: float = 0.0,
) -> None:
    """Refuse now what would be refused when training begins.

    Args:
        call: How the refinement is asked for, up to its first option.
        estimator: A member of the family.
        options: Of the estimator.
        own: Names of the options that the refinement itself takes.
        kappa: Noise at the end of the run.
        start: Fraction of the run that is plain STE before.

    Raises:
        ValueError: If the estimator is no class, has no such option or does not take its value, or
            noise is given twice.
    """
    check_class(call, estimator)
    assert isinstance(estimator, type)
    _check_names(call, estimator, options, own)
    check_noise(call, kappa, start, options)
    schedule = linear_noise_share(total_steps=1, kappa=kappa, start=start)
    if kappa is not None or start:
        options = {**options, "noise_share": schedule}
    if estimator.__module__ == FogzoEstimator.__module__:  # others may need the real weights
        _check_values(estimator, options)


def _check_names(
    call: str, estimator: type, options: Mapping[str, Any], own: Sequence[str]
) -> None:
    """Raise a `ValueError` if there is an option that the estimator does not take."""
    taken: list[str] = []
    for cls in estimator.__mro__:
        if "__init__" not in vars(cls):
            continue
        params = list(inspect.signature(vars(cls)["__init__"]).parameters.values())
        passes_on = any(param.kind == param.VAR_KEYWORD for param in params)
        if passes_on and not cls.__module__.startswith("fogzo."):
            return  # it may take options of its own out of what it passes on
        taken += [param.name for param in params[2:] if param.kind != param.VAR_KEYWORD]
        if all(param.kind != param.VAR_KEYWORD for param in params):
            break  # it passes nothing on
    for name, value in options.items():
        if name not in taken:
            meant = nearest(name, [*own, *taken])
            raise ValueError(
                f"{estimator.__name__} has no option {name!r:.80}, but "
                f"{', '.join(sorted({*own, *taken}))}: {call}"
                + (f"{meant}={value!r:.80})" if meant else "num_samples=2)")
            )


def _check_values(estimator: Any, options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for what an estimator refuses, by making one of a single weight."""
    module, weight = nn.Module(), nn.Parameter(torch.ones(1, device="cpu"))
    module.weight = weight
    # A schedule may know how many weights it was made for, and a model which ones.
    given = {name: 0.0 if callable(value) else value for name, value in options.items()}
    if isinstance(options.get("model"), nn.Module | None):
        given["model"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the weights, and told of those
        estimator([("weight", weight, 1.0)], **given)


def check_class(call: str, estimator: object) -> None:
    """Refuse an estimator that is made already.

    Args:
        call: How the refinement is asked for, up to its first option.
        estimator: A member of the family.

    Raises:
        ValueError: If it is no class.
    """
    if not (isinstance(estimator, type) and issubclass(estimator, GradientEstimator)):
        raise ValueError(
            f"estimator= is {estimator!r:.80}, expected a class of the family, which is made here "
            f"with the options that follow: {call}estimator=fogzo.FogzoEstimator, num_samples=2)"
        )


def check_weights(call: str, weights: object) -> None:
    """Refuse what does not list the quantized weights of a model.

    Args:
        call: How the refinement is asked for, up to its first option.
        weights: What should.

    Raises:
        ValueError: If it cannot be called.
    """
    if not callable(weights):
        raise ValueError(
            f"weights= is {weights!r:.80}, expected a function that lists those of a model: "
            f"{call}weights=fogzo.integrations.torchao.quantized_weights)"
        )


def check_noise(call: str, kappa: float | None, start: float, options: Mapping[str, Any]) -> None:
    """Refuse noise that is given twice.

    Args:
        call: How the refinement is asked for, up to its first option.
        kappa: Noise at the end of the run.
        start: Fraction of the run that is plain STE before.
        options: Of the estimator.

    Raises:
        ValueError: If there is a schedule among the options too.
    """
    if "noise_share" in options and (kappa is not None or start):
        raise ValueError(
            f"give either kappa and start or a noise_share of your own: {call}kappa=0.01)"
        )
