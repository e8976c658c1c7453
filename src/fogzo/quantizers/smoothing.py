"""Smoothing laws: the noise z whose expectation turns a staircase into a smooth surrogate.

A grid Q with thresholds t_k and jumps J satisfies ``d/dx E Q(x + z) = J sum_k p(t_k - x)``. So a
law p *is* a backward rule, and its standard deviation is the perturbation radius (the paper's
epsilon-bar) that FOGZO needs to estimate that same slope from losses. One object holds both.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from fogzo.quantizers.checks import require_positive, require_type


class SmoothingLaw(ABC):
    """A symmetric, zero-mean law p(z), z in units of the step size."""

    @property
    @abstractmethod
    def radius(self) -> float:
        """Standard deviation of z: the paper's epsilon-bar, in steps."""

    @property
    @abstractmethod
    def kurtosis(self) -> float:
        """``E u^4`` of the standardised ``u = z / radius`` (Gaussian: 3)."""

    @abstractmethod
    def pdf(self, z: Tensor) -> Tensor:
        """Density at z."""

    @abstractmethod
    def cdf(self, z: Tensor) -> Tensor:
        """P(Z <= z)."""

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
        # Inverse of the cdf on each side of zero: one draw per element instead of two.
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
        return 0.5 + 0.5 * torch.tanh(self.tau * z)

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

    def cdf(self, z: Tensor) -> Tensor:
        return ((z >= -1).to(z.dtype) + (z >= 1).to(z.dtype)) / 2

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
    """The law, stretched to a standard deviation of ``radius`` steps.

    Raises:
        ValueError: If it is no law, or the radius is not positive and finite.
    """
    require_type("law", law, SmoothingLaw, "with_radius(Uniform(), 0.5)")
    require_positive("radius", radius, "with_radius(Uniform(), 0.5)")
    return Scaled(law, radius / law.radius)


def _fill_uniform_(out: Tensor, edge: float, generator: Generator | None) -> Tensor:
    """Fill with independent values of U(-edge, edge)."""
    if generator is None or out.device.type != "cpu" or not out.is_contiguous():
        return out.uniform_(-edge, edge, generator=generator)
    # The CPU generator is serial and would be most of a step's overhead if each number took a draw:
    # four odd 16-bit integers, symmetric about zero, come from each draw of 64 bits. In parts that
    # stay in the cache.
    flat = out.view(-1)
    for part in flat.split(2**16) if len(flat) > 2**16 else (flat,):
        words = torch.empty((part.numel() + 3) // 4, dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator).bitwise_or_(0x0001_0001_0001_0001)
        part.copy_(words.view(torch.int16)[: part.numel()]).mul_(edge / 2**15)
    return out


LAWS: dict[str, SmoothingLaw] = {
    "uniform": Uniform(),
    "triangular": Triangular(),
    "normal": Normal(),
    "logistic": Logistic(),
    "rademacher": Rademacher(),
}
"""Laws to perturb with, by name; bring them to a radius by `with_radius`."""
