"""Perturbation directions of one step, drawn from seeds.

Everything happens in scale-normalised coordinates ``phi = theta / eps`` with
``eps = step_size * radius``, where every weight is one smoothing radius long. There a direction
is ``v = guide * ghat + noise * u``: ``ghat`` is the first-order gradient ``g_phi = eps * g``
divided by one global norm N, and u is independent noise drawn by each weight's smoothing law.

Of a weight that FSDP has sharded, each rank perturbs its own rows. It draws the noise of the
whole weight all the same, one weight at a time, so that all ranks agree on one direction, the
one that a single process would take.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fogzo.collectives import full, is_sharded, local, shard_like, sum_over_shards
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.buffers import Buffers
from fogzo.probing.noise import Draw, Noise, working_dtype
from fogzo.quantizers.steps import MIN_STEP

Coordinates = Literal["scaled", "global"]
NoiseShape = Literal["isotropic", "tensor_rms"]

# A step size of zero is stored as the smallest that a quantizer divides by.
_NO_STEP = 2 * MIN_STEP
# Nor is one far below the others of its weight a radius to measure in: it belongs to a dead group.
_SMALLEST_SHARE = 2**-8
_SAMPLE = 2**12  # weights; more of them would cost a small network time and memory
_NEAR = (0.1, 0.01)  # of the distance of levels


class Probe(NamedTuple):
    """A direction ``v = guide * ghat + noise * u_sample`` to measure the loss along."""

    sample: int
    guide: float
    noise: float


Factor = float | Tensor
"""A number where reading it is free (one step size, on a CPU), else a tensor that broadcasts."""


class _Prepared(NamedTuple):
    """What this rank's part of a weight needs in this step: computed once for every sample."""

    weight: QuantizedWeight
    dtype: torch.dtype  # to compute in
    grad: Tensor | None  # as backward left it, this rank's part
    eps: Factor  # 0 for what must stay where it is
    guide_factor: Factor  # eps^2 / N: eps * ghat = guide_factor * g
    noise_factor: Factor  # of u in the weight's offset: eps * shape
    grad_noise_factor: Factor  # of u in its gradient: shape / eps, or 0 where eps is


class Moments(NamedTuple):
    """What the standard error of an agreement needs to know of one weight."""

    squares: float  # ||ghat_t||^2
    cubes: float  # sum_j |ghat_j|^3
    noise: float  # root mean square of the noise's shape
    flip_size: float  # a level's distance in units of 2 eps


class Directions:
    """The directions ``v_i`` of one step, over all weights.

    Weights with nothing to measure stay where they are and keep their gradient: groups whose step
    size is zero for practical purposes, entries that their record holds (`QuantizedWeight.held`)
    and, where a guide is followed, tensors whose gradient is zero.

    Args:
        weights: The weights to perturb.
        seed: Seeds of the noise follow from it and the sample's index.
        grad_scale: What the gradients are multiplied by at present.
        coordinates: ``"scaled"`` gives each weight its own eps, so that one agreement holds for
            all tensors; ``"global"`` uses their mean everywhere, the literal formula.
        noise_shape: ``"isotropic"`` is the paper's law, equal in every coordinate of
            ``theta / eps``, so its share of the gradient is ``u / eps``. ``"tensor_rms"`` gives
            that share the root mean square of each tensor's own gradient, whatever the step sizes.
        guided: Whether there is a first-order gradient to follow.
        buffers: Where noise is kept between its uses; see `Noise`.
    """

    def __init__(
        self,
        weights: Sequence[QuantizedWeight],
        seed: int,
        *,
        grad_scale: float = 1.0,
        coordinates: Coordinates = "scaled",
        noise_shape: NoiseShape = "isotropic",
        guided: bool = True,
        buffers: Buffers | None = None,
    ) -> None:
        self.weights = weights
        self._noise = Noise(weights, seed, buffers)
        self.grad_scale = grad_scale
        self.guided = guided
        params = [weight.param for weight in weights]
        if coordinates == "global":
            eps = [_global_eps(weights)] * len(weights)
        else:
            eps = [_local_eps(weight) for weight in weights]
        grads = [None if param.grad is None else local(param.grad) for param in params]
        if not guided:
            grads = [None] * len(grads)
        pairs = [_norms(*parts) for parts in zip(weights, grads, eps, strict=True)]
        if any(map(is_sharded, params)):
            flat = [norm * norm for pair in pairs for norm in pair]
            squares = sum_over_shards(flat, [param for param in params for _ in range(2)])
            roots = [square**0.5 for square in squares]
            pairs = list(zip(roots[::2], roots[1::2], strict=True))
        self._norms = [scaled for scaled, _ in pairs]
        scaled_norm = _global_norm(self._norms)
        #: ||g_phi|| in loss units, in float64.
        self.norm: Factor = scaled_norm / grad_scale
        self._inverse_norm = _inverse(scaled_norm)
        total = sum(param.numel() for param in params)
        self._prepared = []
        for weight, grad, e, (scaled, plain) in zip(weights, grads, eps, pairs, strict=True):
            if noise_shape == "tensor_rms":
                rms = plain * self._inverse_norm * math.sqrt(total / weight.param.numel())
                noise, grad_noise = e * e * rms, _moves(e) * rms
            else:
                moves = scaled > 0 if guided else True
                noise, grad_noise = e * moves, _inverse(e) * moves
            self._prepared.append(
                _Prepared(
                    weight,
                    working_dtype(weight.param),
                    grad,
                    e,
                    e * e * self._inverse_norm,
                    noise,
                    grad_noise,
                )
            )

    def has_gradient(self) -> bool:
        """Whether any gradient is not zero, of weights that stay where they are too."""
        return any(p.grad is not None and bool(p.grad.any()) for p in self._prepared)

    def sign(self, sample: int) -> float:
        """The fair coin s_i."""
        return self._noise.sign(sample)

    def noise(self, sample: int) -> Iterator[Tensor]:
        """u_i of (this rank's part of) each weight in turn, the same whenever it is called.

        ``noise_shape`` is not in it yet.
        """
        for index, prepared in enumerate(self._prepared):
            values, unit = self._draw(sample, index)
            yield values.to(prepared.dtype) * unit

    def _draw(self, sample: int, index: int) -> Draw:
        """u_i of one weight, before `_Prepared.noise_factor`."""
        return self._noise.of(sample, index)

    def add_offsets_(self, probe: Probe) -> None:
        """Move every weight by ``eps * v``."""
        for index, prepared in enumerate(self._prepared):
            self.move_(index, local(prepared.weight.param), probe)

    def stacks(self, probes: Sequence[Probe]) -> list[Tensor]:
        """Copies of every weight, moved along one probe each: (probes, *shape) of each weight.

        To rounding what `add_offsets_` makes of the weights, which are left alone.
        """
        return [self._stack(index, probes) for index in range(len(self._prepared))]

    def _stack(self, index: int, probes: Sequence[Probe]) -> Tensor:
        prepared = self._prepared[index]
        param, dtype = prepared.weight.param.detach(), prepared.dtype
        stack = param.expand(len(probes), *param.shape)
        stack = stack.clone(memory_format=torch.contiguous_format)
        if prepared.weight.rotate is not None or param.dtype != dtype:
            for row, probe in zip(stack.unbind(), probes, strict=True):
                self.move_(index, row, probe)
            return stack
        each = (-1, *[1] * param.dim())
        if any(probe.noise for probe in probes):
            draws = [self._draw(probe.sample, index) for probe in probes]
            scales = [p.noise * draw.unit for p, draw in zip(probes, draws, strict=True)]
            factor = param.new_tensor(scales).view(each) * prepared.noise_factor
            stack.addcmul_(torch.stack([draw.values for draw in draws]), factor)
        if prepared.grad is not None and any(probe.guide for probe in probes):
            factor = param.new_tensor([probe.guide for probe in probes]).view(each)
            stack.addcmul_(prepared.grad.to(dtype), factor * prepared.guide_factor)
        return stack

    def move_(self, index: int, param: Tensor, probe: Probe) -> None:
        """Move one weight, or a copy of it, by ``eps * v``.

        Args:
            index: Which of the weights.
            param: This rank's part of it.
            probe: The direction.
        """
        prepared = self._prepared[index]
        weight, grad = prepared.weight, prepared.grad
        # Straight into the weight where that is as exact as one rounding at the end.
        direct = weight.rotate is None and param.dtype == prepared.dtype
        target = param
        if not direct:
            target = torch.zeros_like(param, dtype=prepared.dtype, requires_grad=False)
        if probe.noise:
            values, unit = self._draw(probe.sample, index)
            _add_product_(target, values, prepared.noise_factor, probe.noise * unit)
        if probe.guide and grad is not None:
            grad = _rotated(weight, grad.to(prepared.dtype))
            _add_product_(target, grad, prepared.guide_factor, probe.guide)
        if not direct:
            param.copy_(_rotated(weight, target).add_(param))

    def projections(self, samples: Sequence[int]) -> list[float]:
        """``u_i . g_phi`` of each sample, in loss units."""
        products: list[Factor] = []
        for sample in samples:
            for prepared, u in zip(self._prepared, self.noise(sample), strict=True):
                if prepared.grad is None:
                    products.append(0.0)
                    continue
                grad = _rotated(prepared.weight, prepared.grad.to(u.dtype))
                products.append(
                    torch.sum((u * grad).mul_(prepared.noise_factor), dtype=torch.float64)
                )
        params = [prepared.weight.param for prepared in self._prepared]
        products = sum_over_shards(products, params * len(samples))
        return [
            float(sum(products[start : start + len(params)])) / self.grad_scale
            for start in range(0, len(products), len(params))
        ]

    def write_grads_(self, guide: float, noise: Sequence[tuple[int, float]]) -> None:
        """``grad <- guide * grad + sum_i noise_i * u_i / eps``, at the scale the gradients have.

        Args:
            guide: Factor of the first-order gradient.
            noise: Pairs (sample, factor).
        """
        noise = [(sample, factor) for sample, factor in noise if factor]
        for index, prepared in enumerate(self._prepared):
            param = prepared.weight.param
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            grad = local(param.grad)
            if not self.guided:
                grad.zero_()  # not a product: 0 * inf would keep a broken gradient alive
            elif guide != 1:
                grad.mul_(_guide_where_measured(prepared, guide))
            if not noise:
                continue
            total, scale = self._weighted_sum(index, noise)
            scale *= self.grad_scale
            if prepared.weight.rotate is None:
                _add_product_(grad, total, prepared.grad_noise_factor, scale)
            else:
                total = total.to(prepared.dtype) * prepared.grad_noise_factor
                grad.add_(prepared.weight.rotate(total), alpha=scale)

    def moments(self) -> list[Moments]:
        """What is known of each weight's part in a direction, in one wait for the device."""
        numbers: list[Factor] = []
        for prepared, norm in zip(self._prepared, self._norms, strict=True):
            numbers += [
                (norm * self._inverse_norm) ** 2,
                _sum_of_cubes(prepared, norm) * self._inverse_norm**3,
                _rms(_ratio(prepared.noise_factor, prepared.eps)),
            ]
        if any(map(is_sharded, (prepared.weight.param for prepared in self._prepared))):
            params = [prepared.weight.param for prepared in self._prepared]
            numbers[1::3] = sum_over_shards(numbers[1::3], params)
        values = _as_floats(numbers)
        flip_sizes = [
            (w.grid.spacing if w.grid else 1.0) / (2 * w.surrogate.radius) for w in self.weights
        ]
        triples = zip(values[::3], values[1::3], values[2::3], flip_sizes, strict=True)
        return [Moments(*each) for each in triples]

    def unevenness(self) -> float:
        """How far the density of weights at thresholds is from that of an even spread, which is 1.

        A gradient predicts a slope as if they were spread evenly. Weights that crowd on levels (a
        dequantized checkpoint) hardly round differently however right it is, those that cross
        thresholds together or oscillate about them more often. It is weighted by the gradient's
        squares and estimated from a sample of rows.
        """
        numbers: list[Factor] = []
        params = []
        for prepared in self._prepared:
            if prepared.weight.grid is not None and prepared.grad is not None:
                numbers += _near_thresholds(prepared)
                params += [prepared.weight.param] * (1 + len(_NEAR))
        if any(map(is_sharded, params)):
            numbers = sum_over_shards(numbers, params)
        values = _as_floats(numbers)
        inside, *near = (math.fsum(values[i :: 1 + len(_NEAR)]) for i in range(1 + len(_NEAR)))
        if not inside > 0:
            return 0.0
        densities = [part / (2 * width * inside) for part, width in zip(near, _NEAR, strict=True)]
        return max(abs(1 - density) for density in densities)

    def _weighted_sum(self, index: int, noise: Sequence[tuple[int, float]]) -> tuple[Tensor, float]:
        """The sum of one weight's draws by their factors, as (sum, factor still to be applied)."""
        if len(noise) == 1:
            ((sample, factor),) = noise
            values, unit = self._draw(sample, index)
            return values, factor * unit
        prepared = self._prepared[index]
        shard = local(prepared.weight.param)
        total = torch.zeros(shard.shape, dtype=prepared.dtype, device=shard.device)
        for sample, factor in noise:
            values, unit = self._draw(sample, index)
            total.add_(values, alpha=factor * unit)
        return total, 1.0


def _add_product_(target: Tensor, tensor: Tensor, factor: Factor, scale: float) -> None:
    """``target += scale * factor * tensor`` in one pass."""
    if target.dtype.itemsize < 4 and not tensor.is_floating_point():
        tensor = tensor.float()  # bfloat16 would cut off the lower half of a code
    if isinstance(factor, float):
        target.add_(tensor, alpha=factor * scale)
    elif target.dtype == tensor.dtype or not tensor.is_floating_point():
        target.addcmul_(tensor, factor, value=scale)
    else:
        target.add_(tensor * factor, alpha=scale)


def _inverse(factor: Factor) -> Factor:
    """1 / factor, or 0 where that is not finite."""
    if isinstance(factor, float):
        return 1 / factor if factor > 0 and math.isfinite(factor) else 0.0
    return factor.reciprocal().nan_to_num_(0.0, posinf=0.0)


def _eps(weight: QuantizedWeight) -> Factor:
    """The perturbation radius, 0 where a step size is zero for practical purposes."""
    step, radius = full(weight.step_size()), weight.surrogate.radius
    if step.numel() == 1 and step.is_cpu and weight.param.is_cpu:
        size = float(step.item())
        return 0.0 if size <= _NO_STEP else size * radius
    step = step.detach().to(weight.param.device, working_dtype(weight.param))
    smallest = (step.amax() * _SMALLEST_SHARE).clamp(min=_NO_STEP)
    return torch.where(step <= smallest, 0, step) * radius


def _local_eps(weight: QuantizedWeight) -> Factor:
    eps = _eps(weight)
    if not isinstance(eps, float) and eps.numel() > 1:
        eps = shard_like(eps, weight.param)
    if weight.held is None:
        return eps
    held = weight.held.to(weight.param.device)
    return eps * shard_like((~held).to(working_dtype(weight.param)), weight.param)


def _global_eps(weights: Sequence[QuantizedWeight]) -> Factor:
    """The mean over all weights."""
    total: Factor = 0.0
    for weight in weights:
        e = _eps(weight)
        mean = e if isinstance(e, float) else e.expand(weight.param.shape).mean(dtype=torch.float64)
        total = total + mean * weight.param.numel()
    mean = total / sum(weight.param.numel() for weight in weights)
    return mean if isinstance(mean, float) else mean.to(working_dtype(weights[0].param))


def _norms(weight: QuantizedWeight, grad: Tensor | None, eps: Factor) -> tuple[Factor, Factor]:
    """The norms of one tensor's ``eps * grad``, in float64, and of its grad where eps is not 0."""
    if grad is None:
        return 0.0, 0.0
    dtype = working_dtype(grad)
    if isinstance(eps, float):  # a rotation keeps the norm
        norm = float(torch.linalg.vector_norm(grad, dtype=dtype)) if eps else 0.0
        return norm * eps, norm
    grad = _rotated(weight, grad.to(dtype))
    # One pass where all that shares a step is reduced first, as in a channel.
    shared = [-dim for dim in range(1, grad.dim() + 1) if dim > eps.dim() or eps.shape[-dim] == 1]
    if shared:
        grad = torch.linalg.vector_norm(grad, dim=shared, keepdim=True)
    both = torch.stack([torch.linalg.vector_norm(grad * factor) for factor in (eps, _moves(eps))])
    scaled, plain = both.double()
    return scaled, plain


def _guide_where_measured(prepared: _Prepared, guide: float) -> Factor:
    """The guide's factor, but 1 for what takes no part in the measurement."""
    eps = prepared.eps
    if isinstance(eps, float):
        return guide if eps else 1.0
    # Within a rotated row the parts of a gradient cannot be told apart.
    if prepared.weight.rotate is not None and eps.numel() > max(eps.shape, default=1):
        return guide
    return _moves(eps) * (guide - 1) + 1


def _sum_of_cubes(prepared: _Prepared, norm: Factor) -> Factor:
    """The sum of ``|eps * grad|^3``, from a sample of a large tensor's rows."""
    weight, grad, eps = prepared.weight, prepared.grad, prepared.eps
    if grad is None or not grad.numel():
        return 0.0
    if weight.rotate is not None:  # a rotation makes Gaussians
        return norm**3 * math.sqrt(8 / math.pi / weight.param.numel())
    stride = math.ceil(grad.numel() / _SAMPLE)
    rows = grad[::stride] if stride > 1 else grad
    if not isinstance(eps, float):
        rows = rows * eps.expand(grad.shape)[::stride]
    cubes: Factor = rows.abs().pow_(3).sum(dtype=torch.float64)
    ratio = grad.numel() / rows.numel()
    if isinstance(eps, float):
        ratio *= eps**3
        cubes = float(cubes)  # on a CPU
    return cubes * ratio


def _near_thresholds(prepared: _Prepared) -> list[Factor]:
    """Squares of a sample's scaled gradients: of all weights inside, and of those near thresholds.

    One number for each distance of `_NEAR`.
    """
    weight, grad, eps, grid = prepared.weight, prepared.grad, prepared.eps, prepared.weight.grid
    assert grad is not None and grid is not None
    # Rows of a rotated weight are rotated one by one, if they are its outputs.
    stride = 1 if weight.rotate is not None else max(1, grad.numel() // _SAMPLE)
    grad, param = grad[::stride].to(prepared.dtype), local(weight.param)[::stride]
    if not isinstance(eps, float):
        eps = eps.expand(prepared.weight.param.shape)[::stride]
    param, grad = _rotated(weight, param.to(prepared.dtype)), _rotated(weight, grad)
    cells = param * (_inverse(eps) * (weight.surrogate.radius / grid.spacing))
    cells = cells - grid.thresholds[0] / grid.spacing
    distance = (cells - cells.round().clamp(0, len(grid.thresholds) - 1)).abs()
    squares = (grad * eps).square()
    return [(squares * (distance <= d)).sum(dtype=torch.float64) for d in (0.5, *_NEAR)]


def _ratio(a: Factor, b: Factor) -> Factor:
    return a * _inverse(b)


def _moves(eps: Factor) -> Factor:
    """1 where eps is not 0."""
    return float(eps > 0) if isinstance(eps, float) else (eps > 0).to(eps.dtype)


def _rms(factor: Factor) -> Factor:
    return factor if isinstance(factor, float) else factor.square().mean(dtype=torch.float64).sqrt()


def _as_floats(numbers: Sequence[Factor]) -> list[float]:
    tensors = [number for number in numbers if not isinstance(number, float)]
    read = iter(torch.stack([tensor.double() for tensor in tensors]).tolist() if tensors else [])
    return [number if isinstance(number, float) else next(read) for number in numbers]


def _global_norm(norms: Sequence[Factor]) -> Factor:
    numbers = [norm for norm in norms if isinstance(norm, float)]
    total = math.hypot(*numbers)
    tensors = [norm for norm in norms if not isinstance(norm, float)]
    if not tensors:
        return total
    device = tensors[0].device
    return torch.linalg.vector_norm(
        torch.stack([*(norm.to(device) for norm in tensors), tensors[0].new_tensor(total)])
    )


def _rotated(weight: QuantizedWeight, tensor: Tensor) -> Tensor:
    return tensor if weight.rotate is None else weight.rotate(tensor)
