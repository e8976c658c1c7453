"""The options that every member of the family shares, for its type checker and its messages."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import nn

from fogzo.directions import Coordinates, NoiseShape
from fogzo.schedules import NoiseShare
from fogzo.stacked_probes import AtOnce


class EstimatorOptions(TypedDict, total=False):
    """The keyword arguments that every member of the family takes; see `GradientEstimator`."""

    num_samples: int
    noise_share: float | NoiseShare | None
    seed: int
    coordinates: Coordinates
    noise_shape: NoiseShape
    noise_on_masked: bool
    one_sided: bool
    track_flips: bool
    probes_at_once: AtOnce
    keep_noise: bool | Literal["auto"]
    lean: bool
    overhead: float | None
    model: nn.Module | None


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a `ValueError` unless the value is one of the words."""
    if value not in choices:
        raise ValueError(
            f'{name} must be one of {", ".join(choices)}, got {value!r}: {name}="{choices[0]}"'
        )
