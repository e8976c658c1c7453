"""The options that every member of the family shares, for its type checker and its messages."""

import operator
from collections.abc import Sequence
from typing import Literal, TypedDict, cast

from torch import nn

from fogzo.estimators.schedules import NoiseShare, require_count
from fogzo.probing.directions import Coordinates, NoiseShape
from fogzo.probing.stacked import AtOnce


class EstimatorOptions(TypedDict, total=False):
    """The keyword arguments that every member of the family takes; see `GradientEstimator`."""

    num_samples: int
    noise_share: float | NoiseShare | None
    seed: int
    coordinates: Coordinates
    noise_shape: NoiseShape | None
    one_sided: bool
    track_flips: bool
    probes_at_once: AtOnce
    keep_noise: bool | Literal["auto"]
    lean: bool
    overhead: float | None
    model: nn.Module | None


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `ValueError` unless the value is one of the words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f'{name} must be one of {", ".join(choices)}, got {value!r}: {name}="{choices[0]}"'
        )


def check_options(estimator: str, *, num_samples: object, model: object, **flags: object) -> int:
    """Raise a `ValueError` unless options are of their types; returns ``num_samples``."""
    count = require_count("num_samples", num_samples, f"{estimator}(weights, num_samples=1)")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"{name} must be True or False, got {value!r:.80}: "
                f"{estimator}(weights, {name}=True)"
            )
    if not (model is None or isinstance(model, nn.Module)):
        raise ValueError(
            f"model must be the nn.Module that holds the weights, got {type(model).__name__}: "
            f"{estimator}(weights, model=model)"
        )
    return count


def check_seed(seed: object) -> int:
    """The seed as an int.

    Raises:
        ValueError: If it is no integer, of Python or NumPy.
    """
    try:
        if not isinstance(seed, bool):
            return operator.index(cast(int, seed))
    except TypeError:
        pass
    raise ValueError(f"seed must be an integer, the same on every rank, got {seed!r:.80}: seed=0")
