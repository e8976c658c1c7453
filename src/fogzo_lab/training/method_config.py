"""The config of a method beside the estimator: what it is, and its own parameters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fogzo_lab.options import (
    Example,
    NonNegativeFloat,
    Options,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareBelowOne,
)

MethodName = Literal["none", "cage", "winq", "dampening", "cewt", "parq"]

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "cage": {"strength": 10.0, "start": 0.8},
    "winq": {"keep": 0.2, "resets": 4},
    "dampening": {"strength": 0.1, "start": 0.25, "mean_over_inputs": True},
    # .01 beside .0012 in the smallest of the authors' models, and the same ratio in all others.
    "cewt": {"rate_factor": 8.33, "project": True},
    "parq": {"steepness": 10.0},
}
"""The options of each method, as its authors set them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig(Options):
    """A way to train through a quantizer, beside the estimator; see docs/methods.md."""

    PREFIX: ClassVar[str] = "method."

    name: MethodName = "none"
    """cage, winq and dampening pull weights to the grid, cewt keeps their distribution, parq is
    torchao's optimizer on unquantized layers."""
    strength: Annotated[NonNegativeFloat | None, Example(10.0)] = None
    """Of cage (by default 10, times the learning rate) and dampening (0.1), at the end."""
    start: Annotated[ShareBelowOne | None, Example(0.0)] = None
    """Fraction of the steps before cage (by default 0.8) and dampening (0.25) begin."""
    keep: Annotated[Share | None, Example(0.8)] = None
    """Share of the distance to the grid that a reset of winq leaves, by default 0.2."""
    resets: Annotated[PositiveInt | None, Example(10)] = None
    """Resets of winq over the run, by default 4."""
    mean_over_inputs: bool | None = None
    """Whether dampening divides its penalty by the inputs of an output, by default true."""
    rate_factor: Annotated[PositiveFloat | None, Example(8.33)] = None
    """Learning rate of the weights of cewt relative to the others', by default 8.33."""
    project: bool | None = None
    """Whether cewt keeps the distribution and not the norm alone, by default true."""
    steepness: Annotated[PositiveFloat | None, Example(10.0)] = None
    """How suddenly parq's weights get to the grid, by default 10."""

    def check_together(self, prefix: str) -> None:
        """Raise a `ValueError` if an option is given that the method does not have."""
        for field in dataclasses.fields(self)[1:]:
            if getattr(self, field.name) is None or field.name in PUBLISHED[self.name]:
                continue
            option = field.name.replace("_", "-")
            owner = next(name for name, own in PUBLISHED.items() if field.name in own)
            raise ValueError(
                f"the method {self.name} has no {option}: --{prefix}{option} None, or "
                f"--{prefix}name {owner}"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The method's options: those that are given, and the published ones for the others."""
        published = PUBLISHED[self.name]
        given = {name: getattr(self, name) for name in published}
        return {name: published[name] if given[name] is None else given[name] for name in given}
