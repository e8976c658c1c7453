"""The theory: a one-dimensional equation for the density of latent weights, with nothing fitted.

In the limit of many weights a latent weight feels the others through one number, the variance of
an error ``V = sigma^2 + E``, where E is the excess risk. So the density mu(w | w*) of latent
weights follows a diffusion:

    d_tau mu = -d_w [eta m (k1 w* - k2 Q) mu] + (eta^2 k2 V / 2B) d_w^2 [m^2 mu]

where levels are drawn with averages over draws in place of ``m (k1 w* - k2 Q)`` and ``m^2``. The
order parameters ``E w* Q`` and ``E Q^2`` do not close: their rates need the density at thresholds.

It is solved as a birth-death chain on cells that end at all levels and thresholds. The rates of
each cell reproduce its drift and its diffusion. So the mean drift is exact, and with it the risk at
which STE stops, even where the density has a cusp narrower than a cell; and a cell that has neither
drift nor diffusion keeps what has come into it, as a mask does.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack

from fogzo.quantizers import adjacent
from fogzo.quantizers.checks import require_count
from fogzo_lab.dynamics.curve import Curve, Density
from fogzo_lab.dynamics.probes import (
    UNREFINED,
    Factor,
    gradient_square,
    gradient_variance,
    measure,
)
from fogzo_lab.dynamics.setting import Array, Regression, check_times

SPAN = 6.0
"""How far the grid reaches; of standard normals 2e-9 lie beyond."""
LEAK = 1e-4
"""The most that may be at an end of the grid from which weights are pulled back."""


def regression_dynamics(
    setting: Regression,
    times: Sequence[float],
    *,
    weights: int | None = None,
    cells: int | None = None,
    time_steps: int = 400,
    nodes: int = 21,
) -> Curve:
    """The curve that a run of many weights must follow.

    >>> curve = regression_dynamics(Regression(omega=2.0, learning_rate=0.05), [0, 30, 150])
    >>> curve.risk.round(3).tolist()  # training longer made it worse
    [2.093, 0.161, 0.333]

    Args:
        setting: What is trained.
        times: tau at which to look, ascending from 0; the noise of the placebo and of FOGZO is full
            at the last.
        weights: d. The theory is that of infinitely many. Given, it knows of two things that are
            left of order 1/d: the variance of a drawn step's own mean, and what a probe of FOGZO
            measures, which the theory of FOGZO needs.
        cells: Between neighbouring levels; by default 128, with FOGZO 256.
        time_steps: Of the solver: half of them up to tau = 10 / eta, if the end is later.
        nodes: Of the Gauss-Hermite rule over normal teachers.

    Raises:
        ValueError: If times are no ascending numbers from 0, a count is none, weights spread beyond
            the grid, or, with FOGZO, the grid is too coarse for the density at a threshold.
    """
    checked = check_times(times)
    end = checked[-1]
    if cells is None:
        cells = 256 if setting.estimator == "fogzo" else 128
    time_steps = require_count("time_steps", time_steps, "time_steps=400")
    if not (isinstance(cells, int) and cells >= 4 and cells % 2 == 0):
        raise ValueError(
            f"cells must be even and 4 or more, got {cells!r}, so that they end at levels and "
            "thresholds: cells=128"
        )
    if setting.estimator == "fogzo" and weights is None:
        raise ValueError(
            "what FOGZO's probe measures depends on the number of weights: "
            "regression_dynamics(setting, times, weights=1000)"
        )
    if weights is not None:
        weights = require_count("weights", weights, "weights=1000")
    chain = _Chain(setting, weights, cells, nodes)
    points = [chain.look(0.0)]
    knots = _knots(setting, time_steps, end)
    for start, stop in pairwise(checked):
        between = knots[(knots > start + 1e-9 * end) & (knots < stop - 1e-9 * end)]
        for before, time in pairwise([start, *between, stop]):
            chain.advance(time - before, setting.kappa * (before + time) / (2 * end))
        points.append(chain.look(setting.kappa * stop / end))
    risk, trained, outside, found = np.array(points).T
    return Curve(checked, risk, trained, outside, found, chain.density())


def _knots(setting: Regression, count: int, end: float) -> Array:
    """Times of the solver: most of what happens does so within a few times 1 / eta."""
    early = 10 / setting.learning_rate
    if end <= early:
        return np.linspace(0, end, count + 1)
    half = count // 2 + 1
    return np.concatenate([np.linspace(0, early, half), np.linspace(early, end, half)[1:]])


class _Moments(NamedTuple):
    """Averages over draws, of shape (teachers, cells)."""

    drift: Array  # of m (k1 w* - k2 Q)
    drift_variance: Array
    slope_square: Array  # of m^2
    risk: Array  # of the level in training


class _Chain:
    """The probability of each cell, and the rates between neighbours."""

    def __init__(self, setting: Regression, weights: int | None, cells: int, nodes: int) -> None:
        self.setting, self.count = setting, weights
        self.width = setting.spacing / cells
        reach = setting.omega if setting.projected else max(SPAN, 1.5 * setting.omega)
        half = round(reach / self.width)
        self.edges = self.width * np.arange(-half, half + 1)
        self.w = (self.edges[1:] + self.edges[:-1]) / 2
        self.teachers, self.shares = setting.teachers(nodes)
        inner = [math.erf(edge / math.sqrt(2)) / 2 + 0.5 for edge in self.edges[1:-1]]
        start = np.diff(np.array([0.0, *inner, 1.0]))  # what lies beyond is at the ends
        self.mass = np.tile(start, (len(self.teachers), 1))
        self.inside = (np.abs(self.w) <= setting.omega).astype(float)
        self.moments = self._moments()
        self.nearest = setting.risk_at(self._nearest(), self.teachers[:, None])
        self.push: Array = np.zeros_like(self.mass)
        self._before: tuple[float, float, Factor] | None = None

    # --- what it says ----------------------------------------------------------------------------

    def mean(self, values: Array) -> float:
        return float(self.shares @ (self.mass * values).sum(1))

    def look(self, kappa: float) -> tuple[float, float, float, float]:
        """Everything that a curve holds."""
        risk, outside, found = self.mean(self.moments.risk), 1 - self.mean(self.inside), math.nan
        if self.count is not None and self.setting.rounding == "nearest":
            factor, _ = self._measure(risk, kappa)
            resolved = self._is_fine_enough(risk, factor)
            found = factor.mean if resolved else math.nan
        return self.mean(self.nearest), risk, outside, found

    def density(self) -> Density:
        return Density(self.w, self.shares @ self.mass / self.width)

    # --- how it moves ----------------------------------------------------------------------------

    def advance(self, size: float, kappa: float) -> None:
        """One step in time, with kappa in its middle."""
        risk, factor = self.mean(self.moments.risk), self._factor(kappa)
        before, last_risk, last_factor = self._before or (size, risk, factor)
        self._before = (size, risk, factor)
        # What they will be in the middle of the step, from their last change.
        ahead = min(size / (2 * before), 1.0)
        risk = max(risk + ahead * (risk - last_risk), 0.0)
        factor = Factor(*(a + ahead * (a - b) for a, b in zip(factor, last_factor, strict=True)))
        self.mass = _evolve(self.mass, *self._rates(risk, factor, kappa), size)
        self._check_ends()

    def _rates(self, risk: float, factor: Factor, kappa: float) -> tuple[Array, Array]:
        """Rates to the next cells above and below, of shape (teachers, cells)."""
        own, moments = self.setting, self.moments
        spread = gradient_variance(own, risk) * moments.slope_square
        spread = spread + kappa * gradient_square(own, self.count, self.mean(self.inside), risk)
        spread = spread * factor.square
        if self.count is not None:
            spread = spread + moments.drift_variance / self.count
        drift = own.learning_rate * (factor.mean * moments.drift + self.push) / (2 * self.width)
        diffusion = own.learning_rate**2 * spread / (2 * self.width**2)
        diffusion = np.maximum(diffusion, np.abs(drift))  # so that no rate is negative
        up, down = diffusion + drift, diffusion - drift
        up[:, -1] = down[:, 0] = 0.0
        return up, down

    def _factor(self, kappa: float) -> Factor:
        """What the estimator multiplies the gradient by."""
        if self.setting.estimator != "fogzo":
            return UNREFINED
        risk = self.mean(self.moments.risk)
        factor, self.push = self._measure(risk, kappa)
        if not self._is_fine_enough(risk, factor):
            raise ValueError(
                "latent weights gather at a threshold in less than half a cell, so the density "
                "there, which FOGZO's probe measures, is not known: more cells, or a larger "
                f"learning_rate / batch_size than {self.setting.learning_rate:g} / "
                f"{self.setting.batch_size}"
            )
        return factor

    def _measure(self, risk: float, kappa: float) -> tuple[Factor, Array]:
        assert self.count is not None
        mass = self.shares[:, None] * self.mass
        return measure(self.setting, self.count, self.edges, mass, self.teachers, risk, kappa)

    def _is_fine_enough(self, risk: float, factor: Factor) -> bool:
        """Whether cells resolve the cusp, of width diffusion / drift, where drifts meet."""
        drift = self.moments.drift
        at = np.round((self.setting.thresholds - self.edges[0]) / self.width).astype(int)
        above, below = drift[:, at], drift[:, at - 1]
        meet = (below > 0) & (above < 0) & (self.mass[:, at] > LEAK)
        if not meet.any() or factor.mean <= 0:
            return True
        used = factor.square / factor.mean if self.setting.estimator == "fogzo" else 1.0
        spread = self.setting.learning_rate * used * gradient_variance(self.setting, risk) / 2
        return bool(spread / np.maximum(below, -above)[meet].max() > self.width / 2)

    def _check_ends(self) -> None:
        if self.setting.projected:
            return  # where the ends are walls
        drift = self.moments.drift
        pulled = np.stack([drift[:, 0] > 0, drift[:, -1] < 0], 1)
        if float(self.shares @ (self.mass[:, [0, -1]] * pulled).sum(1)) > LEAK:
            raise ValueError(
                f"weights spread beyond {self.w[-1]:.3g}, where the grid ends: with a learning "
                f"rate of {self.setting.learning_rate:g} the noise of a step is not small beside "
                "the range of levels, and no diffusion describes it. Use a smaller learning_rate "
                f"or a larger batch_size than {self.setting.batch_size}"
            )

    # --- how it rounds ---------------------------------------------------------------------------

    def _nearest(self) -> Array:
        own = self.setting
        codes = np.clip(np.floor(self.w / own.spacing), own.grid.low_code, own.grid.high_code)
        return own.spacing * (codes + 0.5)

    def _draws(self) -> list[tuple[Array, Array, Array]]:
        """Level, probability and slope of everything that a weight may round to."""
        own, grid = self.setting, self.setting.grid
        slope = self.inside if own.masked else np.ones_like(self.w)
        if own.rounding == "nearest":
            return [(self._nearest(), np.ones_like(self.w), slope)]
        x = np.clip(self.w / own.spacing - 0.5, grid.low_code, grid.high_code)
        lower = np.minimum(np.floor(x), grid.high_code - 1)
        least = adjacent().least_probability
        assert least is not None
        draws: list[tuple[Array, Array, Array]] = []
        for code, p in ((lower, lower + 1 - x), (lower + 1, x - lower)):
            fitting = 1 / (2 * np.maximum(p, least))
            own_slope = slope if own.rounding == "drawn" else np.where(self.inside, fitting, 1.0)
            draws.append((own.spacing * (code + 0.5), p, own_slope))
        return draws

    def _moments(self) -> _Moments:
        own, teachers = self.setting, self.teachers[:, None]
        k1, k2 = own.input_moments
        drift, second, square, risk = (np.zeros_like(self.mass) for _ in range(4))
        for level, p, slope in self._draws():
            pull = slope * (k1 * teachers - k2 * level)
            drift += p * pull
            second += p * pull**2
            square += p * slope**2
            risk += p * own.risk_at(level, teachers)
        return _Moments(drift, np.maximum(second - drift**2, 0.0), square, risk)


_GAMMA = 1 - 1 / math.sqrt(2)


def _evolve(mass: Array, up: Array, down: Array, size: float) -> Array:
    """One step of an L-stable method of second order, for all teachers at once."""
    leave, flat = -(up + down).ravel(), mass.ravel()
    # No rate leads from one teacher to the next: up from a last cell and down from a first are 0.
    from_below, from_above = up.ravel()[:-1], down.ravel()[1:]
    change = leave * flat
    change[1:] += from_below * flat[:-1]
    change[:-1] += from_above * flat[1:]
    flat = flat + (1 - 2 * _GAMMA) * size * change
    scale = -_GAMMA * size
    *factors, _ = lapack.dgttrf(scale * from_below, 1 + scale * leave, scale * from_above)
    for _ in range(2):
        flat, _ = lapack.dgttrs(*factors, flat)
    return flat.reshape(mass.shape)
