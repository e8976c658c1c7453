"""The cheap approximation: as if latent weights stayed Gaussian, two numbers describe them."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import ndtr

from fogzo_lab.dynamics.curve import Curve
from fogzo_lab.dynamics.setting import Array, Regression, check_times


def gaussian_closure(setting: Regression, times: Sequence[float], *, nodes: int = 21) -> Curve:
    """The curve if the density of latent weights were a Gaussian of mean m and variance v.

    ``m' = eta (k1 w* - k2 E Q)`` and ``v' = -2 eta k2 v (E Q)' + eta^2 k2 V / B``. It has the right
    shape and misses how weights gather at thresholds. For rounding to the nearest without mask,
    projection or probes.

    Args:
        setting: What is trained.
        times: tau at which to look, ascending from 0.
        nodes: Of the Gauss-Hermite rule over normal teachers.

    Raises:
        ValueError: If the setting is another, times are no ascending numbers from 0, or there are
            no nodes.
    """
    plain = setting.rounding == "nearest" and setting.estimator == "ste"
    if not plain or setting.masked or setting.projected:
        raise ValueError(
            "the Gaussian closure is that of the unmasked STE with rounding to the nearest: "
            "regression_dynamics(setting, times) has no such limit"
        )
    checked = check_times(times)
    teachers, shares = setting.teachers(nodes)
    k1, k2 = setting.input_moments
    eta = setting.learning_rate
    cuts, jump = setting.thresholds[:, None], setting.spacing
    # Q^2 at each threshold jumps by twice the threshold times the step.
    lowest = -setting.omega

    def moments(mean: Array, sd: Array) -> tuple[Array, Array, Array]:
        z = (mean - cuts) / sd
        above = ndtr(z)
        bell = np.exp(-z * z / 2) / (sd * math.sqrt(2 * math.pi))
        first = lowest + jump * above.sum(0)
        second = lowest**2 + (2 * cuts * jump * above).sum(0)
        return first, second, jump * bell.sum(0)

    def risk_of(first: Array, second: Array) -> float:
        return float(shares @ (teachers**2 - 2 * k1 * teachers * first + k2 * second))

    def rate(_: float, state: Array) -> Array:
        mean, variance = state.reshape(2, -1)
        first, second, slope = moments(mean, np.sqrt(variance))
        error = setting.label_noise**2 + risk_of(first, second)
        return np.concatenate(
            [
                eta * (k1 * teachers - k2 * first),
                -2 * eta * k2 * variance * slope + eta**2 * k2 * error / setting.batch_size,
            ]
        )

    start = np.concatenate([np.zeros_like(teachers), np.ones_like(teachers)])
    solved = solve_ivp(rate, (0, checked[-1]), start, "LSODA", checked, rtol=1e-7, atol=1e-10)
    risks, outside = [], []
    for state in solved.y.T:
        mean, sd = state[: len(teachers)], np.sqrt(state[len(teachers) :])
        risks.append(risk_of(*moments(mean, sd)[:2]))
        beyond = ndtr((mean - setting.omega) / sd) + ndtr((-setting.omega - mean) / sd)
        outside.append(float(shares @ beyond))
    risk, nothing = np.array(risks), np.full(len(checked), math.nan)
    return Curve(checked, risk, risk, np.array(outside), nothing)
