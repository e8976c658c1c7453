"""The family: FOGZO, and what it must be compared with."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Unpack

import torch

from fogzo.estimators.agreement import agreement_error, shrink, unevenness
from fogzo.estimators.base import (
    EstimatorOptions,
    GradientEstimator,
    Refined,
    check_choice,
    mean_along,
)
from fogzo.estimators.input_scatter import InputScatter
from fogzo.estimators.schedules import (
    DEFAULT_KAPPA,
    ConstantNoiseShare,
    NoiseShare,
    noise_share_from_kappa,
)
from fogzo.layers.weights import WeightLike
from fogzo.probing.audit import Audit
from fogzo.probing.directions import Direction, Directions
from fogzo.probing.linearized import LinearizedLoss
from fogzo.probing.measure import Measurement, measure
from fogzo.quantizers.checks import is_number


class FogzoEstimator(GradientEstimator):
    """First-order-guided zeroth-order gradient descent (Yang & Aamodt, arXiv 2510.23926).

    Directions ``v_i = sqrt(beta) s_i ghat + sqrt(1 - beta) u_i`` and the gradient
    ``(1/n) sum_i [L(phi + v_i) - L(phi - v_i)] / 2 * v_i``, in coordinates where every weight is
    one smoothing radius long. ``noise_share=0.0`` is beta = 1: the first-order gradient times
    the measured agreement ("lambda only").

    Args:
        weights: See `GradientEstimator`.
        agreement: ``"shrunk"`` draws the measured agreement towards 1 by its own standard error,
            so that a slope lost in the noise of few roundings changes nothing and never turns the
            gradient round; see `fogzo.estimators.agreement`. ``"measured"`` is the paper's
            estimator to the letter, with ``noise_shape="isotropic"``.
        **options: See `GradientEstimator`. Without ``noise_share``, a constant one of kappa
            1e-3.
    """

    def __init__(
        self,
        weights: Iterable[WeightLike],
        *,
        agreement: Literal["shrunk", "measured"] = "shrunk",
        **options: Unpack[EstimatorOptions],
    ) -> None:
        super().__init__(weights, **options)
        check_choice("agreement", agreement, ("shrunk", "measured"))
        self.agreement = agreement
        self._rounds_inputs = any(each.activation_quantizer is not None for each in self._layers)
        self._input_scatter = InputScatter()

    def default_noise_share(self) -> float:
        """That of the default kappa."""
        return noise_share_from_kappa(DEFAULT_KAPPA, self.num_weights, self.num_samples)

    def plan(self, noise_share: float, directions: Directions) -> list[Direction]:
        """One direction per sample."""
        guide, noise = math.sqrt(1 - noise_share), math.sqrt(noise_share)
        return [Direction(i, directions.sign(i) * guide, noise) for i in range(self.num_samples)]

    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """The mean of ``slope * v``, whose guide is beta times the agreement."""
        mean = mean_along(plan, measured.slopes, directions.norm)
        beta = 1 - noise_share
        agreement = mean.guide / beta  # of a direction only that share follows the gradient
        error = agreement_error(
            directions, noise_share, measured.loss_error, len(plan), self.one_sided
        )
        if self._rounds_inputs:
            of_inputs = self._input_scatter.take_in(
                measured, directions.norm, beta, agreement, error
            )
            error = math.hypot(error, of_inputs)
        if shrink(agreement, error) != 1:  # no accident, if the weights are spread evenly
            error = math.hypot(error, unevenness(directions))
        guide = mean.guide if self.agreement == "measured" else shrink(agreement, error)
        return Refined(guide, mean.noise, agreement, error)

    def state_dict(self) -> dict[str, float]:
        """The step and the seed, and where inputs are quantized what is known of their scatter."""
        return super().state_dict() | self._input_scatter.state_dict()

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If it is not a state of an estimator.
        """
        scatter = InputScatter()
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
            scatter.load_state_dict(state_dict)
        super().load_state_dict(state_dict)
        self._input_scatter = scatter

    @torch.no_grad()
    def predicted_agreement(self, linear: LinearizedLoss) -> float | None:
        """The agreement that this step's probes would measure if the loss were linear.

        Call it between backward and `refine_grads_`, whose ``stats.agreement`` is then to be
        compared: what the two differ by is all that the forward passes have told. It changes
        nothing and costs no forward pass.

        Args:
            linear: Of the same model, told of this step's gradients by backward.

        Returns:
            The agreement; None where this step measures nothing, or no weight rounds differently.
        """
        coming = self._coming()
        if coming is None:
            return None
        share, directions, plan = coming
        predicted = measure(
            self._lender,
            directions,
            plan,
            linear,
            evaluate="in_place",
            expected_loss=None,
            one_sided=False,
            audit=Audit(),
        )
        if predicted.failure is not None:
            return None
        return mean_along(plan, predicted.slopes, directions.norm).guide / (1 - share)


class PlaceboEstimator(FogzoEstimator):
    """FOGZO's own noise without its losses: ``g + N sqrt(q) mean(s_i u_i) / eps``.

    With FOGZO's seed it draws the very same s and u, at the size they have where STE is right
    (agreement 1). What FOGZO gains over it is what the measured losses are worth.
    It takes FOGZO's options, so that both are made alike; how losses are measured changes nothing.
    """

    def plan(self, noise_share: float, directions: Directions) -> list[Direction]:
        """Measure nothing."""
        return []

    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """The gradient as it is, and noise of its norm."""
        size = directions.norm * math.sqrt(noise_share) / self.num_samples
        return Refined(1.0, [(i, directions.sign(i) * size) for i in range(self.num_samples)])


class _NoiseOnly(GradientEstimator):
    """Directions of noise alone."""

    noise_shape = "isotropic"
    mixes_noise = False

    def plan(self, noise_share: float, directions: Directions) -> list[Direction]:
        """One direction of pure noise per sample."""
        return [Direction(sample, 0.0, 1.0) for sample in range(self.num_samples)]


class SpsaEstimator(_NoiseOnly):
    """n-SPSA: smoothing by noise alone (beta = 0). Needs no backward pass, and far more samples."""

    needs_gradient = False

    def __init__(self, weights: Iterable[WeightLike], **options: Unpack[EstimatorOptions]) -> None:
        if options.get("noise_share") is not None:
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

    def default_noise_share(self) -> NoiseShare:
        """All of it."""
        return ConstantNoiseShare(1.0)

    def _schedule(self, noise_share: float | NoiseShare) -> NoiseShare:
        return self.default_noise_share()  # the only share outside [0, 1)

    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """The mean of ``slope * u``."""
        return mean_along(plan, measured.slopes, directions.norm)


class ControlVariateEstimator(_NoiseOnly):
    """``g + (w/n) sum_i (slope_i - u_i . g) u_i / eps``: only the surprise becomes noise.

    Args:
        weights: See `GradientEstimator`.
        weight: w, the fraction of STE's bias that is removed in expectation, in [0, 1), or a
            function of the step that may return None to leave the gradient alone. By default the
            one of least squared error, ``n / (n + d + kurtosis - 2)``.
        **options: See `GradientEstimator`; there is no noise share.
    """

    def __init__(
        self,
        weights: Iterable[WeightLike],
        *,
        weight: float | NoiseShare | None = None,
        **options: Unpack[EstimatorOptions],
    ) -> None:
        if options.pop("noise_share", None) is not None:
            raise ValueError(
                "ControlVariateEstimator has no noise share but a weight, the fraction of STE's "
                "bias that it removes: leave noise_share out, and weight, which has a default: "
                "fogzo.ControlVariateEstimator(weights)"
            )
        if not (weight is None or callable(weight) or (is_number(weight) and 0 <= weight < 1)):
            raise ValueError(
                f"weight is the fraction of STE's bias that is removed, in [0, 1), got {weight!r}: "
                "leave it out, fogzo.ControlVariateEstimator(weights), for that of least error"
            )
        options["noise_share"] = weight
        super().__init__(weights, **options)

    def default_noise_share(self) -> float:
        """The weight of least squared error where the guide is orthogonal to the loss."""
        kurtosis = self.weights[0].surrogate.perturbation.kurtosis
        return self.num_samples / (self.num_samples + self.num_weights + kurtosis - 2)

    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """The gradient plus the error of its own prediction, along the noise."""
        predicted = directions.projections([direction.sample for direction in plan])
        errors = [
            noise_share * (slope - expected)
            for slope, expected in zip(measured.slopes, predicted, strict=True)
        ]
        return mean_along(plan, errors, directions.norm)._replace(guide=1.0)
