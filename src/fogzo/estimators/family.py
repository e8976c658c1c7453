"""The family: FOGZO, and what it must be compared with."""

import math
from collections.abc import Iterable, Sequence
from typing import Unpack

from fogzo.directions import Directions, Probe
from fogzo.estimators.base import GradientEstimator
from fogzo.estimators.combination import Combination, mean_along_probes
from fogzo.estimators.options import EstimatorOptions
from fogzo.schedules import default_kappa, noise_share_from_kappa
from fogzo.weights import WeightLike


class FogzoEstimator(GradientEstimator):
    """First-order-guided zeroth-order gradient descent (Yang & Aamodt, arXiv 2510.23926).

    Directions ``v_i = sqrt(beta) s_i ghat + sqrt(1 - beta) u_i`` and the gradient
    ``(1/n) sum_i [L(phi + v_i) - L(phi - v_i)] / 2 * v_i``, in coordinates where every weight is
    one smoothing radius long. ``noise_share=0.0`` is beta = 1: the first-order gradient times
    the measured agreement ("lambda only").

    Args:
        weights: See `GradientEstimator`.
        paired: Probe each u_i with both signs of the guide: four forwards a sample, and the
            noise that carries no information about the loss cancels.
        **options: See `GradientEstimator`. Without ``noise_share``, a constant one with kappa 1
            (below about 1e5 weights) or .01.
    """

    def __init__(
        self,
        weights: Iterable[WeightLike],
        *,
        paired: bool = False,
        **options: Unpack[EstimatorOptions],
    ) -> None:
        super().__init__(weights, **options)
        self.paired = paired

    def default_noise_share(self) -> float:
        """From kappa, chosen by the number of weights."""
        kappa = default_kappa(self.num_weights)
        return noise_share_from_kappa(kappa, self.num_weights, self.num_samples)

    def plan(self, noise_share: float, directions: Directions) -> list[Probe]:
        """One direction a sample, or two that differ in the sign of the guide."""
        guide, noise = math.sqrt(1 - noise_share), math.sqrt(noise_share)
        probes = []
        for sample in range(self.num_samples):
            sign = directions.sign(sample)
            probes.append(Probe(sample, sign * guide, noise))
            if self.paired:
                probes.append(Probe(sample, -sign * guide, noise))
        return probes

    def combine(
        self,
        noise_share: float,
        probes: Sequence[Probe],
        slopes: Sequence[float],
        directions: Directions,
        norm: float,
    ) -> Combination:
        """The mean of ``slope * v``; the guide's share of it is the agreement."""
        combination = mean_along_probes(probes, slopes, norm)
        return combination._replace(agreement=combination.guide)


class SpsaEstimator(GradientEstimator):
    """n-SPSA: smoothing by noise alone (beta = 0). Needs no backward pass, and far more samples."""

    needs_gradient = False

    def __init__(self, weights: Iterable[WeightLike], **options: Unpack[EstimatorOptions]) -> None:
        if "noise_share" in options:
            raise ValueError(
                "SpsaEstimator has no guide, its directions are noise only: leave noise_share out, "
                "or use fogzo.FogzoEstimator(weights, noise_share=...)"
            )
        if options.get("noise_shape") == "tensor_rms":
            raise ValueError(
                "noise_shape='tensor_rms' follows the gradients, which SpsaEstimator does without: "
                'noise_shape="isotropic"'
            )
        super().__init__(weights, **options)

    def default_noise_share(self) -> float:
        """All of it."""
        return 1.0

    def plan(self, noise_share: float, directions: Directions) -> list[Probe]:
        """Pure noise."""
        return [Probe(sample, 0.0, 1.0) for sample in range(self.num_samples)]

    def combine(
        self,
        noise_share: float,
        probes: Sequence[Probe],
        slopes: Sequence[float],
        directions: Directions,
        norm: float,
    ) -> Combination:
        """The mean of ``slope * u``."""
        return mean_along_probes(probes, slopes, norm)


class PlaceboEstimator(FogzoEstimator):
    """FOGZO's own noise without its losses: ``g + N sqrt(q) mean(s_i u_i) / eps``.

    With FOGZO's seed it draws the very same s and u, at the size they have where STE is right
    (agreement 1). What FOGZO gains over it is what the measured losses are worth.
    """

    def plan(self, noise_share: float, directions: Directions) -> list[Probe]:
        """Measure nothing."""
        return []

    def combine(
        self,
        noise_share: float,
        probes: Sequence[Probe],
        slopes: Sequence[float],
        directions: Directions,
        norm: float,
    ) -> Combination:
        """The gradient as it is, and noise of its norm."""
        size = norm * math.sqrt(noise_share) / self.num_samples
        return Combination(1.0, [(i, directions.sign(i) * size) for i in range(self.num_samples)])


class ControlVariateEstimator(GradientEstimator):
    """``g + (w/n) sum_i (slope_i - u_i . g) u_i / eps``: only the surprise becomes noise.

    ``noise_share`` is the weight w, the fraction of STE's bias that is removed in expectation.
    By default the one of least squared error, ``n / (n + d + kurtosis - 2)``.
    """

    def default_noise_share(self) -> float:
        """The weight of least squared error where the guide is orthogonal to the loss."""
        kurtosis = self.weights[0].surrogate.perturbation.kurtosis
        return self.num_samples / (self.num_samples + self.num_weights + kurtosis - 2)

    def plan(self, noise_share: float, directions: Directions) -> list[Probe]:
        """Pure noise, as the gradient's own share is known."""
        return [Probe(sample, 0.0, 1.0) for sample in range(self.num_samples)]

    def combine(
        self,
        noise_share: float,
        probes: Sequence[Probe],
        slopes: Sequence[float],
        directions: Directions,
        norm: float,
    ) -> Combination:
        """The gradient, corrected by what it did not predict."""
        predicted = directions.projections([probe.sample for probe in probes])
        surprises = [
            noise_share * (slope - expected)
            for slope, expected in zip(slopes, predicted, strict=True)
        ]
        return mean_along_probes(probes, surprises, norm)._replace(guide=1.0)
