"""CEWT: an optimizer whose weights keep their norm and the distribution of a Gaussian.

Weights under STE crowd on thresholds and oscillate there. If their distribution is fixed, so is
the density at thresholds (arXiv 2609.32659).
"""

import itertools
import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fogzo.collectives import is_sharded
from fogzo.layers.weights import QuantizedWeight
from fogzo.methods.pull import Weights, as_records
from fogzo.quantizers.checks import require_positive, require_type
from fogzo.wording import listed


class Cewt:
    """Constrains the steps of an optimizer, by hooks on it; made by `cewt`.

    Each step of the optimizer, from W to W + D, becomes ``P(W + lr * ||W0|| * D / ||D||)``: its
    length is the learning rate times the norm that the weight began with, and P puts the weights
    back on a Gaussian of that norm, in their order.

    Attributes:
        norms: ``||W0||`` of each weight, by name and in the order of the weights. A name that
            occurs again, as in two networks with one optimizer, has a number: ``"0.weight (2)"``.
    """

    def __init__(self, weights: Weights, optimizer: Optimizer, project: bool) -> None:
        example = "torch.optim.AdamW(model.parameters(), weight_decay=0.0)"
        require_type("optimizer", optimizer, Optimizer, example)
        _check_hooks(optimizer)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        records = as_records(weights)
        self.weights = [w for w in records if w.param.requires_grad]
        self._frozen = [w for w in records if not w.param.requires_grad]
        for weight in self.weights:
            _check(weight, trained)
        self.project = project
        self.norms: dict[str, float] = {}
        for weight in self.weights:
            norm = float(torch.linalg.vector_norm(weight.param.detach()))
            _check_norm(weight.name, norm)
            self.norms[_unused(weight.name, self.norms)] = norm
        self._before: dict[int, Tensor] = {}  # by position, as names may occur twice
        self._warned = False
        self._check_groups(optimizer)
        self._handles: Sequence[RemovableHandle] = (
            optimizer.register_step_pre_hook(self._save),
            optimizer.register_step_post_hook(self._constrain),
        )

    def remove(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The norms that weights began with."""
        return {"norms": dict(self.norms)}

    def load_state_dict(self, state_dict: dict[str, dict[str, float]]) -> None:
        """Continue with the norms that `state_dict` returned.

        Raises:
            ValueError: If they are not of the same weights, or one is none that can be kept.
        """
        norms = state_dict.get("norms") if isinstance(state_dict, dict) else None
        if not isinstance(norms, dict) or norms.keys() != self.norms.keys():
            raise ValueError(
                f"expected the norms of {', '.join(self.norms)}, got {state_dict!r:.80}: "
                "constraint.load_state_dict(checkpoint['constraint'])"
            )
        example = "constraint.load_state_dict(checkpoint['constraint']) from before it diverged"
        for name, norm in norms.items():
            require_positive(f"the norm of {name!r}", norm, example)
        self.norms = {name: float(norms[name]) for name in self.norms}

    def _save(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._check_groups(optimizer)
        self._before = {
            index: weight.param.detach().clone()  # one without a gradient may get it in a closure
            for index, weight in enumerate(self.weights)
        }

    @torch.no_grad()
    def _constrain(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        norms, put_back = list(self.norms.values()), []
        lengths = {
            index: torch.linalg.vector_norm(self.weights[index].param - before)
            for index, before in self._before.items()
        }
        for (index, length), known in zip(lengths.items(), _read(lengths.values()), strict=True):
            weight, before = self.weights[index], self._before.pop(index)
            param, norm = weight.param, norms[index]
            if not math.isfinite(known):
                param.copy_(before)
                put_back.append(weight.name)
            elif known > 0:  # else it has no direction
                factor = float(rates[id(param)]) * norm / length
                moved = torch.addcmul(before, param - before, factor)
                param.copy_(self._projected(weight, moved, norm))
        if put_back and not self._warned:
            self._warned = True
            _warn_of_updates(put_back)

    def _projected(self, weight: QuantizedWeight, moved: Tensor, norm: float) -> Tensor:
        """A weight that was moved, with its norm and, unless that is all, on a Gaussian."""
        if not self.project:
            return _scaled(moved, norm)
        if weight.rotate is None:
            return project_to_gaussian(moved, norm)
        return weight.rotate(project_to_gaussian(weight.rotate(moved), norm))

    def _check_groups(self, optimizer: Optimizer) -> None:
        own = {id(weight.param): weight.name for weight in self.weights}
        thawed = {id(w.param): w.name for w in self._frozen if w.param.requires_grad}
        for group in optimizer.param_groups:
            late = [thawed[id(param)] for param in group["params"] if id(param) in thawed]
            if late:
                raise ValueError(
                    f"{late[0]!r} was frozen when it was listed for CEWT, and would train without "
                    "the constraint: list it anew, constraint.remove(), then "
                    "constraint = fogzo.methods.cewt(model, optimizer)"
                )
            names = [own[id(param)] for param in group["params"] if id(param) in own]
            if names and group.get("weight_decay"):
                raise ValueError(
                    f"{names[0]!r} has a weight decay of {group['weight_decay']}, "
                    "which only turns the step of a weight whose norm is kept: put it in "
                    'a group with "weight_decay": 0.0'
                )
            if names and group.get("lr") is None:
                raise ValueError(
                    f"{names[0]!r} is in a group of the optimizer that has no learning rate, which "
                    "is the length of its steps: set one, as in "
                    "torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)"
                )


def cewt(weights: Weights, optimizer: Optimizer, *, project: bool = True) -> Cewt:
    """Keep the norm and the distribution of quantized weights in every step of an optimizer.

    One call before training, and nothing in the loop: the optimizer is hooked, so that gradient
    scalers and schedulers work as ever. It trains any parameters; those listed here get the
    constraint. Learning rates mean another thing for them, a step's length relative to the
    weight's: the authors use 0.01 for 30M parameters to 0.00125 for 430M with AdamW.

    Weights that are frozen at this call are left out; once they train, a step asks for another.
    Weights that are rotated before they are rounded are constrained in that basis. Initialise
    weights as Gaussians: the first step makes them so, whatever the inputs are. In the authors'
    models this helps; docs/methods.md has what was measured here. A weight that the optimizer
    does not move, as its gradient is 0, stays where it is, and so does one whose update is not
    finite.

    Cost: a sort of each weight per step (0.15 s per million weights on one CPU core; little on a
    GPU) and a copy of the weights during the step.

    Args:
        weights: A quantized model, or what `fogzo.quantized_weights` lists.
        optimizer: Any that trains all of them, without weight decay on them.
        project: False keeps the norm alone.

    Returns:
        The constraint, with ``state_dict()``, ``load_state_dict()`` and ``remove()``.

    Raises:
        ValueError: If a weight is not in the optimizer, has a weight decay or no learning rate, is
            sharded, must keep some entries, or has a norm of 0 or one that is not finite.

    Warns:
        RuntimeWarning: Once, in a step whose update of a weight is not finite.
    """
    return Cewt(weights, optimizer, project)


def project_to_gaussian(weight: Tensor, norm: float | None = None) -> Tensor:
    """The Gaussian quantiles of the weights' ranks, times what gives them the norm.

    The order of all weights stays (of equal ones, that of their places), and the result depends on
    nothing else. Applied again it changes nothing. A single weight, whose quantile is 0, keeps its
    sign instead.

    >>> project_to_gaussian(torch.tensor([5.0, 0.1, -0.2]), norm=1.0)
    tensor([ 0.7071,  0.0000, -0.7071])

    Args:
        weight: All of a weight.
        norm: Of the result; by default the weight's own.
    """
    if norm is None:
        norm = float(torch.linalg.vector_norm(weight))
    count = weight.numel()
    if count == 1:
        return torch.full_like(weight, norm).copysign_(weight)
    order = weight.flatten().argsort(stable=True)
    ranks = torch.arange(count, dtype=torch.float64, device=weight.device)
    z = torch.erfinv((ranks + 0.5) * (2 / count) - 1)  # sqrt(2) cancels in the norm
    z *= norm / torch.linalg.vector_norm(z)
    result = torch.empty(count, dtype=weight.dtype, device=weight.device)
    return result.index_copy_(0, order, z.to(weight.dtype)).view_as(weight)


def _read(scalars: Collection[Tensor]) -> list[float]:
    """Their values, with one wait for a device instead of one for each."""
    if not scalars:
        return []
    device = next(iter(scalars)).device
    return torch.stack([scalar.to(device) for scalar in scalars]).tolist()


def _scaled(weight: Tensor, norm: float) -> Tensor:
    """A tensor of that norm; zeros, which have no direction, as they are."""
    length = torch.linalg.vector_norm(weight)
    return weight * (norm / length.where(length > 0, 1))


def _unused(name: str, taken: Collection[str]) -> str:
    """A name that is not taken: the one given, or with a number behind it."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(made for made in itertools.chain([name], numbered) if made not in taken)


def _warn_of_updates(names: Sequence[str]) -> None:
    """Say that these weights were put back."""
    warnings.warn(
        f"the optimizer's update of {listed(names)} is not finite, and has been taken back: "
        "torch.autograd.set_detect_anomaly(True) finds where that begins. "
        "Optimizers that average gradients, such as AdamW, do not recover: leave such steps out, "
        "norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), then optimizer.step() "
        "if norm.isfinite(). Said once",
        RuntimeWarning,
        stacklevel=5,  # who calls optimizer.step(), behind wrappers of torch's
    )


def _check_hooks(optimizer: Optimizer) -> None:
    # A wrapper that has not called the constructor of torch's class.
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} wraps another optimizer and has no hooks, in which "
            "steps are constrained: give the one inside, as of accelerate "
            "fogzo.methods.cewt(model, optimizer.optimizer)"
        )


def _check(weight: QuantizedWeight, trained: set[int]) -> None:
    if id(weight.param) not in trained:
        raise ValueError(
            f"{weight.name!r} is in no group of the optimizer: list the weights that it trains, "
            "or make an optimizer of all, torch.optim.AdamW(model.parameters(), weight_decay=0.0)"
        )
    if is_sharded(weight.param):
        raise ValueError(
            f"{weight.name!r} is sharded, but ranks of its values are among all of them: train "
            "with DDP, fogzo.methods.cewt(model, optimizer) before DistributedDataParallel(model)"
        )
    if weight.held is not None:
        raise ValueError(
            f"some entries of {weight.name!r} must not move (the padding of an embedding), but "
            "the projection moves all: leave it out, "
            "[w for w in fogzo.quantized_weights(model) if w.held is None]"
        )


def _check_norm(name: str, norm: float) -> None:
    if not 0 < norm < math.inf:
        raise ValueError(
            f"the norm of {name!r} is {norm:g} and would be kept for ever: initialise it before, "
            "for example torch.nn.init.normal_(layer.weight, std=0.02), or leave it out, "
            f"[w for w in fogzo.quantized_weights(model) if w.name != {name!r}]"
        )
