"""A baseline: n-SPSA in place, in the manner of MeZO (arXiv 2305.17333).

Weights move by +eps u, -2 eps u and +eps u, and every u is drawn again from the global generator,
reseeded each time, so that no memory beyond the weights is needed. It is a baseline for
`SpsaEstimator`, not for training: the three sums do not cancel exactly, so every call leaves
round-off in the weights, and the global generator stays reseeded.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fogzo import QuantizedWeight

Draw = Callable[[Tensor, QuantizedWeight], Tensor]


def normal(out: Tensor, weight: QuantizedWeight) -> Tensor:
    """The published noise, standard normal."""
    return out.normal_()


def own_law(out: Tensor, weight: QuantizedWeight) -> Tensor:
    """The noise that `SpsaEstimator` draws for this weight, from the global generator."""
    # By name, so that it draws 16 bits per number, by the same code as `SpsaEstimator`.
    generator = torch.default_generator if out.is_cpu else None
    return weight.surrogate.perturbation.sample_(out, generator)


@torch.no_grad()
def write_gradients_(
    weights: Sequence[QuantizedWeight],
    loss: Callable[[], Tensor],
    *,
    num_samples: int = 1,
    seed: int = 0,
    draw: Draw = normal,
) -> None:
    """Write the mean over samples of ``(L+ - L-) / 2 * u / eps`` into the weights' gradients.

    Args:
        weights: The weights, which move by ``eps = step_size * radius`` each.
        loss: The loss, evaluated 2n times.
        num_samples: n.
        seed: Seed of the first sample; each further one has the next number.
        draw: Fills a tensor with noise from the global generator.
    """
    radii = [weight.step_size() * weight.surrogate.radius for weight in weights]
    slopes = []
    for sample in range(seed, seed + num_samples):
        _move_(weights, radii, sample, 1.0, draw)
        above = loss().item()
        _move_(weights, radii, sample, -2.0, draw)
        below = loss().item()
        _move_(weights, radii, sample, 1.0, draw)
        slopes.append((above - below) / 2)
    for weight in weights:
        weight.param.grad = torch.zeros_like(weight.param)
    for sample, slope in enumerate(slopes, seed):
        for weight, radius, u in _noise(weights, radii, sample, draw):
            assert weight.param.grad is not None
            weight.param.grad.addcdiv_(u, radius, value=slope / num_samples)


def _move_(
    weights: Sequence[QuantizedWeight],
    radii: Sequence[Tensor],
    sample: int,
    times: float,
    draw: Draw,
) -> None:
    for weight, radius, u in _noise(weights, radii, sample, draw):
        weight.param.addcmul_(u, radius, value=times)


def _noise(
    weights: Sequence[QuantizedWeight], radii: Sequence[Tensor], sample: int, draw: Draw
) -> Iterator[tuple[QuantizedWeight, Tensor, Tensor]]:
    """Every weight with its radius and its noise of one sample, the same each time."""
    torch.manual_seed(sample)  # noqa: TID251 -- to reseed the global generator is the baseline's way
    for weight, radius in zip(weights, radii, strict=True):
        yield weight, radius, draw(torch.empty_like(weight.param, requires_grad=False), weight)
