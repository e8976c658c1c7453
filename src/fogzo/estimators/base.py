"""The part that all gradient estimators share: one call between backward and step."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, TypedDict, TypeVar, get_args

import torch
from torch import Tensor, nn

from fogzo.estimators.fallbacks import (
    caution,
    changed_since_backward,
    in_16_bits,
    nothing_measured,
    nothing_to_follow,
    warn_if_noise_dominates,
)
from fogzo.estimators.refined import mark_refined, weights_to_refine
from fogzo.estimators.schedules import (
    NoiseShare,
    as_noise_share,
    bind,
    kappa_from_noise_share,
)
from fogzo.estimators.stats import RefineStats
from fogzo.layers.audit import LayerAudit
from fogzo.layers.quantized_layer import QuantizedLayer
from fogzo.layers.weights import QuantizedWeight, WeightLike, as_quantized_weights
from fogzo.probing.audit import Audit
from fogzo.probing.directions import Direction, Directions, NoiseShape, mix_seed
from fogzo.probing.flips import flip_rate
from fogzo.probing.lender import Closure, Lender
from fogzo.probing.measure import NOT_FINITE, Evaluate, Measurement, check_evaluate, measure
from fogzo.probing.window import Window
from fogzo.quantizers.checks import is_number, require_count, require_seed

_Arguments = ParamSpec("_Arguments")
_Output = TypeVar("_Output")


class Refined(NamedTuple):
    """The refined gradient ``guide * g + sum_i noise_i * u_i / eps``.

    Attributes:
        guide: Factor of the first-order gradient.
        noise: Pairs (sample, factor).
        agreement: The measured agreement, if one was measured.
        agreement_error: Its standard error.
    """

    guide: float
    noise: Sequence[tuple[int, float]] = ()
    agreement: float | None = None
    agreement_error: float | None = None


class EstimatorOptions(TypedDict, total=False):
    """The keyword arguments that every member of the family takes; see `GradientEstimator`."""

    num_samples: int
    noise_share: float | NoiseShare | None
    noise_shape: NoiseShape | None
    one_sided: bool
    evaluate: Evaluate
    seed: int
    model: nn.Module | None


class GradientEstimator(ABC):
    """Plans directions, measures losses along them, and rewrites the gradients.

    A member of the family says which directions to measure along (`plan`) and what to make of the
    slopes (`combine`); everything else is here.

    Args:
        weights: What `quantized_weights` lists, or ``(name, param, step_size)`` triples of your
            own fake quantization.
        num_samples: n, how many directions are averaged per step.
        noise_share: q = 1 - beta in [0, 1), or a function of the step that may return None to
            leave the gradient alone. By default the member's own.
        noise_shape: ``"tensor_rms"`` or ``"isotropic"``, the paper's; see `Directions`. By default
            the first where there is a guide: optimizers that normalise gradients, and clipping,
            turn isotropic noise into a random walk of all layers whose gradients are small.
        one_sided: Measure ``L(w + v) - L(w)`` instead of ``[L(w + v) - L(w - v)] / 2``: n forward
            passes per step, as backward's own loss is L(w). `refine_grads_` then needs
            ``expected_loss`` in every step, from a forward pass in the same mode and random state.
            The mean is the same where the loss is linear or quadratic along v; the variance grows
            by ``E[(v.Hv)^2 |v|^2] / 4n`` for a Hessian H of the smoothed loss, and fewer rounded
            weights average out in one difference.
        evaluate: How probes are evaluated; the result is the same. ``"in_place"`` moves the
            weights and keeps a copy of them. ``"lean"`` moves each weight only while its layer
            computes, by hooks: the extra memory is one layer, and the noise is drawn once more per
            pair; not for compiled models. ``"stacked"`` evaluates many directions in one
            `torch.vmap` over copies of the weights, which pays where many samples meet a small
            model; memory grows by as many activations.
        seed: Directions follow from it and the step. Give every rank the same: at
            steps 1, 10, 100, ... other ones are refused.
        model: The model of hand-written triples, so that its buffers and modes are protected.

    Attributes:
        num_weights: How many weights were trained when the last step was refined.
        step: How many steps have been refined.
        stats: What the last `refine_grads_` returned.

    Raises:
        ValueError: If an argument is out of range or a weight cannot be perturbed.
    """

    needs_gradient = True
    mixes_noise = True  # by `noise_share`, with a guide
    noise_shape: NoiseShape = "tensor_rms"
    noise_share: NoiseShare
    num_weights = -1  # not counted yet

    def __init__(
        self,
        weights: Iterable[WeightLike],
        *,
        num_samples: int = 1,
        noise_share: float | NoiseShare | None = None,
        noise_shape: NoiseShape | None = None,
        one_sided: bool = False,
        evaluate: Evaluate = "in_place",
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        name = type(self).__name__
        self.weights: list[QuantizedWeight] = as_quantized_weights(weights)
        self.num_samples = require_count(
            "num_samples", num_samples, f"{name}(weights, num_samples=1)"
        )
        if noise_shape is not None:
            check_choice("noise_shape", noise_shape, get_args(NoiseShape), self.noise_shape)
            self.noise_shape = noise_shape
        if not isinstance(one_sided, bool):
            raise ValueError(
                f"one_sided must be True or False, got {one_sided!r:.80}: "
                f"{name}(weights, one_sided=True)"
            )
        if not (model is None or isinstance(model, nn.Module)):
            raise ValueError(
                f"model must be the nn.Module that holds the weights, got {type(model).__name__}: "
                f"{name}(weights, model=model)"
            )
        self._noise_share = noise_share
        self._count_weights()
        if self.mixes_noise and isinstance(noise_share, float):
            warn_if_noise_dominates(noise_share, self.num_weights, self.num_samples)
        self.one_sided = one_sided
        self.seed = require_seed(seed)
        self.step = 0
        self.stats: RefineStats | None = None
        self._lender = Lender(self.weights, model)
        check_evaluate(evaluate, self.weights, self._lender)
        self.evaluate: Evaluate = evaluate
        self._window = Window(self.weights, self._lender)
        self._audit = Audit()
        modules = (module for model in self._lender.models for module in model.modules())
        self._layers = [module for module in modules if isinstance(module, QuantizedLayer)]
        self._layer_audits = [LayerAudit(model) for model in self._lender.models]
        self._num_refined = 0
        self._warned: set[str] = set()

    @abstractmethod
    def default_noise_share(self) -> float | NoiseShare:
        """The noise share used where none is given."""

    @abstractmethod
    def plan(self, noise_share: float, directions: Directions) -> list[Direction]:
        """The directions to measure along in this step; none if no loss is needed."""

    @abstractmethod
    def combine(
        self,
        noise_share: float,
        directions: Directions,
        plan: Sequence[Direction],
        measured: Measurement,
    ) -> Refined:
        """The refined gradient, from the slopes measured along the plan.

        Args:
            noise_share: As given to `plan`.
            directions: As given to `plan`.
            plan: What `plan` returned.
            measured: Its losses; ``measured.slopes`` are ``(L+ - L-) / 2``, one per direction.
        """

    def record(
        self,
        compute_loss: Callable[_Arguments, _Output],
        /,
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Output:
        """Compute a loss, and remember how: `refine_grads_` then needs no closure.

        Of every micro-batch since the last optimizer step it keeps the function, the arguments,
        the random streams, the modes of modules and autocast as they were, and what backward()
        multiplied its loss by: a division by the number of micro-batches, a `GradScaler`, the
        weight of one loss among several. The loop may then skip a micro-batch, unscale or clip.

        Under `torch.no_grad`, and in steps that measure nothing, as their noise share is None or
        the layers compute in float (`quantize_from`), it calls the function only.

        Args:
            compute_loss: Returns the scalar loss, alone, first in a tuple, as "loss" of a dict or
                as ``.loss`` of an object. The same arguments must give the same loss again: what
                changes from batch to batch is to be an argument, not a variable of the loop.
            *args: Its arguments. They are kept until the gradients are refined or dropped.
            **kwargs: Its keyword arguments.

        Returns:
            What the function returns. Call backward() on the loss in it, or on what the loop makes
            of it by factors and sums.

        Raises:
            ValueError: If there is no loss in what the function returns, or the function changes
                its arguments in place.
        """
        if self._share_now() is None or not torch.is_grad_enabled():
            return compute_loss(*args, **kwargs)
        return self._window.record(compute_loss, args, kwargs)

    @contextmanager
    def record_rng(self) -> Iterator[None]:
        """Wrap the first-order forward pass, so that the probes replay its dropout masks."""
        self._lender.recorded_rng = self._lender.rng_state()
        yield

    @torch.no_grad()
    def refine_grads_(
        self,
        closure: Closure | None = None,
        expected_loss: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> RefineStats:
        """Replace the gradients of the quantized weights. Call it after backward, before clipping.

        Args:
            closure: Recomputes the scalar loss that backward() differentiated, on the same
                batches, without backward. Called 2n times, n times if one-sided. Leave it out,
                with ``expected_loss``, after `record`.
            expected_loss: That loss. The first, tenth, hundredth, ... call then checks, with one
                more forward pass, that the closure reproduces it, and every call looks whether
                the probes lie near it. One-sided differences start from it. Give it on all ranks
                or on none.
            grad_scale: What the gradients are multiplied by at present:
                ``scaler.get_scale()`` before ``scaler.unscale_(optimizer)``, else 1. After
                `record` it is measured, and giving it only divides the reported losses.

        Returns:
            The step's statistics. Where nothing could be measured (a loss or the gradient is not
            finite, no weight rounds differently, the loss is too coarse), ``fallback`` says why
            and the gradients are as backward left them, bit for bit.

        Raises:
            ValueError: If there are no gradients, they were refined already, or the closure is not
                that loss. Weights, gradients, buffers, modes and random streams are then as
                before the call.
        """
        scale = _check_grad_scale(grad_scale)
        try:
            stats = self._refine(closure, expected_loss, scale)
        finally:
            self._lender.recorded_rng = None  # it belonged to this step
        self._window.clear()
        self.step += 1
        self.stats = stats
        return stats

    def _refine(
        self, closure: Closure | None, expected_loss: Tensor | float | None, grad_scale: float
    ) -> RefineStats:
        share = self._share_now()
        if share is None:
            return RefineStats(self.step)
        directions = self._directions(grad_scale)
        plan = self.plan(share, directions)
        was_changed = False
        if self._window:
            self._check_recorded(closure, expected_loss)
            closure = self._window.loss(grad_scale)
            expected_loss, was_changed = closure.expected, closure.was_changed
        self._check_closure(plan, closure, expected_loss)
        measured, refined = Measurement(), Refined(1.0)
        fallback = nothing_to_follow(directions)
        if fallback is None and closure is not None and plan:
            measured = measure(
                self._lender,
                directions,
                plan,
                closure,
                evaluate=self.evaluate,
                expected_loss=expected_loss,
                one_sided=self.one_sided,
                audit=self._audit,
                alike=f"seed={self.seed}, step={self.step}, num_samples={self.num_samples}, "
                f"noise_share={share:.6g}",
            )
            fallback = nothing_measured(directions, measured)
        if fallback is None:
            refined = self.combine(share, directions, plan, measured)
            directions.write_grads_(refined.guide, refined.noise)
            if self.needs_gradient:
                mark_refined(directions.weights)
        self._look_after(fallback, measured, refined, grad_scale, was_changed)
        return RefineStats(
            step=self.step,
            agreement=refined.agreement,
            agreement_error=refined.agreement_error,
            applied_agreement=None if refined.agreement is None else refined.guide,
            probe_losses=tuple(measured.losses),
            base_loss=measured.base,
            noise_share=share if self.mixes_noise else None,
            kappa=kappa_from_noise_share(share, self.num_weights, self.num_samples)
            if self.mixes_noise
            else None,
            gradient_norm=directions.norm if self.needs_gradient else None,
            fallback=fallback,
        )

    @torch.no_grad()
    def flip_rate(self) -> float | None:
        """The share of integer codes that differ between the two sides of this step's first probe.

        Call it between backward and `refine_grads_`. It changes nothing and costs no forward pass.

        Returns:
            The share; None where this step measures nothing or a weight's record does not tell
            its codes.
        """
        coming = self._coming()
        if coming is None:
            return None
        _, directions, plan = coming
        with self._lender.lend(directions.weights):
            return flip_rate(directions, plan[0], self.one_sided)

    def state_dict(self) -> dict[str, float]:
        """The step and the seed, from which a resumed run draws the same directions."""
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If it is not a state of an estimator.
        """
        given = state_dict if isinstance(state_dict, dict) else {}
        if not (set(given) == {"step", "seed"} and all(isinstance(v, int) for v in given.values())):
            raise ValueError(
                f"expected two integers, step and seed, got {state_dict!r:.80}: "
                "estimator.load_state_dict(checkpoint['estimator'])"
            )
        self.step, self.seed = int(given["step"]), int(given["seed"])

    def _count_weights(self) -> None:
        """Fit the noise share to how many weights are trained at present."""
        trained = [weight.param for weight in self.weights if weight.param.requires_grad]
        params = trained or [weight.param for weight in self.weights]
        num_weights = sum(param.numel() for param in params)
        if num_weights != self.num_weights:
            self.num_weights = num_weights
            given = self._noise_share
            given = self.default_noise_share() if given is None else given
            self.noise_share = self._schedule(given)

    def _schedule(self, noise_share: float | NoiseShare) -> NoiseShare:
        return bind(as_noise_share(noise_share), self.num_weights, self.num_samples)

    def _share_now(self) -> float | None:
        """The noise share of this step; None leaves the gradient as it is."""
        self._count_weights()
        # In the float phase of `quantize_from` backward's gradient is exact.
        if self.needs_gradient and self._layers and all(map(_is_in_float, self._layers)):
            return None
        return self.noise_share(self.step)

    def _directions(self, grad_scale: float = 1.0) -> Directions:
        return Directions(
            weights_to_refine(self.weights, self._lender.models, self.needs_gradient),
            mix_seed(self.seed, self.step),
            grad_scale=grad_scale,
            noise_shape=self.noise_shape,
            guided=self.needs_gradient,
            lean=self.evaluate == "lean",
        )

    def _coming(self) -> tuple[float, Directions, list[Direction]] | None:
        """The noise share, directions and plan of the coming step; None if it measures nothing."""
        share = self._share_now()
        if share is None:
            return None
        directions = self._directions()
        plan = self.plan(share, directions)
        return (share, directions, plan) if plan and not nothing_to_follow(directions) else None

    def _check_recorded(
        self, closure: Closure | None, expected_loss: Tensor | float | None
    ) -> None:
        """Raise a `ValueError` if the loss is given twice."""
        if closure is not None or expected_loss is not None:
            raise ValueError(
                "the loss was recorded, with what to expect of it: estimator.refine_grads_(). Or "
                "compute it without estimator.record and give the closure: "
                "estimator.refine_grads_(closure, expected_loss=loss)"
            )

    def _check_closure(
        self,
        plan: Sequence[Direction],
        closure: Closure | None,
        expected_loss: Tensor | float | None,
    ) -> None:
        """Raise a `ValueError` unless what is needed to measure along the plan was given."""
        if plan and closure is None:
            raise ValueError(
                f"{type(self).__name__} measures the loss and needs a recorded one: "
                "loss = estimator.record(compute_loss, x, y), and then loss.backward() or "
                "accelerator.backward(loss). Or a closure: "
                "estimator.refine_grads_(lambda: loss_fn(model(x), y))"
            )
        if plan and self.one_sided and expected_loss is None:
            raise ValueError(
                "one-sided differences start from the loss that backward() saw, in every step: "
                "estimator.refine_grads_(closure, expected_loss=loss)"
            )

    def _look_after(
        self,
        fallback: str | None,
        measured: Measurement,
        refined: Refined,
        grad_scale: float,
        was_changed: bool,
    ) -> None:
        """Count the step, and give each warning once per run."""
        if fallback is None and self.needs_gradient:
            self._num_refined += 1
            if math.log10(self._num_refined).is_integer():
                for audit in self._layer_audits:
                    audit.check()
        if measured.losses and measured.failure != NOT_FINITE:
            self._audit.steps += 1
        found = caution(
            fallback,
            measured,
            refined.agreement,
            refined.agreement_error,
            grad_scale,
            first=self._audit.steps == 1,
        )
        changed = changed_since_backward() if was_changed and fallback is None else None
        for said in (in_16_bits(self.weights), changed, found):
            if said and said[0] not in self._warned:
                self._warned.add(said[0])
                warnings.warn(said[1], RuntimeWarning, stacklevel=5)


def mean_along(plan: Sequence[Direction], slopes: Sequence[float], norm: float) -> Refined:
    """The two-point estimate: the mean over directions of ``slope * v``."""
    count = len(plan)
    pairs = list(zip(plan, slopes, strict=True))
    guide = math.fsum(slope * direction.guide for direction, slope in pairs) / count
    noise = [(d.sample, slope * d.noise / count) for d, slope in pairs]
    return Refined(guide / norm if guide else 0.0, noise)


def check_choice(
    name: str, value: object, choices: Sequence[str], proposed: str | None = None
) -> None:
    """Raise a `ValueError` unless the value is one of the words, the first of which is proposed."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}: "
            f'{name}="{proposed or choices[0]}"'
        )


def _is_in_float(layer: QuantizedLayer) -> bool:
    # After `dequantize_` it is a plain layer; its step sizes, which it lacks, are asked for next.
    return isinstance(layer, QuantizedLayer) and layer.is_in_float


def _check_grad_scale(grad_scale: object) -> float:
    """The scale as a Python float.

    Raises:
        ValueError: If it is no positive, finite number, of Python, NumPy or in a tensor.
    """
    scale = grad_scale
    if isinstance(grad_scale, Tensor) and grad_scale.numel() == 1:
        scale = grad_scale.item()
    if not (is_number(scale) and 0 < scale < math.inf):
        raise ValueError(
            f"grad_scale must be a positive, finite number, got {grad_scale!r:.80}: "
            "grad_scale=scaler.get_scale()"
        )
    return float(scale)
