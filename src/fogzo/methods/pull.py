"""A pull to the grid: CAGE, WinQ and oscillation dampening through one mechanism.

All three act on ``w - Q(w)``, the distance of a latent weight from the level that it rounds to.
CAGE and WinQ take a part of it away after the optimizer's step, as decoupled weight decay does
with w; dampening adds it to the gradients before. None of them needs a forward pass.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fogzo.collectives import full, local, reshard, shard_like
from fogzo.layers import QuantizedLayer, quantized_weights
from fogzo.layers.weights import QuantizedWeight, WeightLike, as_quantized_weights
from fogzo.methods.ramps import (
    CosineRamp,
    LinearRamp,
    Periodic,
    Strength,
    as_strength,
    strength_at,
)
from fogzo.quantizers.checks import is_number, require_positive
from fogzo.wording import listed

Weights = nn.Module | Iterable[WeightLike]


class _Scheduled:
    """What the two kinds of pull share: weights whose levels are known, and a count of steps."""

    def __init__(self, weights: Weights, strength: float | Strength) -> None:
        self.weights = weights_with_levels(weights)
        self.strength = as_strength(strength)
        self.step = 0
        self._warned_of_float = False

    def state_dict(self) -> dict[str, int]:
        """The step, on which the strength depends."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: If it is not a state of a pull.
        """
        self.step = step_of(state_dict, "pull")

    def _trained(self) -> list[QuantizedWeight]:
        reshard({id(w.model): w.model for w in self.weights if w.model is not None}.values())
        return [weight for weight in self.weights if weight.param.requires_grad]

    def _on_grids(self, weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
        """Those that are rounded at present; that others are left alone is said once."""
        # Step sizes are measured again at the end of a float phase: until then levels are stale.
        floating = in_float(weights)
        left = [weight.name for weight in weights if id(weight.param) in floating]
        if left and not self._warned_of_float:
            self._warned_of_float = True
            warnings.warn(
                f"the strength is not 0 at step {self.step}, where {listed(left)} are still in "
                "float (fogzo.methods.quantize_from), and weights are not pulled to levels before "
                "they are rounded to them: let the strength be 0 until then, with start=0.5 in "
                "both calls for example. Said once",
                RuntimeWarning,
                stacklevel=4,
            )
        return [weight for weight in weights if id(weight.param) not in floating]


class GridPull(_Scheduled):
    """Moves each weight a part of the way to its level. Call it after the optimizer's step.

    ``w <- w - share * (w - Q(w))``, with Q at the weights that the optimizer left and in the basis
    where they are rounded. Weights beyond the range are pulled in. The codes stay what they are
    (exactly for step sizes that are kept; dynamic ones follow the weights), and so do step sizes,
    the optimizer's state and entries that a record holds. At strength 0 nothing is touched, nor
    are weights in the float phase of `quantize_from`.

    Args:
        weights: A quantized model, or what `fogzo.quantized_weights` lists, made after
            ``fully_shard``.
        strength: A number, 0 or more, or a function of the step (counted from 0) that returns one.
        optimizer: If given, the share is ``learning rate * strength`` with the present learning
            rate of each weight's group, as in decoupled weight decay; otherwise the strength
            itself. A list where several optimizers train the weights.

    Raises:
        ValueError: If the levels of a weight are not known, or no optimizer trains it.
    """

    def __init__(
        self,
        weights: Weights,
        strength: float | Strength,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> None:
        super().__init__(weights, strength)
        self.optimizers = None if optimizer is None else _as_optimizers(optimizer)
        self._learning_rates(self._trained())
        self._warned = False

    @torch.no_grad()
    def pull_(self) -> None:
        """Pull all weights that are trained, and count a step.

        Raises:
            ValueError: If the strength is negative or not finite at this step, or the learning rate
                times it is. Then no weight has been changed.

        Warns:
            RuntimeWarning: Once if a share is more than 1, and once if weights are in a float phase
                and left alone while the strength is not 0.
        """
        strength = strength_at(self.strength, self.step)
        if strength != 0:
            weights = self._on_grids(self._trained())
            rates = self._learning_rates(weights)
            for weight, rate in zip(weights, rates, strict=True):
                self._check_share(weight, rate, strength)
            for weight, rate in zip(weights, rates, strict=True):
                if rate:
                    _move(weight, self._share(weight, rate * strength))
        self.step += 1

    def _learning_rates(self, weights: Sequence[QuantizedWeight]) -> list[float]:
        if self.optimizers is None:
            return [1.0] * len(weights)
        # Groups are asked anew each time: schedulers and load_state_dict write to them.
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates: dict[int, Any] = {id(p): g.get("lr") for g in groups for p in g["params"]}
        missing = [weight.name for weight in weights if id(weight.param) not in rates]
        if missing:
            raise ValueError(
                f"{missing[0]!r} is in no group of the optimizer, so its learning rate is not "
                "known: give all optimizers that train quantized weights, optimizer=[muon, adamw], "
                "made after fully_shard"
            )
        found = [rates[id(weight.param)] for weight in weights]
        if None in found:
            raise ValueError(
                f"{weights[found.index(None)].name!r} is in a group of the optimizer that has no "
                "learning rate, which the strength is multiplied by: set one (in transformers, "
                "Adafactor(params, lr=1e-3, relative_step=False)), or pull without learning rates, "
                "GridPull(weights, strength)"
            )
        return [float(rate) for rate in found]

    def _check_share(self, weight: QuantizedWeight, rate: float, strength: float) -> None:
        if not 0 <= rate * strength < math.inf:
            raise ValueError(
                "learning rate times strength must be finite, 0 or more, got "
                f"{rate:g} * {strength:g} for {weight.name!r} at step {self.step}: mind what the "
                'scheduler writes, optimizer.param_groups[0]["lr"] = 1e-3, or pull without '
                "learning rates, GridPull(weights, strength)"
            )

    def _share(self, weight: QuantizedWeight, share: float) -> float:
        if share > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"learning rate times strength is {share:.3g} for {weight.name!r}: more than 1 "
                "would carry weights past their levels, so each is put on its level. Use a "
                "strength below 1 / learning rate. Said once",
                RuntimeWarning,
                stacklevel=4,
            )
        return min(share, 1.0)


class GridPenalty(_Scheduled):
    """Adds the gradient of a penalty on the distance from the grid. Call it before the step.

    The penalty is ``strength * sum (Q(w) - clip(w))^2`` with Q held, so the gradient is
    ``2 * strength * (w - Q(w))`` within the range of levels and 0 beyond it. Weights in the float
    phase of `quantize_from` get none.

    Args:
        weights: As for `GridPull`.
        strength: As for `GridPull`.
        mean_over_inputs: Divide by the number of inputs of an output, as the authors do: the
            penalty is then the mean over inputs, summed over outputs.

    Raises:
        ValueError: If the levels of a weight are not known.
    """

    def __init__(
        self, weights: Weights, strength: float | Strength, mean_over_inputs: bool = False
    ) -> None:
        super().__init__(weights, strength)
        self.mean_over_inputs = mean_over_inputs

    @torch.no_grad()
    def add_grads_(self, grad_scale: float = 1.0) -> None:
        """Add to the gradients of all weights that have one, and count a step.

        Call it between backward and step; before clipping, if what is clipped is to be the
        gradient of loss and penalty together.

        Args:
            grad_scale: What the gradients are multiplied by at present: ``scaler.get_scale()``
                before ``scaler.unscale_(optimizer)``, else 1.

        Raises:
            ValueError: If there are no gradients, the scale is no positive, finite number, or the
                strength is negative or not finite at this step. Then no gradient has been changed.

        Warns:
            RuntimeWarning: Once if weights are in a float phase and left alone while the strength
                is not 0.
        """
        if isinstance(grad_scale, Tensor) and grad_scale.numel() == 1:
            grad_scale = grad_scale.item()
        require_positive("grad_scale", grad_scale, "grad_scale=scaler.get_scale()")
        strength = 2 * grad_scale * strength_at(self.strength, self.step)
        weights = self._trained()
        used = [weight for weight in weights if weight.param.grad is not None]
        if weights and not used:
            raise ValueError(
                "no quantized weight has a gradient. Call it after backward and before zero_grad: "
                "loss.backward(); penalty.add_grads_(); optimizer.step()"
            )
        for weight in self._on_grids(used) if strength else []:
            assert weight.param.grad is not None
            grad, factor = local(weight.param.grad), strength
            if self.mean_over_inputs:
                factor /= weight.inputs
            grad.add_(_distance_within_range(weight).to(grad.dtype), alpha=factor)
        self.step += 1


def cage(
    weights: Weights,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    total_steps: int,
    strength: float = 10.0,
    start: float = 0.8,
) -> GridPull:
    """CAGE (arXiv 2510.18784): a pull that grows over the last part of training.

    The share is ``lr_t * lam_t``, where lam rises linearly from 0 at ``start`` to ``strength`` at
    the end. The defaults are those of the authors' training script, for runs of 10,000 steps and
    more. A short run ends before they have pulled much: there ``start=0`` is better.

    Args:
        weights: As for `GridPull`.
        optimizer: Whose learning rates multiply the strength.
        total_steps: Optimizer steps of the whole run.
        strength: At the end of the run.
        start: Fraction of the run after which the pull begins.
    """
    ramp = LinearRamp(strength, total_steps, start)
    return GridPull(weights, ramp, _as_optimizers(optimizer))


def winq(weights: Weights, *, every: int, keep: float = 0.2) -> GridPull:
    """WinQ's resets (arXiv 2605.17471): ``w <- keep * w + (1 - keep) * Q(w)`` every so often.

    The authors reset every quarter of the run (up to 2 bits) or half (3 bits and more), in runs of
    80,000 steps and more. Their other part, noise on the weights of every training pass, is the
    quantizer's: ``replace(fogzo.lsq(2), noise=1e-3)``.

    Args:
        weights: As for `GridPull`.
        every: Steps from one reset to the next.
        keep: Share of the distance that a reset leaves, the authors' alpha. Other ports say alpha
            for the share that it takes away.
    """
    if not (is_number(keep) and 0 <= keep <= 1):
        raise ValueError(f"keep must be from 0 to 1, got {keep!r}: winq(weights, every=100)")
    return GridPull(weights, Periodic(1 - keep, every))


def dampening(
    weights: Weights,
    *,
    total_steps: int,
    strength: float = 0.1,
    start: float = 0.25,
    mean_over_inputs: bool = True,
) -> GridPenalty:
    """Oscillation dampening (Nagel et al., arXiv 2203.11086).

    The strength is 0 up to ``start`` and rises by a cosine to its value at the end. The defaults
    are the authors', for convolutions of few inputs. Large layers need more, in proportion to
    their inputs, or ``mean_over_inputs=False``.

    Args:
        weights: As for `GridPull`.
        total_steps: Optimizer steps of the whole run.
        strength: At the end of the run.
        start: Fraction of the run after which it begins.
        mean_over_inputs: As for `GridPenalty`.
    """
    ramp = CosineRamp(strength, total_steps, start)
    return GridPenalty(weights, ramp, mean_over_inputs)


def _as_optimizers(given: object) -> Sequence[Optimizer]:
    """A list of optimizers, from one or from several.

    Raises:
        ValueError: If they are none.
    """
    found = [given] if hasattr(given, "param_groups") else given
    if isinstance(found, Sequence) and all(hasattr(one, "param_groups") for one in found):
        return found
    raise ValueError(
        f"optimizer must be a torch.optim.Optimizer or a list of some, got {given!r:.80}: "
        "fogzo.methods.cage(model, torch.optim.AdamW(model.parameters()), total_steps=10_000)"
    )


def as_records(weights: Weights) -> list[QuantizedWeight]:
    """Records of a model's quantized weights, or of those that are listed.

    Raises:
        ValueError: If they cannot be quantized weights.
    """
    given = quantized_weights(weights) if isinstance(weights, nn.Module) else weights
    return as_quantized_weights(given)


def weights_with_levels(weights: Weights) -> list[QuantizedWeight]:
    """Records of a model's quantized weights, all with known levels.

    Raises:
        ValueError: If one has none, or they cannot be quantized weights.
    """
    records = as_records(weights)
    for record in records:
        if record.grid is None:
            raise ValueError(
                f"the levels of {record.name!r} are not known, or not evenly spaced, so it has no "
                "nearest one: take fogzo.quest(2) for fogzo.bbq(2), and say those of a fake "
                "quantization of your own, fogzo.QuantizedWeight(name, param, step_size, "
                "grid=fogzo.quantizers.uniform(2))"
            )
    return records


def in_float(weights: Iterable[QuantizedWeight]) -> set[int]:
    """The ids of the parameters that their layers use in float for now."""
    models = {id(w.model): w.model for w in weights if w.model is not None}.values()
    layers = (layer for model in models for layer in model.modules())
    return {
        id(layer.weight)
        for layer in layers
        if isinstance(layer, QuantizedLayer) and layer.is_in_float
    }


class Rounded(NamedTuple):
    """This rank's shard of a weight in the basis where it is rounded, in float32 or finer.

    Attributes:
        w: The latent weight.
        level: What it rounds to in the weight's own dtype, as in a forward pass.
        low: Smallest level, broadcastable.
        high: Largest level, broadcastable.
    """

    w: Tensor
    level: Tensor
    low: Tensor
    high: Tensor


def rounded(weight: QuantizedWeight) -> Rounded:
    """A weight whose grid is known, and its levels. If it is sharded, all ranks ask together."""
    param, grid = local(weight.param), weight.grid
    assert grid is not None
    step = shard_like(full(weight.step_size()).detach().to(param), weight.param)
    w = param if weight.rotate is None else weight.rotate(param)
    # Beside a step of 0, that of a dead group, the one level is 0: 0 / 0 would be no number.
    level = grid.round(w / step.where(step != 0, 1)) * step
    wide = torch.promote_types(param.dtype, torch.float32)
    return Rounded(w.to(wide), level.to(wide), grid.low * step.to(wide), grid.high * step.to(wide))


def step_of(state_dict: object, name: str) -> int:
    """The step in a state.

    Raises:
        ValueError: If it is none.
    """
    given = state_dict if isinstance(state_dict, dict) else {}
    if not (set(given) == {"step"} and isinstance(given["step"], int) and given["step"] >= 0):
        raise ValueError(
            f"expected one integer, step, got {state_dict!r:.80}: "
            f"{name}.load_state_dict(checkpoint['{name}'])"
        )
    return int(given["step"])


def _move(weight: QuantizedWeight, share: float) -> None:
    param = local(weight.param)
    w, level, _, _ = rounded(weight)
    if weight.rotate is None:
        level = level.where(free(weight), w)
        param.copy_(torch.lerp(w, level, share))  # exactly the level at 1
    else:
        change = weight.rotate(level - w) * free(weight)
        param.copy_(param.to(change.dtype).add_(change, alpha=share))


def _distance_within_range(weight: QuantizedWeight) -> Tensor:
    """``clip(w) - Q(w)`` in the weight's own basis, 0 where the record holds it."""
    w, level, low, high = rounded(weight)
    distance = w.clamp(low, high) - level
    if weight.rotate is not None:
        distance = weight.rotate(distance)
    return distance * free(weight)


def free(weight: QuantizedWeight) -> Tensor:
    """True where a weight may move; broadcastable to this rank's shard."""
    device = local(weight.param).device
    if weight.held is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return shard_like(~weight.held.to(device), weight.param)
