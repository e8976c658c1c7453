"""Smoothing laws: the noise z whose expectation turns a staircase into a smooth surrogate.

A grid Q with thresholds t_k and jumps J satisfies ``d/dx E Q(x + z) = J sum_k p(t_k - x)``. So a
law p *is* a backward rule, and its standard deviation is the perturbation radius (the paper's
epsilon-bar) that FOGZO needs to estimate that same slope from losses. One object holds both.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor

from fogzo.quantizers.checks import is_number, require_positive, require_type


class SmoothingLaw(ABC):
    """A symmetric, zero-mean law p(z), z in units of the step size."""

    @property
    @abstractmethod
    def radius(self) -> float:
        """Standard deviation of z: the paper's epsilon-bar, in step sizes."""

    @property
    @abstractmethod
    def kurtosis(self) -> float:
        """``E u^4`` of the standardised ``u = z / radius`` (Gaussian: 3)."""

    @abstractmethod
    def pdf(self, z: Tensor) -> Tensor:
        """Density at z."""

    def cdf(self, z: Tensor) -> Tensor:
        """P(Z <= z), for laws by whose noise levels are drawn (`surrogates.adjacent`).

        Raises:
            ValueError: If this law has none here.
        """
        raise ValueError(
            f"{self} has no distribution function here, which the slope of a drawn level needs: "
            "adjacent(Logistic(3.0)), or write a cdf for it"
        )

    @abstractmethod
    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        """Fill ``out`` with independent u of zero mean and unit variance, and return it.

        Without a generator they come from torch's global stream, by operations that `torch.vmap`
        and `torch.compile` know.
        """


@dataclass(frozen=True)
class Uniform(SmoothingLaw):
    """U(-width/2, width/2). Width 1 makes round the identity, width 2 makes sign hardtanh."""

    width: float = 1.0

    def __post_init__(self) -> None:
        require_positive("the width of uniform noise", self.width, "identity(spacing=1.0)")

    @property
    def radius(self) -> float:
        return self.width / math.sqrt(12)

    @property
    def kurtosis(self) -> float:
        return 9 / 5

    def pdf(self, z: Tensor) -> Tensor:
        return (z.abs() <= self.width / 2).to(z.dtype) / self.width

    def cdf(self, z: Tensor) -> Tensor:
        return (z / self.width + 0.5).clamp(0, 1)

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        return _fill_uniform_(out, math.sqrt(3), generator)


@dataclass(frozen=True)
class Triangular(SmoothingLaw):
    """The triangle on (-half_width, half_width).

    Half-width 1 makes sign the second-order polynomial ApproxSign, and is also the smallest law
    (TPDF dither) under which both E round(x+z) = x and the two-point estimator's own slope is 1.
    """

    half_width: float = 1.0

    def __post_init__(self) -> None:
        require_positive("half_width", self.half_width, "Triangular(half_width=1.0)")

    @property
    def radius(self) -> float:
        return self.half_width / math.sqrt(6)

    @property
    def kurtosis(self) -> float:
        return 12 / 5

    def pdf(self, z: Tensor) -> Tensor:
        return (1 - (z / self.half_width).abs()).clamp(min=0) / self.half_width

    def cdf(self, z: Tensor) -> Tensor:
        y = (z / self.half_width).clamp(-1, 1)
        return 0.5 + y - 0.5 * y * y.abs()

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        _fill_uniform_(out, 1.0, generator)
        # By the inverse of P(Z <= z) on each side of zero: one draw per element instead of two.
        magnitude = out.abs().neg_().add_(1).sqrt_().neg_().add_(1)
        return out.sign_().mul_(magnitude).mul_(math.sqrt(6))


@dataclass(frozen=True)
class Logistic(SmoothingLaw):
    """``p(z) = tau/2 sech^2(tau z)``: sign becomes tanh(tau x)."""

    tau: float = 1.0

    def __post_init__(self) -> None:
        require_positive("tau", self.tau, "tanh(tau=1.0)")

    @property
    def radius(self) -> float:
        return math.pi / (math.sqrt(12) * self.tau)

    @property
    def kurtosis(self) -> float:
        return 21 / 5

    def pdf(self, z: Tensor) -> Tensor:
        return self.tau / 2 * (1 - torch.tanh(self.tau * z).square())

    def cdf(self, z: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.tau * z)

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        # atanh(±1) is infinite, and uniform_ may return its lower bound.
        edge = 1 - 1e-7
        torch.nn.functional.hardtanh_(_fill_uniform_(out, 1.0, generator), -edge, edge)
        return out.atanh_().mul_(math.sqrt(12) / math.pi)


@dataclass(frozen=True)
class Normal(SmoothingLaw):
    """N(0, sigma^2): sign becomes erf(x / (sqrt(2) sigma)). Its own Stein kernel."""

    sigma: float = 0.5

    def __post_init__(self) -> None:
        require_positive("sigma", self.sigma, "erf(sigma=0.5)")

    @property
    def radius(self) -> float:
        return self.sigma

    @property
    def kurtosis(self) -> float:
        return 3.0

    def pdf(self, z: Tensor) -> Tensor:
        y = z / self.sigma
        return torch.exp(-0.5 * y * y) / (self.sigma * math.sqrt(2 * math.pi))

    def cdf(self, z: Tensor) -> Tensor:
        return 0.5 * torch.erfc(-z / (self.sigma * math.sqrt(2)))

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        return out.normal_(generator=generator)


@dataclass(frozen=True)
class Crest(SmoothingLaw):
    """StableQAT's law: on one cell about a threshold, a crest that falls to the level centres.

    ``p(z) = m(z) / (mean of m)`` with ``m = (1 - K) / (1 + K)``, ``K = sqrt(2) pi A sin(pi |z|)``
    for z up to half the width on either side, z in units of the width (arXiv 2601.19320).

    >>> round(Crest().radius, 5), round(Crest().mean_slope, 5)
    (0.16946, 0.30246)
    """

    amplitude: float = 0.21
    width: float = 1.0

    def __post_init__(self) -> None:
        require_positive("the width of a crest", self.width, "Crest(width=1.0)")
        limit = 1 / (math.sqrt(2) * math.pi)
        if not (is_number(self.amplitude) and 0 <= self.amplitude < limit):
            raise ValueError(
                f"the amplitude of a crest must be from 0 to less than {limit:.4f}, where the "
                f"slope of a level's centre is 0, got {self.amplitude!r}: Crest(amplitude=0.21)"
            )

    @property
    def mean_slope(self) -> float:
        """The mean of m, by which StableQAT's gradients are smaller than the identity's."""
        return _crest_moment(self.amplitude, 0)

    @property
    def radius(self) -> float:
        return self.width * math.sqrt(_crest_moment(self.amplitude, 2) / self.mean_slope)

    @property
    def kurtosis(self) -> float:
        fourth = _crest_moment(self.amplitude, 4)
        return fourth * self.mean_slope / _crest_moment(self.amplitude, 2) ** 2

    def slope(self, z: Tensor) -> Tensor:
        """The multiplier m at z from the threshold; half at the edge, which two cells share."""
        distance = (z / self.width).abs()
        k = math.sqrt(2) * math.pi * self.amplitude * torch.sin(math.pi * distance.clamp(max=0.5))
        share = (distance < 0.5).to(z.dtype) + 0.5 * (distance == 0.5).to(z.dtype)
        return share * (1 - k) / (1 + k)

    def pdf(self, z: Tensor) -> Tensor:
        return self.slope(z) / (self.mean_slope * self.width)

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        _fill_uniform_(out, 1.0, generator)
        quantiles = torch.tensor(_crest_quantiles(self.amplitude), device=out.device).to(out.dtype)
        place = out.abs() * (len(quantiles) - 1)
        below = place.floor().clamp(max=len(quantiles) - 2)
        index = below.long()
        low, high = quantiles[index], quantiles[index + 1]
        magnitude = torch.lerp(low, high, place - below)
        return out.sign_().mul_(magnitude).mul_(self.width / self.radius)


@dataclass(frozen=True)
class Rademacher(SmoothingLaw):
    """``±1`` by a fair coin. It has no density, so it can perturb but is no backward rule."""

    @property
    def radius(self) -> float:
        return 1.0

    @property
    def kurtosis(self) -> float:
        return 1.0

    def pdf(self, z: Tensor) -> Tensor:
        raise ValueError(
            "two points have no density, so no slope comes from Rademacher noise: perturb with it "
            "and keep the slope of another law, for example "
            "dataclasses.replace(identity(), perturbation=Rademacher())"
        )

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        return out.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


@dataclass(frozen=True)
class Scaled(SmoothingLaw):
    """The law of ``factor * z`` for z of another law."""

    law: SmoothingLaw
    factor: float

    def __post_init__(self) -> None:
        require_type("law", self.law, SmoothingLaw, "Scaled(Uniform(), 2.0)")
        require_positive("factor", self.factor, "Scaled(Uniform(), 2.0)")

    @property
    def radius(self) -> float:
        return self.factor * self.law.radius

    @property
    def kurtosis(self) -> float:
        return self.law.kurtosis

    def pdf(self, z: Tensor) -> Tensor:
        return self.law.pdf(z / self.factor) / self.factor

    def cdf(self, z: Tensor) -> Tensor:
        return self.law.cdf(z / self.factor)

    def sample_(self, out: Tensor, generator: Generator | None = None) -> Tensor:
        return self.law.sample_(out, generator)


def with_radius(law: SmoothingLaw, radius: float) -> SmoothingLaw:
    """The law, stretched to a standard deviation of ``radius`` step sizes.

    Raises:
        ValueError: If it is no law, or the radius is not positive and finite.
    """
    require_type("law", law, SmoothingLaw, "with_radius(Uniform(), 0.5)")
    require_positive("radius", radius, "with_radius(Uniform(), 0.5)")
    return Scaled(law, radius / law.radius)


def to_be_drawn(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of that shape to be filled with random numbers, in the order of its indices.

    In the other's memory format it would be filled in the order of memory, and `torch.vmap`, which
    stacked probes run in, would draw other numbers for the same entries.
    """
    return torch.empty_like(
        like, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format
    )


def _fill_uniform_(out: Tensor, edge: float, generator: Generator | None) -> Tensor:
    """Fill with independent values of U(-edge, edge)."""
    if generator is None or out.device.type != "cpu" or not out.is_contiguous():
        return out.uniform_(-edge, edge, generator=generator)
    # The CPU generator is serial and would be most of a step's overhead if each number took a draw:
    # four odd 16-bit integers, symmetric about zero, come from each draw of 64 bits. In parts that
    # stay in the cache.
    flat = out.view(-1)
    for part in flat.split(2**16) if len(flat) > 2**16 else (flat,):
        words = torch.empty((part.numel() + 3) // 4, dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None, generator=generator).bitwise_or_(0x0001_0001_0001_0001)
        part.copy_(words.view(torch.int16)[: part.numel()]).mul_(edge / 2**15)
    return out


def _crest(amplitude: float, z: float) -> float:
    k = math.sqrt(2) * math.pi * amplitude * math.sin(math.pi * z)
    return (1 - k) / (1 + k)


@lru_cache(maxsize=64)
def _crest_moment(amplitude: float, power: int) -> float:
    """The integral of ``|z|^power m(z)`` over a cell of width 1, by Simpson's rule."""
    intervals = 2000
    total = 0.0
    for i in range(intervals + 1):
        z = 0.5 * i / intervals
        weight = 1 if i in (0, intervals) else 4 if i % 2 else 2
        total += weight * z**power * _crest(amplitude, z)
    return 2 * total * 0.5 / intervals / 3


@lru_cache(maxsize=64)
def _crest_quantiles(amplitude: float) -> tuple[float, ...]:
    """|z| at evenly spaced probabilities of |z|, a cell of width 1."""
    fine, coarse = 8192, 1024
    below = [0.0]
    for i in range(fine):
        below.append(below[-1] + _crest(amplitude, 0.5 * (i + 0.5) / fine))
    found, i = [], 0
    for k in range(coarse):
        target = below[-1] * k / coarse
        while below[i + 1] <= target:
            i += 1
        found.append(0.5 * (i + (target - below[i]) / (below[i + 1] - below[i])) / fine)
    return (*found, 0.5)


LAWS: dict[str, SmoothingLaw] = {
    "uniform": Uniform(),
    "triangular": Triangular(),
    "normal": Normal(),
    "logistic": Logistic(),
    "rademacher": Rademacher(),
}
"""Laws to perturb with, by name; bring them to a radius by `with_radius`."""
