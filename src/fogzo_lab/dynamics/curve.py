"""What theory and simulation both answer: curves over time."""

from typing import NamedTuple

from fogzo_lab.dynamics.setting import Array


class Density(NamedTuple):
    """Where the latent weights are at the end.

    Attributes:
        weights: Places, ascending and evenly spaced.
        density: There, averaged over the teacher's weights.
    """

    weights: Array
    density: Array


class Curve(NamedTuple):
    """A run, at the times that were asked for; each entry of the same length.

    Attributes:
        times: tau, in steps per weight.
        risk: Excess risk of the weights rounded to the nearest level.
        trained_risk: Excess risk of the weights as training rounds them: drawn ones include the
            variance of the draw.
        outside: Share of latent weights beyond the range.
        agreement: FOGZO's, of the slope that STE's gradient predicts: measured by a probe in a
            simulation of FOGZO, predicted by the theory of rounding to the nearest; else NaN.
        density: At the end; None where it is not known.
    """

    times: Array
    risk: Array
    trained_risk: Array
    outside: Array
    agreement: Array
    density: Density | None = None
