"""One run of the regression: its data, its row's way to train, and what theory says of it."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fogzo
from fogzo_lab.dynamics import Regression, regression_dynamics, simulate

TEACHER = 1.0
AGREEMENT: Literal["shrunk", "measured"] = "measured"
"""The paper's estimator to the letter; `agreement.py` tries other rules."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained.

    Attributes:
        omegas: Ends of the range of levels. With 2 bits, at 1 the teacher is a level itself, at 2
            it lies between two, nearer to the lower one.
        weights: d.
        batch_size: Fresh inputs per step.
        steps: Of a run; rows without probes also get as many as FOGZO's cost buys.
        label_noise: Standard deviation of the noise in the targets.
        bits: Of a weight.
        learning_rates: One grid per omega, for all rows; of plain SGD, constant, in units of d.
        kappas: Grid of FOGZO and the placebo; reached linearly, as in the paper.
        weight_factors: Grid of the control variate, times its default weight.
        tuning_seeds: Of runs that choose.
        seeds: Of runs that are reported.
        logged: Points of a curve, apart from the start.
    """

    omegas: tuple[float, ...] = (1.0, 2.0)
    weights: int = 1000
    batch_size: int = 32
    steps: int = 750
    label_noise: float = 0.1
    bits: int = 2
    learning_rates: tuple[tuple[float, ...], ...] = (
        (0.002, 0.004, 0.008, 0.016, 0.032),
        (0.0005, 0.001, 0.002, 0.004, 0.008),
    )
    kappas: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    weight_factors: tuple[float, ...] = (1.0, 8.0, 64.0)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(8))
    logged: int = 25


class Row(NamedTuple):
    """A row of the comparison."""

    estimator: str
    unmasked: bool
    budget: str = "steps"

    @property
    def name(self) -> str:
        """What the results call it."""
        return self.estimator + ("-unmasked" if self.unmasked else "")


DRAWN = ("ste-drawn", "ste-drawn-projected", "ste-drawn-adjacent")
"""Rows whose weights are rounded at random in training, all of them without a mask."""
STEPS = [
    Row(estimator, unmasked)
    for unmasked in (False, True)
    for estimator in ("ste", "placebo", "lambda", "fogzo", "control-variate")
]
STEPS += [Row(name, False) for name in ("ste-projected", *DRAWN)]
COST = [
    Row(estimator, unmasked, "cost")
    for unmasked in (False, True)
    for estimator in ("ste", "placebo")
]
STE_COST = 3
"""Forward passes that a step costs without probes, a backward pass counted as two."""


class Choice(NamedTuple):
    """What is tuned: the learning rate, and kappa or the weight's factor (else None)."""

    learning_rate: float
    strength: float | None


class Data(NamedTuple):
    """All batches of a run, and where its weights start."""

    start: Tensor
    inputs: Tensor
    targets: Tensor


def draw(seed: int, config: Config) -> Data:
    """Start and batches of one seed, the same for every row."""
    d, batch = config.weights, config.batch_size
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, d, generator=generator)
    steps = max(num_steps(row, config) for row in (*STEPS, *COST))
    inputs = torch.randn(steps, batch, d, generator=generator).mul_(d**-0.5)
    noise = torch.randn(steps, batch, 1, generator=generator)
    targets = TEACHER * inputs.sum(2, keepdim=True) + config.label_noise * noise
    return Data(start, inputs, targets)


def num_steps(row: Row, config: Config) -> int:
    """The usual steps, or those that cost as much as FOGZO's."""
    if row.budget == "steps":
        return config.steps
    return config.steps * (STE_COST + 2) // STE_COST


def problem_of(row: Row, choice: Choice, omega: float, config: Config) -> Regression:
    """What is trained, for theory and simulation alike; FOGZO's rivals are made in `run`."""
    drawn = "adjacent" if row.estimator == "ste-drawn-adjacent" else "drawn"
    kind = {"lambda": "fogzo", "fogzo": "fogzo", "placebo": "placebo"}.get(row.estimator, "ste")
    return Regression(
        omega=omega,
        learning_rate=choice.learning_rate * config.weights,
        bits=config.bits,
        batch_size=config.batch_size,
        label_noise=config.label_noise,
        teacher=TEACHER,
        rounding=drawn if row.estimator in DRAWN else "nearest",
        masked=not row.unmasked and row.estimator not in DRAWN,
        projected=row.estimator.endswith("projected"),
        estimator=kind,
        kappa=0.0 if kind == "ste" else choice.strength or 0.0,
    )


def times_of(row: Row, config: Config) -> list[float]:
    """When a run is looked at, in steps per weight."""
    steps = num_steps(row, config)
    logged = sorted({-(-steps * point // config.logged) for point in range(config.logged + 1)})
    return [step / config.weights for step in logged]


def run(
    row: Row, choice: Choice, omega: float, seed: int, data: Data, config: Config
) -> dict[str, Any]:
    """Train once; the excess risk at the end and on the way."""
    steps, counted = num_steps(row, config), Counted()

    def make(weights: Any, total: int) -> Any:
        estimator = make_estimator(row, choice.strength, weights, seed, total)
        return None if estimator is None else counted.around(estimator)

    curve = simulate(
        problem_of(row, choice, omega, config),
        times_of(row, config),
        weights=config.weights,
        seed=seed,
        estimator=make,
        data=[
            (data.start, torch.full((config.weights,), TEACHER)),
            *zip(data.inputs[:steps], data.targets[:steps], strict=True),
        ],
    )
    forwards = steps + counted.forwards
    logged = [round(time * config.weights) for time in curve.times]
    return {
        "risk": float(curve.risk[-1]),
        "curve": list(zip(logged, map(float, curve.risk), strict=True)),
        "outside": float(curve.outside[-1]),
        "forwards": forwards,
        "cost": forwards + 2 * steps,
    }


class Counted:
    """Counts the forward passes that an estimator asks for."""

    def __init__(self) -> None:
        self.forwards = 0

    def around(self, estimator: fogzo.GradientEstimator) -> "Counted":
        """This, as an estimator."""
        self.estimator = estimator
        return self

    def refine_grads_(self, closure: Any) -> fogzo.RefineStats:
        """The estimator's own."""

        def counting() -> Tensor:
            self.forwards += 1
            return closure()

        return self.estimator.refine_grads_(counting)


def make_estimator(row: Row, strength: float | None, weights: Any, seed: int, steps: int) -> Any:
    """The row's estimator, or None for STE."""
    if row.estimator.startswith("ste"):
        return None
    if row.estimator == "lambda":
        return fogzo.FogzoEstimator(weights, noise_share=0.0, seed=seed, agreement=AGREEMENT)
    if row.estimator == "control-variate":
        own = fogzo.ControlVariateEstimator(weights).default_noise_share()
        return fogzo.ControlVariateEstimator(weights, weight=strength * own, seed=seed)
    share = fogzo.linear_noise_share(total_steps=steps, kappa=strength)
    if row.estimator == "placebo":
        return fogzo.PlaceboEstimator(weights, noise_share=share, seed=seed)
    return fogzo.FogzoEstimator(weights, noise_share=share, seed=seed, agreement=AGREEMENT)


def theory(entry: dict[str, Any], omega: float, config: Config) -> dict[str, Any] | None:
    """The curve of a row at what was chosen for it."""
    unmasked = entry["name"].endswith("-unmasked")
    row = Row(entry["name"].removesuffix("-unmasked"), unmasked, entry["budget"])
    if row.estimator == "control-variate":
        return None
    choice = Choice(entry["learning_rate"], entry["strength"])
    problem = problem_of(row, choice, omega, config)
    steps = min(400, num_steps(row, config))
    times = times_of(row, config)
    curve = regression_dynamics(problem, times, weights=config.weights, time_steps=steps)
    return {"risk": float(curve.risk[-1]), "curve": [float(risk) for risk in curve.risk]}
