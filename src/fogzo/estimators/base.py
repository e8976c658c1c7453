"""What every gradient estimator shares: one call between backward and step."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fogzo.collectives import compute_device
from fogzo.estimators.agreement import agreement_error, is_explained
from fogzo.estimators.cautions import (
    NO_STEP,
    NOT_FINITE,
    RESOLVES,
    advice,
    coarse_loss,
    doubt,
    mention_loud_noise,
    name_of,
)
from fogzo.estimators.combination import Combination, mean_along_probes
from fogzo.estimators.options import check_choice, check_options, check_seed
from fogzo.estimators.pacing import Pace
from fogzo.estimators.refined import check_not_refined, check_still_held, mark_refined
from fogzo.estimators.schedules import NoiseShare, as_noise_share, bind, kappa_from_noise_share
from fogzo.estimators.stats import RefineStats
from fogzo.layers.audit import LayerAudit
from fogzo.layers.weights import QuantizedWeight, WeightLike, as_quantized_weights
from fogzo.probing.audit import Audit
from fogzo.probing.directions import Coordinates, Directions, NoiseShape, Probe
from fogzo.probing.lean import check_lean
from fogzo.probing.loan import Closure, Probes
from fogzo.probing.measure import NO_EFFECT, Measurement, measure
from fogzo.probing.noise import is_kept, mix_seed
from fogzo.probing.stacked import AtOnce, check_at_once

# Differences of fewer units in the last place than this may be the rounding of the loss.
_RESOLVED = 4


class GradientEstimator(ABC):
    """Plans probes, measures losses along them, and rewrites the gradients.

    A member of the family says which directions to probe (`plan`) and what to make of the
    measured slopes (`combine`); everything else is here.

    Args:
        weights: What `quantized_weights` lists, or ``(name, param, step_size)`` triples of your
            own fake quantization.
        num_samples: n, how many directions are averaged per step.
        noise_share: q = 1 - beta in [0, 1), or a function of the step that may return None to
            leave the gradient alone. By default the member's own.
        seed: Directions follow from it and the step. Give every rank the same.
        coordinates: See `Directions`.
        noise_shape: See `Directions`. By default ``"tensor_rms"`` where there is a guide:
            optimizers that normalise gradients, and clipping, turn the paper's isotropic noise
            into a random walk of all layers whose gradients are small.
        one_sided: Measure ``L(w + v) - L(w)`` instead of ``[L(w + v) - L(w - v)] / 2``: n forwards
            a step, as backward's own loss is L(w). `refine_grads_` then needs ``expected_loss`` in
            every step, from a forward in the same mode and random state. The mean is the same
            where the loss is linear or quadratic along v; the variance grows by
            ``E[(v.Hv)^2 |v|^2] / 4n`` for a Hessian H of the smoothed loss, and fewer rounded
            weights average out in one difference.
        track_flips: Count the integer codes that differ between the first two probes.
        probes_at_once: How many directions to evaluate together, by `torch.vmap` over copies of
            the weights, with the same result. It pays where many samples meet a small model;
            memory grows with it: copies of the weights, their noise, and the activations of as
            many forwards. ``"auto"`` takes as many as keep copies and noise below 256 MiB (4 MiB
            on a CPU, for its caches), whatever the activations take.
        keep_noise: Keep the noise of the perturbation until the gradients are written, for the
            memory of the weights a sample, on a CPU and of a uniform law 2 bytes a weight; else
            it is drawn twice, which on a CPU costs more. ``"auto"`` keeps it where that takes no
            more than 16 MiB, and not with ``lean``. The result is the same. Noise of sharded
            weights is never kept.
        lean: Move each weight only while its layer computes, by hooks around the layer's forward:
            the extra memory is one layer instead of a copy of all quantized weights, the noise is
            drawn twice a sample instead of once, the result is the same. Not for compiled models.
        overhead: Probe only as often as costs this share of the time of everything else: .15 for
            15% more time a step. After ten probed steps, which are timed, `interval` says how
            many steps lie between probes, and so does the ``fogzo`` logger.
        model: The model of hand-written triples, so that its buffers and modes are protected.

    Raises:
        ValueError: If an argument is out of range or a weight cannot be perturbed.
    """

    needs_gradient = True
    noise_shape: NoiseShape = "tensor_rms"

    def __init__(
        self,
        weights: Iterable[WeightLike],
        *,
        num_samples: int = 1,
        noise_share: float | NoiseShare | None = None,
        seed: int = 0,
        coordinates: Coordinates = "scaled",
        noise_shape: NoiseShape | None = None,
        one_sided: bool = False,
        track_flips: bool = False,
        probes_at_once: AtOnce = 1,
        keep_noise: bool | Literal["auto"] = "auto",
        lean: bool = False,
        overhead: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.weights: list[QuantizedWeight] = as_quantized_weights(weights)
        self.num_samples = check_options(
            type(self).__name__,
            num_samples=num_samples,
            one_sided=one_sided,
            track_flips=track_flips,
            lean=lean,
            model=model,
        )
        noise_shape = self.noise_shape if noise_shape is None else noise_shape
        check_choice("coordinates", coordinates, ("scaled", "global"))
        check_choice("noise_shape", noise_shape, ("isotropic", "tensor_rms"))
        if track_flips and any(weight.codes is None for weight in self.weights):
            raise ValueError(
                "track_flips needs the integer codes of every weight: give "
                "QuantizedWeight(..., codes=lambda: ...), or leave track_flips=False"
            )
        trained = [weight for weight in self.weights if weight.param.requires_grad]
        self.num_weights = sum(weight.param.numel() for weight in trained or self.weights)
        given = self.default_noise_share() if noise_share is None else noise_share
        self.noise_share: NoiseShare = self._schedule(given)
        if isinstance(noise_share, float):
            mention_loud_noise(noise_share, self.num_weights, self.num_samples)
        self.seed = check_seed(seed)
        self.step = 0
        self.one_sided = one_sided
        self.track_flips = track_flips
        self._probes = Probes(self.weights, model)
        kept = is_kept(keep_noise, self.weights, self.num_samples, lean)
        self._direction_options: dict[str, Any] = {
            "coordinates": coordinates,
            "noise_shape": noise_shape,
            "guided": self.needs_gradient,
            "buffers": self._probes.buffers if kept else None,
        }
        check_at_once(probes_at_once, self.weights, self._probes)
        self.probes_at_once: AtOnce = probes_at_once
        if lean:
            if probes_at_once != 1:
                raise ValueError(
                    "lean probes hold one moved layer, and probes_at_once many copies of all: "
                    "leave out lean=True or probes_at_once"
                )
            check_lean(self.weights, self._probes.models)
        self.lean = lean
        self._pace = None if overhead is None else Pace(overhead)
        self._audit = Audit()
        self._layer_audits = [LayerAudit(model) for model in self._probes.models]
        self._num_refined = 0
        self._warned: set[str] = set()

    @abstractmethod
    def default_noise_share(self) -> float | NoiseShare:
        """The noise share used where none is given."""

    @abstractmethod
    def plan(self, noise_share: float, directions: Directions) -> list[Probe]:
        """The directions to probe in this step; none if no loss is needed."""

    @abstractmethod
    def combine(
        self,
        noise_share: float,
        probes: Sequence[Probe],
        slopes: Sequence[float],
        directions: Directions,
        norm: float,
        error: float,
    ) -> Combination:
        """The refined gradient, from the slopes ``(L+ - L-) / 2`` measured along the probes.

        Args:
            noise_share: As given to `plan`.
            probes: What `plan` returned.
            slopes: One a probe, in the loss's units.
            directions: As given to `plan`.
            norm: Norm of the first-order gradient in scale-normalised coordinates, in the loss's
                units.
            error: Standard error of the agreement.
        """

    @contextmanager
    def record_rng(self) -> Iterator[None]:
        """Wrap the first-order forward, so that the probes replay its dropout masks."""
        self._probes.record_rng()
        yield

    def refine_grads_(
        self,
        closure: Closure | None = None,
        expected_loss: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> RefineStats:
        """Replace the gradients of the quantized weights. Call it after backward, before clipping.

        Args:
            closure: Recomputes the scalar loss that backward() differentiated, on the same
                batches, without backward. Called 2n times, 4n if paired and n if one-sided.
            expected_loss: That loss. The first, tenth, hundredth, ... call then checks, with one
                more forward pass, that the closure reproduces it, and every call looks whether
                the probes lie near it. One-sided differences start from it. Give it on all ranks
                or on none.
            grad_scale: What the gradients are multiplied by at present:
                ``scaler.get_scale()`` before ``scaler.unscale_(optimizer)``, else 1.

        Returns:
            The step's statistics. Where nothing could be measured (a loss or the gradient is not
            finite, no weight rounds differently, the loss is too coarse), ``fallback`` says why
            and the gradients are as backward left them, bit for bit.

        Raises:
            ValueError: If there are no gradients, they were refined already, or the closure is not
                that loss. Weights, gradients, buffers, modes and random streams are then as
                before the call.
        """
        if self._pace is not None:
            self._pace.begin(compute_device(self.weights[0].param))
        try:
            with torch.no_grad():
                stats = self._refine(closure, expected_loss, grad_scale)
        finally:
            self._probes.forget_rng()
        if self._pace is not None:
            self._pace.end(probed=bool(stats.probe_losses))
        self.step += 1
        return stats

    @property
    def interval(self) -> int | None:
        """Steps between probes that ``overhead`` chose; None before, and without it."""
        return None if self._pace is None else self._pace.interval

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to draw the same directions, in the same steps."""
        state = {"step": self.step, "seed": self.seed}
        return state if self.interval is None else state | {"interval": self.interval}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If it is not a state of an estimator.
        """
        given = state_dict if isinstance(state_dict, dict) else {}
        known = set(given) - {"interval"} == {"step", "seed"}
        if not (known and all(isinstance(v, int) for v in given.values())):
            raise ValueError(
                f"expected two integers, step and seed, got {state_dict!r:.80}: "
                "estimator.load_state_dict(checkpoint['estimator'])"
            )
        self.step, self.seed = int(given["step"]), int(given["seed"])
        if self._pace is not None:
            self._pace.interval = given.get("interval")

    def _schedule(self, noise_share: float | NoiseShare) -> NoiseShare:
        return bind(as_noise_share(noise_share), self.num_weights, self.num_samples)

    def _refine(
        self, closure: Closure | None, expected_loss: Tensor | float | None, grad_scale: float
    ) -> RefineStats:
        if not (grad_scale > 0 and math.isfinite(grad_scale)):
            raise ValueError(f"grad_scale must be positive, got {grad_scale}: scaler.get_scale()")
        share = self.noise_share(self.step)
        if share is None or not (self._pace is None or self._pace.due(self.step)):
            return RefineStats(self.step)
        weights = self._weights_to_refine()
        seed = mix_seed(self.seed, self.step)
        directions = Directions(weights, seed, grad_scale=grad_scale, **self._direction_options)
        probes = self.plan(share, directions)
        measured = self._measure(directions, probes, closure, expected_loss)
        norm = float(directions.norm)

        fallback = self._reason_to_fall_back(directions, norm, measured)
        refined = Combination(1.0, [])
        error = None
        if fallback is None:
            if probes and self.needs_gradient:
                error = self._agreement_error(share, directions, norm, measured, probes)
            refined = self.combine(
                share,
                probes,
                measured.slopes,
                directions,
                norm,
                math.inf if error is None else error,
            )
            directions.write_grads_(refined.guide, refined.noise)
            if self.needs_gradient:
                mark_refined(weights)
                self._audit_layers()
        if measured.losses:
            if measured.is_finite and math.isfinite(norm):
                self._audit.step_passed()
            self._warn(fallback, refined.agreement, error, grad_scale, measured.dtype)
        return RefineStats(
            step=self.step,
            agreement=refined.agreement,
            agreement_error=None if refined.agreement is None else error,
            applied_agreement=None if refined.agreement is None else refined.guide,
            probe_losses=tuple(measured.losses),
            base_loss=measured.base,
            gradient_norm=norm if self.needs_gradient else None,
            flip_rate=measured.flip_rate,
            fallback=fallback,
            **self._noise_stats(share),
        )

    def _audit_layers(self) -> None:
        """At steps 1, 10, 100, ... look for layers that are bypassed and steps nobody trains."""
        self._num_refined += 1
        if math.log10(self._num_refined).is_integer():
            for audit in self._layer_audits:
                audit.check()

    def _noise_stats(self, share: float) -> dict[str, float]:
        kappa = kappa_from_noise_share(share, self.num_weights, self.num_samples)
        return {"noise_share": share, "kappa": kappa}

    def _weights_to_refine(self) -> list[QuantizedWeight]:
        weights = [weight for weight in self.weights if weight.param.requires_grad]
        if not weights:
            raise ValueError(
                "no quantized weight requires a gradient, they are all frozen: "
                "model.requires_grad_(True), or train without an estimator"
            )
        if not self.needs_gradient:
            return weights
        # A weight without gradient took no part in this step (an unused expert): leave it alone.
        used = [weight for weight in weights if weight.param.grad is not None]
        if len(used) < len(weights):
            check_still_held(weights, self._probes.models)
        if not used:
            raise ValueError(
                "no quantized weight has a gradient. Call it after backward and before zero_grad: "
                "loss.backward(); estimator.refine_grads_(closure); optimizer.step(). If you did, "
                "these weights belong to another model than the loss (a deep copy made after "
                "quantized_weights(model), say), or were sharded after it: call fully_shard first"
            )
        check_not_refined(used)
        return used

    def _measure(
        self,
        directions: Directions,
        probes: Sequence[Probe],
        closure: Closure | None,
        expected_loss: Tensor | float | None,
    ) -> Measurement:
        if not probes:
            return Measurement([])
        if closure is None:
            raise ValueError(
                f"{type(self).__name__} measures the loss and needs a closure: "
                "estimator.refine_grads_(lambda: loss_fn(model(x), y))"
            )
        if self.one_sided and expected_loss is None:
            raise ValueError(
                "one-sided differences start from the loss that backward() saw, in every step: "
                "estimator.refine_grads_(closure, expected_loss=loss)"
            )
        return measure(
            self._probes,
            directions,
            probes,
            closure,
            at_once=self.probes_at_once,
            lean=self.lean,
            track_flips=self.track_flips,
            expected_loss=expected_loss,
            one_sided=self.one_sided,
            audit=self._audit,
        )

    def _agreement_error(
        self,
        share: float,
        directions: Directions,
        norm: float,
        measured: Measurement,
        probes: Sequence[Probe],
    ) -> float:
        error = agreement_error(
            directions.moments(), share, norm, measured.loss_error, len(probes), self.one_sided
        )
        agreement = mean_along_probes(probes, measured.slopes, norm).guide
        if is_explained(agreement, error):
            return error
        return math.hypot(error, directions.unevenness())

    def _reason_to_fall_back(
        self, directions: Directions, norm: float, measured: Measurement
    ) -> str | None:
        if self.needs_gradient and not math.isfinite(norm):
            return "the first-order gradient is not finite"
        if self.needs_gradient and norm == 0:
            return NO_STEP if directions.has_gradient() else "the first-order gradient is zero"
        if not measured.is_finite:
            return NOT_FINITE
        if not measured.losses:
            return None
        is_coarse = measured.dtype.itemsize < 4
        if measured.unchanged is not None and not (is_coarse and measured.unchanged == NO_EFFECT):
            return measured.unchanged
        gap = 2 * max(map(abs, measured.slopes))
        predicted = 2 * norm if self.needs_gradient else math.inf
        if gap <= _RESOLVED * measured.loss_error or predicted <= measured.loss_error:
            return f"the probes change the loss by less than {name_of(measured.dtype)} {RESOLVES}"
        return None

    def _warn(
        self,
        fallback: str | None,
        agreement: float | None,
        error: float | None,
        grad_scale: float,
        dtype: torch.dtype,
    ) -> None:
        """Say once per run what deserves to be known of a step."""
        kind, text = fallback, None
        if fallback is not None:
            text = advice(fallback)
            kind = "half" if fallback.endswith(RESOLVES) and dtype.itemsize < 4 else fallback
        elif dtype.itemsize < 4:
            kind, text = "half", coarse_loss(dtype)
        elif agreement is not None and error is not None:
            first = self._audit.steps == 1
            kind, text = "agreement", doubt(agreement, error, grad_scale, first)
        if kind and text and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=4)
