"""The directions of one step, drawn from seeds.

Measuring takes place in scale-normalised coordinates ``phi = theta / eps`` with
``eps = step_size * radius``, where every weight is one smoothing radius long. A direction there is
``v = guide * ghat + noise * u``: ``ghat`` is the first-order gradient ``g_phi = eps * g`` over its
norm N across all weights, and u is noise drawn by each weight's smoothing law.

What is computed is ``d = v / eps``, which has the gradient's units: the weights move by
``eps^2 * d``, and the refined gradient is ``slope * d``.

If FSDP has sharded a weight, each rank moves its own rows. It draws the noise of the whole
weight, one weight at a time, so that all ranks take the direction that a single process would.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fogzo.collectives import (
    full,
    local,
    shard_like,
    sum_over_parts_of_rows,
    sum_over_shards,
)
from fogzo.layers.weights import QuantizedWeight
from fogzo.quantizers.step_sizes import MIN_STEP_SIZE

NoiseShape = Literal["isotropic", "tensor_rms"]

# A step size of zero is stored as the smallest that a quantizer divides by.
_NO_STEP_SIZE = 2 * MIN_STEP_SIZE
# A step far below the others of its weight belongs to a dead group and is no radius to measure in.
_SMALLEST_SHARE = 2**-8
# Numbers of noise that are kept until the gradients are written; of large weights none is, as it
# would be as large as they are. Drawing it twice costs a small network 5% of a step.
_MOST_KEPT = 2**21
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


class Direction(NamedTuple):
    """``v = guide * ghat + noise * u_sample``."""

    sample: int
    guide: float
    noise: float


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """This rank's part of one weight.

    Attributes:
        weight: Its record.
        param: The shard, in the weight's own memory.
        grad: The shard of the first-order gradient, None without one.
        eps: Radius of the perturbation, 0 for what must stay; broadcastable to the shard.
        moves: 1 where eps is not 0, else 0.
        dtype: In which directions are computed.
    """

    weight: QuantizedWeight
    param: Tensor
    grad: Tensor | None
    eps: Tensor
    moves: Tensor
    dtype: torch.dtype

    def rotated(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape in the basis of rounding, or back, in `dtype`."""
        tensor = tensor.to(self.dtype)
        return tensor if self.weight.rotate is None else self.weight.rotate(tensor)

    def add_(self, target: Tensor, terms: Iterable[tuple[Tensor, Tensor, float]]) -> None:
        """``target += sum value * factor * tensor`` over terms (tensor, factor, value).

        Args:
            target: Of the shard's shape, in the weight's own basis.
            terms: Tensors in the basis of rounding.
        """
        # Straight into the target where that is as exact as one rounding at the end.
        direct = self.weight.rotate is None and target.dtype == self.dtype
        total = target
        if not direct:
            total = torch.zeros(target.shape, dtype=self.dtype, device=target.device)
        for tensor, factor, value in terms:
            total.addcmul_(tensor, factor, value=value)
        if not direct:
            target.add_(self.rotated(total))


class Directions:
    """The directions ``v_i`` of one step, over all weights.

    Weights with nothing to measure stay where they are and keep their gradient: groups whose step
    size is zero for practical purposes, entries that their record holds (`QuantizedWeight.held`)
    and, where a guide is followed, tensors whose gradient is zero.

    Args:
        weights: The weights to perturb.
        seed: Seeds of the noise follow from it and the sample's index.
        grad_scale: What the gradients are multiplied by at present.
        noise_shape: ``"isotropic"`` is the paper's law, equal in every coordinate of
            ``theta / eps``, so its share of the gradient is ``u / eps``. ``"tensor_rms"`` gives
            that share the root mean square of each tensor's own gradient, whatever the step sizes.
        guided: Whether there is a first-order gradient to follow.
        lean: Draw noise again for each use. Otherwise that of small networks is kept meanwhile.

    Attributes:
        parts: One per weight.
        norms: ``||eps * g||`` of each weight, at the scale that the gradients have.
        norm: N, in the loss's units.
        sizes: Of u in ``d``, per weight: noise of one slope in the gradient is ``size * u``.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        seed: int,
        *,
        grad_scale: float = 1.0,
        noise_shape: NoiseShape = "isotropic",
        guided: bool = True,
        lean: bool = False,
    ) -> None:
        self.weights = weights
        self.grad_scale = grad_scale
        self.guided = guided
        self._seed = seed
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self._room = 0 if lean else _MOST_KEPT
        self.parts = [_part(weight, guided) for weight in weights]
        pairs = _norms(self.parts)
        self.norms = [scaled for scaled, _ in pairs]
        scaled_norm = math.hypot(*self.norms)
        self._inverse_norm = 1 / scaled_norm if 0 < scaled_norm < math.inf else 0.0
        self.norm = scaled_norm / grad_scale
        total = sum(weight.param.numel() for weight in weights)
        self.sizes: list[Tensor] = []
        for part, (scaled, plain) in zip(self.parts, pairs, strict=True):
            if part.weight.of_experts and part.grad is not None:
                self.sizes.append(self._size_of_experts(part, noise_shape))
            elif noise_shape == "tensor_rms":
                rms = plain * self._inverse_norm * math.sqrt(total / part.weight.param.numel())
                self.sizes.append(part.moves * rms)
            else:
                moves = scaled > 0 or not guided
                self.sizes.append(part.eps.reciprocal().nan_to_num_(posinf=0.0) * moves)
        self._eps_squared = [part.eps.square() for part in self.parts]
        self._noise_factors = list(map(torch.mul, self._eps_squared, self.sizes))

    def _size_of_experts(self, part: Part, noise_shape: NoiseShape) -> Tensor:
        """The size of noise for each expert: 0 where its gradient is zero, as it was not used."""
        dims = tuple(range(1, part.param.dim()))
        assert part.grad is not None
        moved = part.rotated(part.grad) * part.moves
        squares = torch.linalg.vector_norm(moved, dim=dims, keepdim=True).square()
        norms = sum_over_parts_of_rows(squares, part.weight.param).sqrt()
        if noise_shape == "isotropic":
            return part.eps.reciprocal().nan_to_num_(posinf=0.0) * ((norms > 0) | (not self.guided))
        total = sum(weight.param.numel() for weight in self.weights)
        rms = norms * self._inverse_norm * math.sqrt(total / part.weight.param.shape[1:].numel())
        return part.moves * rms

    def has_gradient(self) -> bool:
        """Whether any gradient is not zero, of weights that stay where they are too."""
        return any(part.grad is not None and bool(part.grad.any()) for part in self.parts)

    def sign(self, sample: int) -> float:
        """The fair coin s_i."""
        return 1.0 if mix_seed(self._seed, sample) & 1 else -1.0

    def noise(self, sample: int, index: int) -> Tensor:
        """u_i of (this rank's part of) one weight, always the same. Leave it as it is."""
        if (sample, index) in self._drawn:
            return self._drawn[sample, index]
        part = self.parts[index]
        param, law = part.weight.param, part.weight.surrogate.perturbation
        seed = mix_seed(mix_seed(self._seed, sample) >> 1, index)  # without the coin's bit
        generator = Generator(param.device).manual_seed(seed)
        u = torch.empty(param.shape, dtype=part.dtype, device=param.device)
        u = shard_like(law.sample_(u, generator), param)
        if u.numel() <= self._room:
            self._room -= u.numel()
            self._drawn[sample, index] = u
        return u

    def move_(self, param: Tensor, index: int, direction: Direction) -> None:
        """Move one weight, or a copy of it, by ``eps * v``.

        Args:
            param: This rank's part of it.
            index: Which of the weights.
            direction: Which way.
        """
        part, terms = self.parts[index], []
        if direction.noise:
            u = self.noise(direction.sample, index)
            terms.append((u, self._noise_factors[index], direction.noise))
        if direction.guide and part.grad is not None:
            factor = direction.guide * self._inverse_norm
            terms.append((part.rotated(part.grad), self._eps_squared[index], factor))
        part.add_(param, terms)

    def projections(self, samples: Sequence[int]) -> list[float]:
        """``u_i . g_phi`` of each sample, in loss units."""
        products: list[float | Tensor] = []
        for sample in samples:
            for index, part in enumerate(self.parts):
                if part.grad is None:
                    products.append(0.0)
                    continue
                g_phi = part.rotated(part.grad) * self._noise_factors[index]
                products.append(torch.sum(self.noise(sample, index) * g_phi, dtype=torch.float64))
        params = [part.weight.param for part in self.parts]
        values = sum_over_shards(products, params * len(samples))
        starts = range(0, len(values), len(params))
        return [math.fsum(values[i : i + len(params)]) / self.grad_scale for i in starts]

    def write_grads_(self, guide: float, noise: Sequence[tuple[int, float]]) -> None:
        """``grad <- guide * grad + sum_i noise_i * u_i / eps``, at the scale the gradients have.

        Args:
            guide: Factor of the first-order gradient.
            noise: Pairs (sample, factor).
        """
        noise = [(sample, factor * self.grad_scale) for sample, factor in noise if factor]
        for index, (part, size) in enumerate(zip(self.parts, self.sizes, strict=True)):
            param = part.weight.param
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            grad = local(param.grad)
            if not self.guided:
                grad.zero_()  # not a product: 0 * inf would keep a broken gradient alive
            elif guide != 1:
                grad.mul_(_guide_where_measured(part, guide))
            part.add_(grad, ((self.noise(i, index), size, factor) for i, factor in noise))


def mix_seed(*parts: int) -> int:
    """One well-mixed 64-bit seed from several integers (splitmix64's finaliser)."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def _part(weight: QuantizedWeight, guided: bool) -> Part:
    param = weight.param
    # bfloat16 would swallow sqrt(q) * eps * u next to the weight.
    dtype = torch.float32 if param.dtype.itemsize < 4 else param.dtype
    grad = local(param.grad) if guided and param.grad is not None else None
    step = full(weight.step_size()).detach().to(param.device, dtype)
    if step.numel() > 1:
        smallest = (step.amax() * _SMALLEST_SHARE).clamp(min=_NO_STEP_SIZE)
        step = step * (step > smallest)
    else:
        step = torch.threshold(step, _NO_STEP_SIZE, 0.0)
    eps = step * weight.surrogate.radius
    if weight.held is not None:
        eps = eps * ~weight.held.to(param.device)
    eps = shard_like(eps, param)
    return Part(weight, local(param), grad, eps, eps.sign(), dtype)


def _norms(parts: Sequence[Part]) -> list[tuple[float, float]]:
    """``||eps * g||`` of each weight, and ``||g||`` of what moves of it."""
    numbers: list[float | Tensor] = []
    for part in parts:
        if part.grad is None:
            numbers += [0.0, 0.0]
            continue
        # All that shares a step is reduced first: one pass over a channel or a tensor.
        dims = range(-part.grad.dim(), 0)
        shared = [d for d in dims if -d > part.eps.dim() or part.eps.shape[d] == 1]
        norms = part.rotated(part.grad)
        if shared:
            norms = torch.linalg.vector_norm(norms, dim=shared, keepdim=True)
        for factor in (part.eps, part.moves):
            numbers.append(torch.linalg.vector_norm(norms * factor))
    params = [part.weight.param for part in parts for _ in range(2)]
    values = sum_over_shards(numbers, params, norms=True)
    return list(zip(values[::2], values[1::2], strict=True))


def _guide_where_measured(part: Part, guide: float) -> Tensor:
    """The guide's factor, but 1 for what takes no part in the measurement."""
    moves = part.moves > 0
    if part.weight.rotate is not None and part.eps.numel() > max(part.eps.shape, default=1):
        moves = moves.any()  # rotation mixes the groups of a row
    return torch.where(moves, part.eps.new_full((), guide), 1.0)
