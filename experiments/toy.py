"""The toy of CEWT's authors: which way to train through rounding ends at the smallest loss.

    python experiments/toy.py [--quick] [--output-dir FOLDER]

Linear regression Y = X Q* with N = D inputs, one matrix of D x D weights rounded to multiples of
D^-1/2, all of them Gaussian (Yang et al., arXiv 2609.32659). Every method is trained by Adam with
steps of length lr ||W||, weights of constant norm and a cosine schedule; the loss reported is that
of the rounded weights. The authors publish eight methods at one learning rate, 0.1. Here each is
also run at three others, and the best of the four is shown beside it, on the same seeds, so what
is chosen is a little flattered. Writes results.json.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

import fogzo
from fogzo.methods import GridPenalty, GridPull, cage, cewt
from fogzo.quantizers import Grid, Quantizer, fixed_scale
from fogzo.quantizers.surrogates import stable_qat
from fogzo_lab.system.environment import environment
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "toy"
GRID = Grid("integers", -8, 7)
NEAR = 0.005
"""Within how many steps of a threshold a weight counts as near it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained.

    Attributes:
        size: D.
        steps: Of a run, each on all inputs.
        authors_rate: The learning rate that the authors use.
        learning_rates: All that are tried.
        seeds: Of runs that are reported.
        methods: Names in `METHODS`.
    """

    size: int = 256
    steps: int = 200
    authors_rate: float = 0.1
    learning_rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All methods, if none are named."""
        return self.methods or tuple(METHODS)


QUICK = Config(size=32, steps=10, learning_rates=(0.1,), seeds=(0,))


class Run:
    """Rounded weights under Adam with kept norm: plain STE. Methods differ in what they override.

    Attributes:
        weight: W, of shape (D, D).
        step_size: Distance of the levels, D^-1/2.
    """

    constrained = False

    def __init__(self, config: Config, seed: int, rate: float) -> None:
        size = config.size
        generator = Generator().manual_seed(seed)
        self.config, self.seed, self.step = config, seed, 0
        self.step_size = size**-0.5
        self.x = torch.randn(size, size, generator=generator)
        self.y = self.x @ (torch.randn(size, size, generator=generator) * self.step_size)
        self.weight = nn.Parameter(torch.randn(size, size, generator=generator) * self.step_size)
        self.quantizer = Quantizer(GRID, fixed_scale(self.step_size), "identity_unmasked")
        self._step_size = torch.full((1, 1), self.step_size)
        record = ("w", self.weight, lambda: self._step_size)
        self.records = [fogzo.QuantizedWeight(*record, self.quantizer.surrogate, grid=GRID)]
        self.optimizer = torch.optim.Adam([self.weight], lr=rate)
        self.norm = cewt(self.records, self.optimizer, project=self.constrained)
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=config.steps)
        self.prepare()

    def prepare(self) -> None:
        """Make what the method needs."""

    def loss(self) -> Tensor:
        """What is differentiated."""
        return mse_loss(self.x @ self.quantizer(self.weight, self._step_size), self.y)

    def before(self, loss: Tensor) -> None:
        """Between backward and the optimizer's step."""

    def after(self) -> None:
        """After the optimizer's step."""

    @property
    def done(self) -> float:
        """The fraction of the run that lies behind."""
        return self.step / self.config.steps

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The integers that weights round to."""
        return (self.weight / self.step_size).round()

    def train(self) -> dict[str, float]:
        """The run's results."""
        for _ in range(self.config.steps):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.before(loss)
            self.optimizer.step()
            self.after()
            self.schedule.step()
            self.step += 1
        with torch.no_grad():
            x = self.weight / self.step_size
            loss = mse_loss(self.x @ (x.round() * self.step_size), self.y)
            near = (x - (x.floor() + 0.5)).abs() < NEAR
            return {"loss": loss.item(), "near_threshold": near.double().mean().item()}


class Constrained(Run):
    """CEWT: weights of Gaussian ranks."""

    constrained = True


class Dampened(Run):
    """The penalty ``alpha mean((x - round x)^2)``, x in steps, with alpha from 0 to 1."""

    def alpha(self, step: int) -> float:
        """The penalty's factor."""
        return step / self.config.steps

    def prepare(self) -> None:
        """Make the penalty."""
        scale = 1 / (self.step_size * self.config.size) ** 2  # of a mean, in squares of steps
        self.penalty = GridPenalty(self.records, lambda step: scale * self.alpha(step))

    def before(self, loss: Tensor) -> None:
        """Add the penalty's gradient."""
        self.penalty.add_grads_()


class DampenedTooMuch(Dampened):
    """The authors' bad setting: alpha from 0 to 10 in ten steps."""

    def alpha(self, step: int) -> float:
        """The penalty's factor."""
        return float(min(step, 10))


class Interpolated(Run):
    """A tenth of the way to the grid after every step."""

    def prepare(self) -> None:
        """Make the pull."""
        self.pull = GridPull(self.records, 0.1)

    def after(self) -> None:
        """Pull."""
        self.pull.pull_()


class Cage(Interpolated):
    """CAGE with a ramp from the first step on; a run this short has no time for the authors'."""

    start = 0.0

    def prepare(self) -> None:
        """Make the pull."""
        options = {"total_steps": self.config.steps, "start": self.start}
        self.pull = cage(self.records, self.optimizer, **options)


class LateCage(Cage):
    """CAGE with the authors' ramp over the last fifth of the run."""

    start = 0.8


class Fogzo(Run):
    """FOGZO with the defaults, but kappa 1 at the end."""

    def prepare(self) -> None:
        """Make the estimator."""
        share = fogzo.linear_noise_share(total_steps=self.config.steps, kappa=1.0)
        options = {"noise_share": share, "seed": self.seed}
        self.estimator = fogzo.FogzoEstimator(self.records, **options)

    def before(self, loss: Tensor) -> None:
        """Refine the gradient."""
        self.estimator.refine_grads_(self.loss, expected_loss=loss)


class PaperFogzo(Fogzo):
    """FOGZO to the letter of its paper, kappa 1 at the end."""

    def prepare(self) -> None:
        """Make the estimator."""
        self.estimator = fogzo.FogzoEstimator(
            self.records,
            noise_share=fogzo.linear_noise_share(total_steps=self.config.steps, kappa=1.0),
            agreement="measured",
            noise_shape="isotropic",
            seed=self.seed,
        )


class Placebo(Fogzo):
    """FOGZO's noise without its measurement."""

    def prepare(self) -> None:
        """Make the estimator."""
        share = fogzo.linear_noise_share(total_steps=self.config.steps, kappa=1.0)
        options = {"noise_share": share, "seed": self.seed}
        self.estimator = fogzo.PlaceboEstimator(self.records, **options)


class CageAndFogzo(Fogzo):
    """Both: weights on the grid leave FOGZO nothing to measure."""

    def prepare(self) -> None:
        """Make the estimator and the pull."""
        super().prepare()
        self.pull = cage(self.records, self.optimizer, total_steps=self.config.steps, start=0.0)

    def after(self) -> None:
        """Pull."""
        self.pull.pull_()


class Stable(Run):
    """StableQAT's slope."""

    def prepare(self) -> None:
        """Change the backward rule."""
        self.quantizer = Quantizer(GRID, fixed_scale(self.step_size), stable_qat())


class Annealed(Run):
    """Confidence-guided annealing: slope 1 / (2 a) within a of a threshold, a from .5 to 0."""

    def before(self, loss: Tensor) -> None:
        """Multiply by the slope."""
        a = max(1e-3, 0.5 * (1 - self.done))
        with torch.no_grad():
            x = self.weight / self.step_size
            near = (x - (x.floor() + 0.5)).abs() <= a
            self.weight.grad.mul_(near / (2 * a))


class Noisy(Run):
    """Pseudo-quantization noise: uniform noise of one step in place of rounding."""

    def prepare(self) -> None:
        """Make the noise's stream."""
        self.generator = Generator().manual_seed(self.seed + 1)

    def loss(self) -> Tensor:
        """The loss of noisy weights."""
        noise = torch.rand(self.weight.shape, generator=self.generator) - 0.5
        return mse_loss(self.x @ (self.weight + noise * self.step_size), self.y)


class Frozen(Run):
    """Iterative freezing: weights that turn round often are fixed at their mean level."""

    memory = 0.1

    def prepare(self) -> None:
        """Begin with nothing frozen."""
        self.frozen = torch.zeros_like(self.weight, dtype=torch.bool)
        self.frequency, self.last = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.mean, self.length = self.codes(), self.weight.detach().norm()

    def before(self, loss: Tensor) -> None:
        """Remember where weights were."""
        self.old, self.old_codes = self.weight.detach().clone(), self.codes()

    @torch.no_grad()
    def after(self) -> None:
        """Hold what is frozen, the norm of all, and freeze what turns round too often."""
        self.weight.copy_(torch.where(self.frozen, self.old, self.weight))
        left = (self.length**2 - self.old[self.frozen].norm() ** 2).clamp(min=0).sqrt()
        factor = left / (self.weight[~self.frozen].norm() + 1e-8)
        self.weight.mul_(torch.where(self.frozen, 1.0, factor))
        change = self.codes() - self.old_codes
        turned = (change != 0) & (change.sign() != self.last.sign())
        self.frequency.lerp_(turned.float(), self.memory)
        freeze = self.frequency >= 1 - self.done
        self.frozen |= freeze
        self.weight.copy_(torch.where(freeze, self.mean * self.step_size, self.weight))
        self.mean.lerp_(self.old_codes, self.memory)
        self.last = torch.where(turned, change, self.last)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        label: What it is called there.
        run: How it trains.
        published: The authors' loss x 1000 with D = 1024 over five seeds, if they ran it.
        expected: What an independent implementation of their program gave with D = 256, seed 0.
    """

    label: str
    run: Callable[[Config, int, float], Run]
    published: int | None = None
    expected: float | None = None


METHODS = {
    "ste": Method("STE", Run, 81, 79.5),
    "dampening": Method("dampening", Dampened, 30, 31.3),
    "dampening-too-much": Method("dampening, too strong", DampenedTooMuch, 375, 374.2),
    "cewt": Method("CEWT", Constrained, 45, 45.2),
    "cage": Method("CAGE, ramp from the start", Cage),
    "cage-late": Method("CAGE, the authors' ramp", LateCage),
    "interpolation": Method("a tenth of the way to the grid per step", Interpolated, 54, 54.1),
    "annealing": Method("confidence-guided annealing", Annealed, 53, 53.9),
    "freezing": Method("iterative freezing", Frozen, 59, 58.8),
    "stable-qat": Method("StableQAT's slope", Stable),
    "noise": Method("pseudo-quantization noise", Noisy, 87, 86.8),
    "placebo": Method("placebo, kappa 1", Placebo),
    "fogzo": Method("FOGZO, kappa 1", Fogzo),
    "fogzo-paper": Method("FOGZO, the paper's estimator", PaperFogzo),
    "cage-fogzo": Method("CAGE and FOGZO", CageAndFogzo),
}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    config = QUICK if arguments.quick else Config()
    results = measure(config)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(config: Config) -> dict[str, Any]:
    """All methods at all learning rates."""
    rows = []
    for name in config.names:
        runs, began = [], time.perf_counter()
        for rate in config.learning_rates:
            found = [train(name, config, seed, rate) for seed in config.seeds]
            runs.append({"learning_rate": rate} | {k: [f[k] for f in found] for k in found[0]})
        seconds = (time.perf_counter() - began) / (len(runs) * len(config.seeds))
        rows.append({"name": name, "seconds_per_run": round(seconds, 2), "runs": runs})
    return {"config": asdict(config), "environment": environment(), "rows": rows}


def train(name: str, config: Config, seed: int, rate: float) -> dict[str, float]:
    """One run: its loss and the share of weights near a threshold."""
    with warnings.catch_warnings():
        # Said of the method of two that is meant to show it.
        warnings.filterwarnings("ignore", "(no weight rounds|the probes do not)", RuntimeWarning)
        warnings.filterwarnings("ignore", "learning rate times strength", RuntimeWarning)
        return METHODS[name].run(config, seed, rate).train()


def table(results: dict[str, Any]) -> Table:
    """All methods beside what their authors published, for docs/methods.md."""
    config, facts = results["config"], results["environment"]
    heading = ("method", "published", f"lr {config['authors_rate']:g}", "best of four lr", "its lr")
    heading += ("% near thresholds",)
    rows = []
    for row in results["rows"]:
        method = METHODS[row["name"]]
        by_rate = {run["learning_rate"]: run for run in row["runs"]}
        best = min(row["runs"], key=lambda run: statistics.mean(run["loss"]))
        rows.append(
            [
                method.label,
                "" if method.published is None else str(method.published),
                spread(by_rate[config["authors_rate"]]["loss"]),
                spread(best["loss"]),
                f"{best['learning_rate']:g}",
                f"{100 * statistics.mean(best['near_threshold']):.1f}",
            ]
        )
    caption = (
        f"Loss of the rounded weights x 1000, D = {config['size']}, {config['steps']} steps, mean "
        f"± standard deviation over {len(config['seeds'])} seeds; published: D = 1024. Near: "
        f"within {NEAR} steps, where 1.0 is an even spread. Each method's other settings are "
        f"untuned. {facts['processor']}, torch {facts['torch']}, {facts['date']}."
    )
    return Table("", heading, rows, caption)


def spread(losses: list[float]) -> str:
    """Mean and standard deviation, x 1000."""
    thousands = [1000 * loss for loss in losses]
    if len(thousands) == 1:
        return f"{thousands[0]:.1f}"
    return f"{statistics.mean(thousands):.1f} ± {statistics.stdev(thousands):.1f}"


if __name__ == "__main__":
    main()
