"""The problem: a linear teacher, a student whose weights are quantized, and plain SGD.

``y = w*.x / sqrt(d) + sigma xi`` with x standard normal, the prediction ``Q(w).q(x) / sqrt(d)``,
and one step of SGD on half the mean squared error e^2 of a fresh batch of B:

    w <- w + (eta / B) sum e q(x) / sqrt(d) * m(w)

Latent weights start as standard normals. Time is ``tau = steps / d``. After Ichikawa, Kashiwamura
and Sakata (arXiv 2510.10693).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fogzo.quantizers import Grid, uniform
from fogzo.quantizers.checks import require_count

Array = NDArray[np.floating[Any]]
Rounding = Literal["nearest", "drawn", "adjacent"]
Estimator = Literal["ste", "placebo", "fogzo"]


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What is trained, and how.

    Attributes:
        omega: End levels of the weights; the ``2**bits`` levels are spread evenly between -omega
            and omega.
        learning_rate: eta, of plain SGD. Constant.
        bits: Of a weight, 1 to 8.
        batch_size: B.
        label_noise: sigma.
        teacher: Every w*, or ``"normal"`` for standard normals.
        rounding: ``"nearest"``; ``"drawn"``, at random in training, with the slope of STE; or
            ``"adjacent"``, drawn and with the slope of the level that was drawn (the surrogate of
            that name).
        masked: Whether the slope is 0 beyond the range. Not with ``"adjacent"``.
        projected: Whether weights are clamped to the range after each step
            (`fogzo.methods.project_`).
        input_bits: Bits of an input, whose levels are spread like those of weights; None leaves
            inputs alone.
        estimator: ``"ste"``; ``"placebo"``, noise without losses; or ``"fogzo"``, whose agreement
            is taken as measured. Noise is isotropic.
        kappa: Noise-to-signal power of the placebo and FOGZO at the end, reached linearly. FOGZO
            with 0 is lambda alone.
    """

    omega: float
    learning_rate: float
    bits: int = 2
    batch_size: int = 1
    label_noise: float = 0.0
    teacher: float | Literal["normal"] = 1.0
    rounding: Rounding = "nearest"
    masked: bool = False
    projected: bool = False
    input_bits: int | None = None
    estimator: Estimator = "ste"
    kappa: float = 0.0

    def __post_init__(self) -> None:
        example = "Regression(omega=2.0, learning_rate=0.1)"
        for name in ("omega", "learning_rate"):
            _require_number(name, getattr(self, name), example, positive=True)
        for name in ("label_noise", "kappa"):
            _require_number(name, getattr(self, name), example, positive=False)
        for name in ("bits", "input_bits"):
            bits = getattr(self, name)
            if not ((type(bits) is int and 1 <= bits <= 8) or (name, bits) == ("input_bits", None)):
                raise ValueError(f"{name} must be an integer from 1 to 8, got {bits!r}: {name}=2")
        if not (type(self.batch_size) is int and self.batch_size >= 1):
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size!r}: {example}")
        if self.teacher != "normal":
            _require_number("teacher", self.teacher, "teacher=1.0, or 'normal'", positive=None)
        for name, choices in (("rounding", Rounding), ("estimator", Estimator)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r}: {name}={get_args(choices)[0]!r}"
                )
        if self.rounding == "adjacent" and self.masked:
            raise ValueError(
                "the slope of a drawn level has no mask: masked=False with rounding='adjacent'"
            )
        if self.estimator == "ste" and self.kappa:
            raise ValueError(
                f"kappa is that of noise, which STE has not, got {self.kappa!r}: "
                "estimator='placebo' or 'fogzo'"
            )
        if self.estimator != "ste" and self.rounding != "nearest":
            raise ValueError(
                f"the theory of {self.estimator} is that of weights rounded to the nearest level, "
                f"got rounding={self.rounding!r}: estimator='ste'"
            )

    @property
    def grid(self) -> Grid:
        """The levels in steps."""
        return uniform(self.bits, "half")

    @property
    def spacing(self) -> float:
        """Between neighbouring levels."""
        return self.omega / self.grid.high

    @property
    def levels(self) -> Array:
        """All levels, ascending."""
        return np.linspace(-self.omega, self.omega, self.grid.num_levels)

    @property
    def thresholds(self) -> Array:
        """Where rounding to the nearest jumps."""
        return self.spacing * np.array(self.grid.thresholds)

    @property
    def input_spacing(self) -> float:
        """Between neighbouring levels of an input."""
        assert self.input_bits is not None
        return self.omega / uniform(self.input_bits, "half").high

    @property
    def input_moments(self) -> tuple[float, float]:
        """``k1 = E x q(x)`` and ``k2 = E q(x)^2``; 1 and 1 where inputs are left alone."""
        if self.input_bits is None:
            return 1.0, 1.0
        grid, step = uniform(self.input_bits, "half"), self.input_spacing
        cuts = [step * threshold for threshold in grid.thresholds]
        density = sum(math.exp(-cut * cut / 2) for cut in cuts) / math.sqrt(2 * math.pi)
        below = [0.0, *(0.5 * math.erfc(-cut / math.sqrt(2)) for cut in cuts), 1.0]
        levels = [step * (code + 0.5) for code in range(grid.low_code, grid.high_code + 1)]
        square = sum(l * l * (b - a) for l, a, b in zip(levels, below, below[1:], strict=False))
        return step * density, square

    def teachers(self, nodes: int) -> tuple[Array, Array]:
        """Values of w* and their probabilities: by a Gauss-Hermite rule if they are normal."""
        nodes = require_count("nodes", nodes, "nodes=21")
        if self.teacher != "normal":
            return np.array([float(self.teacher)]), np.ones(1)
        places, shares = np.polynomial.hermite_e.hermegauss(nodes)
        kept = shares > 1e-7 * shares.sum()
        return places[kept], shares[kept] / shares[kept].sum()

    def risk_at(self, level: Array, teacher: Array | float) -> Array:
        """``w*^2 - 2 k1 w* Q + k2 Q^2``: what one weight on this level adds to the excess risk."""
        k1, k2 = self.input_moments
        return teacher * teacher - 2 * k1 * teacher * level + k2 * level * level

    @property
    def least_risk(self) -> float:
        """The floor: of the best quantized weights, for a constant teacher."""
        return float(np.min(self.risk_at(self.levels, self._constant_teacher)))

    @property
    def fixed_point_risk(self) -> float:
        """Where STE's risk stops after a long time, for a constant teacher.

        STE's mean step is zero only where the rounded weight averages ``c = k1 w* / k2``. If c lies
        between the levels l and u, latent weights gather at the threshold between them and round
        to both: ``w*^2 (1 - k1^2 / k2) + k2 (c - l)(u - c)``.
        """
        k1, k2 = self.input_moments
        teacher = self._constant_teacher
        c = min(max(k1 * teacher / k2, -self.omega), self.omega)
        lower = self.levels[self.levels <= c + 1e-12].max()
        upper = self.levels[self.levels >= c - 1e-12].min()
        at_c = self.risk_at(np.array(c), teacher)
        return float(at_c + k2 * (c - lower) * (upper - c))

    @property
    def _constant_teacher(self) -> float:
        if self.teacher == "normal":
            raise ValueError(
                "a teacher of many different weights has no one level or threshold to end at: "
                "teacher=1.0, or read the end of the curve, regression_dynamics(...).risk[-1]"
            )
        return float(self.teacher)

    def described(self) -> dict[str, object]:
        """Its fields, for a JSON file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def check_times(times: Sequence[float]) -> Array:
    """The times as an array.

    Raises:
        ValueError: If they are no ascending numbers from 0.
    """
    found = np.asarray(times, dtype=float)
    fine = found.ndim == 1 and len(found) >= 2 and found[0] == 0 and np.isfinite(found).all()
    if not (fine and (np.diff(found) > 0).all()):
        raise ValueError(
            f"times must ascend from 0 to the end of the run, got {times!r:.80}: times=[0, 10, 20]"
        )
    return found


def _require_number(name: str, value: object, example: str, *, positive: bool | None) -> None:
    number = value if isinstance(value, int | float) and type(value) is not bool else math.nan
    wrong = (positive and number <= 0) or (positive is False and number < 0)
    if wrong or not math.isfinite(number):
        kind = {True: "positive and finite", False: "0 or more and finite", None: "finite"}
        raise ValueError(f"{name} must be {kind[positive]}, got {value!r}: {example}")
