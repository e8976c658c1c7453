"""Perturbation directions of one step, drawn from seeds and never stored.

Everything happens in scale-normalised coordinates ``phi = theta / eps`` with
``eps = step_size * radius``, where every weight is one smoothing radius long. There a direction
is ``v = guide * ghat + noise * u``: ``ghat`` is the first-order gradient ``g_phi = eps * g``
divided by one global norm N, and u is independent noise drawn by each weight's smoothing law.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from fogzo.weights import QuantizedWeight

Coordinates = Literal["scaled", "global"]
NoiseShape = Literal["isotropic", "tensor_rms"]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """One well-mixed 64-bit seed from several integers (splitmix64's finaliser)."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class _Prepared:
    """What one weight needs in this step: computed once, used for every sample."""

    weight: QuantizedWeight
    grad: Tensor | None  # as backward left it
    eps: Tensor  # broadcastable to the weight
    guide_factor: Tensor  # eps^2 / N: eps * ghat = guide_factor * g
    rms_ratio: Tensor | None  # noise_shape="tensor_rms": this tensor's rms over the global one


class Directions:
    """The directions ``v_i`` of one step, over all weights.

    Args:
        weights: The weights to perturb.
        seed: Seeds of the noise follow from it and the sample's index.
        grad_scale: What the gradients are multiplied by at present.
        coordinates: ``"scaled"`` gives each weight its own eps, so that one agreement holds for
            all tensors; ``"global"`` uses their mean everywhere, the literal formula.
        noise_shape: ``"tensor_rms"`` gives each tensor noise in proportion to its gradient's rms.
        noise_on_masked: Whether weights without gradient are perturbed and moved too.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        seed: int,
        *,
        grad_scale: float = 1.0,
        coordinates: Coordinates = "scaled",
        noise_shape: NoiseShape = "isotropic",
        noise_on_masked: bool = True,
    ) -> None:
        self.seed = seed
        self.grad_scale = grad_scale
        self.noise_on_masked = noise_on_masked
        eps = [_eps(weight) for weight in weights]
        if coordinates == "global":
            eps = [_global_eps(weights, eps)] * len(eps)
        grads = [weight.param.grad for weight in weights]
        norms = [
            _norm(weight, grad, e) for weight, grad, e in zip(weights, grads, eps, strict=True)
        ]
        device = weights[0].param.device
        scaled_norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        #: ||g_phi||, a float64 scalar tensor in loss units.
        self.norm = scaled_norm / grad_scale
        # Without a usable gradient, perturb by noise alone; the caller falls back.
        inverse_norm = scaled_norm.reciprocal().nan_to_num_(0.0, posinf=0.0)
        ratios: list[Tensor | None] = [None] * len(norms)
        if noise_shape == "tensor_rms":
            mean_square = scaled_norm.square() / sum(w.param.numel() for w in weights)
            ratios = [
                (n.to(device).square() / w.param.numel() / mean_square).sqrt().nan_to_num(0.0)
                for n, w in zip(norms, weights, strict=True)
            ]
        self._prepared = [
            _Prepared(weight, grad, e, e * e * inverse_norm.to(e), ratio)
            for weight, grad, e, ratio in zip(weights, grads, eps, ratios, strict=True)
        ]

    def sign(self, sample: int) -> float:
        """The fair coin s_i."""
        return 1.0 if mix_seed(self.seed, sample, 1) & 1 else -1.0

    def noise(self, sample: int) -> Iterator[Tensor]:
        """u_i of each weight in turn, the same tensors whenever it is called."""
        generators: dict[torch.device, Generator] = {}
        for prepared in self._prepared:
            param = prepared.weight.param
            if param.device not in generators:
                seed = mix_seed(self.seed, sample, 0) >> 1  # manual_seed takes 63 bits everywhere
                generators[param.device] = Generator(param.device).manual_seed(seed)
            u = torch.empty(param.shape, dtype=_working_dtype(param), device=param.device)
            prepared.weight.surrogate.perturbation.sample_(u, generators[param.device])
            if prepared.rms_ratio is not None:
                u.mul_(prepared.rms_ratio.to(u))
            if not self.noise_on_masked and prepared.grad is not None:
                u.mul_(_rotated(prepared.weight, prepared.grad) != 0)
            yield u

    @torch.no_grad()
    def add_offsets_(self, sample: int, guide: float, noise: float) -> None:
        """Move every weight by ``eps * (guide * ghat + noise * u_i)``."""
        draws = self.noise(sample) if noise else iter([None] * len(self._prepared))
        for prepared, u in zip(self._prepared, draws, strict=True):
            weight, eps, grad = prepared.weight, prepared.eps, prepared.grad
            # Straight into the weight where that is as exact as one rounding at the end.
            direct = weight.rotate is None and weight.param.dtype == eps.dtype
            target = weight.param if direct else torch.zeros_like(weight.param, dtype=eps.dtype)
            if u is not None:
                target.addcmul_(u, eps * noise)
            if guide and grad is not None:
                grad = _rotated(weight, grad.to(eps.dtype))
                target.addcmul_(grad, prepared.guide_factor, value=guide)
            if not direct:
                weight.param.copy_(_rotated(weight, target).add_(weight.param))

    def projections(self, samples: Sequence[int]) -> Tensor:
        """``u_i . g_phi`` of each sample in loss units, a float64 tensor."""
        totals = []
        for sample in samples:
            total = torch.zeros_like(self.norm)
            for prepared, u in zip(self._prepared, self.noise(sample), strict=True):
                if prepared.grad is not None:
                    grad = _rotated(prepared.weight, prepared.grad.to(u.dtype))
                    total += torch.sum(u.mul_(grad).mul_(prepared.eps)).to(total)
            totals.append(total / self.grad_scale)
        return torch.stack(totals)

    @torch.no_grad()
    def write_grads_(self, guide: float, noise: Sequence[tuple[int, float]]) -> None:
        """``grad <- guide * grad + sum_i noise_i * u_i / eps``, at the scale the gradients have.

        Args:
            guide: Factor of the first-order gradient.
            noise: Pairs (sample, factor).
        """
        draws = [(self.noise(sample), factor) for sample, factor in noise if factor]
        for prepared in self._prepared:
            param, eps = prepared.weight.param, prepared.eps
            total = None
            for draw, factor in draws:
                u = next(draw)
                total = u.mul_(factor) if total is None else total.add_(u, alpha=factor)
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            elif guide == 0:
                param.grad.zero_()  # not a product: 0 * inf would keep a broken gradient alive
            elif guide != 1:
                param.grad.mul_(guide)
            if total is None:
                continue
            # A group of weights whose step is zero has no coordinates to move in.
            inverse_eps = (self.grad_scale / eps).nan_to_num_(posinf=0.0)
            if prepared.weight.rotate is None and param.grad.dtype == eps.dtype:
                param.grad.addcmul_(total, inverse_eps)
            else:
                param.grad.add_(_rotated(prepared.weight, total.mul_(inverse_eps)))


def _working_dtype(param: Tensor) -> torch.dtype:
    # bfloat16 would swallow sqrt(q) * eps * u next to the weight.
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def _eps(weight: QuantizedWeight) -> Tensor:
    step = weight.step_size().detach().to(weight.param.device, _working_dtype(weight.param))
    return step * weight.surrogate.radius


def _global_eps(weights: Sequence[QuantizedWeight], eps: Sequence[Tensor]) -> Tensor:
    total = sum(
        e.expand(w.param.shape).mean(dtype=torch.float64).to(eps[0].device) * w.param.numel()
        for w, e in zip(weights, eps, strict=True)
    )
    return torch.as_tensor(total / sum(w.param.numel() for w in weights)).to(eps[0].dtype)


def _norm(weight: QuantizedWeight, grad: Tensor | None, eps: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros((), dtype=torch.float64, device=weight.param.device)
    if eps.dim() == 0:  # a rotation keeps the norm
        return (torch.linalg.vector_norm(grad, dtype=eps.dtype) * eps).double()
    return torch.linalg.vector_norm(_rotated(weight, grad.to(eps.dtype)) * eps).double()


def _rotated(weight: QuantizedWeight, tensor: Tensor) -> Tensor:
    return tensor if weight.rotate is None else weight.rotate(tensor)
