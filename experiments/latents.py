"""Gradients through drawn categories: bias and variance on a toy, and an autoencoder of digits.

    python experiments/latents.py [--quick] [--output-dir FOLDER] [--workers 2]

The toy is one variable of three categories whose expected loss is known, so that the mean and the
variance of a gradient of K samples can be held against their formulas: a mean without K in it, and
the variance given the draw over K, plus that of the draw itself.

The autoencoder codes a digit of scikit-learn by six variables of sixteen categories and is trained
on the negative evidence lower bound, Bernoulli pixels and a uniform prior. Learning rates are
chosen for each row by the bound on the validation split, on seeds of their own; what is
reported is the bound on the test split from fresh seeds. Writes results.json.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fogzo.quantizers import conditional_gumbels, one_hot_sample
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.metrics import Metric
from fogzo_lab.comparison.tables import where
from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.images import ImageSplit, load_images
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "latents"
BOUND = Metric("bound", "test bound")
LOGITS = (0.3, -0.4, 0.1)
VALUES, AIM = (1.0, -2.0, 3.0), 0.5
"""The toy's loss is the squared distance of the drawn value from the aim."""


class Row(NamedTuple):
    """A way to pass gradients through a draw."""

    backward: str
    temperature: float
    samples: int | None = None

    @property
    def name(self) -> str:
        """What the results call it."""
        count = "" if self.samples is None else f"-{self.samples}"
        return f"{self.backward}{count} at {self.temperature:g}"

    @property
    def label(self) -> str:
        """What a table calls it."""
        if self.samples is None:
            return {"st": "straight-through", "reinmax": "ReinMax"}[self.backward]
        many = f"Gumbel-Rao, {self.samples} samples"
        return "straight-through Gumbel-softmax" if self.samples == 1 else many


TEMPERATURES = (0.1, 0.5, 1.0)
ROWS = (
    Row("st", 1.0),
    Row("reinmax", 1.0),
    *(Row("gumbel_rao", t, k) for k in (1, 10) for t in TEMPERATURES),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured and trained.

    Attributes:
        draws: Gradients of the toy, per temperature and number of samples.
        samples: K of the toy.
        rows: Of the autoencoder.
        variables: Per image.
        categories: Per variable.
        hidden: Units of the encoder's and of the decoder's one hidden layer.
        steps: Of Adam, at a constant learning rate.
        batch_size: Images per step.
        learning_rates: One grid for all rows.
        tuning_seeds: Of runs that choose.
        seeds: Of runs that are reported.
        evaluated: Draws per image of a bound that is reported.
    """

    draws: int = 100_000
    samples: tuple[int, ...] = (1, 10, 100)
    rows: tuple[Row, ...] = ROWS
    variables: int = 6
    categories: int = 16
    hidden: int = 64
    steps: int = 1200
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(6))
    evaluated: int = 20


QUICK = Config(
    draws=500,
    samples=(1, 10),
    rows=(
        Row("st", 1.0),
        Row("reinmax", 1.0),
        Row("gumbel_rao", 0.5, 1),
        Row("gumbel_rao", 0.5, 2),
    ),
    steps=10,
    learning_rates=(0.004,),
    tuning_seeds=(100,),
    seeds=(0, 1),
    evaluated=1,
)


# The toy


def toy(config: Config) -> list[dict[str, Any]]:
    """Mean and variance of the gradient, beside their formulas."""
    found = []
    for temperature, samples in product(TEMPERATURES, config.samples):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # noqa: TID251 -- given back
            grads = toy_gradients(config.draws, temperature, samples)
            within, between = toy_variances(config.draws, temperature)
        exact = exact_gradient()
        found.append(
            {
                "temperature": temperature,
                "samples": samples,
                "variance": grads.var(0).sum().item(),
                "predicted": within / samples + between,
                "bias": (grads.mean(0) - exact).norm().item(),
                "bias_error": (grads.var(0).sum() / config.draws).sqrt().item(),
                "exact_norm": exact.norm().item(),
            }
        )
    return found


def toy_loss(one_hot: Tensor) -> Tensor:
    """The toy's loss of each draw."""
    return (one_hot @ torch.tensor(VALUES, dtype=one_hot.dtype) - AIM).square()


def toy_gradients(draws: int, temperature: float, samples: int) -> Tensor:
    """Independent gradients, of shape (draws, 3)."""
    logits = torch.tensor(LOGITS, dtype=torch.float64).repeat(draws, 1).requires_grad_()
    sample = one_hot_sample(logits, "gumbel_rao", temperature=temperature, samples=samples)
    toy_loss(sample).sum().backward()
    assert logits.grad is not None
    return logits.grad


def toy_variances(draws: int, temperature: float) -> tuple[float, float]:
    """The variance of one sample given the draw, and that of its mean given the draw."""
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    shares = logits.softmax(0)
    means, variances = [], []
    for hard in torch.eye(3, dtype=torch.float64):
        at = hard.clone().requires_grad_()
        (slope,) = torch.autograd.grad(toy_loss(at), at)
        y = conditional_gumbels(logits.expand(draws, 3), hard.expand(draws, 3))
        soft = (y / temperature).softmax(-1)
        grads = soft * (slope - (soft * slope).sum(-1, keepdim=True)) / temperature
        means.append(grads.mean(0))
        variances.append(grads.var(0).sum())
    mean = shares @ torch.stack(means)
    between = shares @ (torch.stack(means) - mean).square().sum(1)
    return (shares @ torch.stack(variances)).item(), between.item()


def exact_gradient() -> Tensor:
    """Of the toy's expected loss."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    expected = logits.softmax(0) @ toy_loss(torch.eye(3, dtype=torch.float64))
    return torch.autograd.grad(expected, logits)[0]


# The autoencoder


class Autoencoder(nn.Module):
    """An image, several one-hot variables, and the image again."""

    def __init__(self, config: Config, row: Row) -> None:
        super().__init__()
        code, hidden = config.variables * config.categories, config.hidden
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, 64))
        self.shape, self.row = (config.variables, config.categories), row

    def bound(self, x: Tensor) -> Tensor:
        """The negative evidence lower bound, nats per image."""
        logits = self.encoder(x).unflatten(-1, self.shape)
        row = self.row
        options: dict[str, Any] = {"temperature": row.temperature, "samples": row.samples}
        z = one_hot_sample(logits, row.backward, **options)  # type: ignore[arg-type]
        pixels = binary_cross_entropy_with_logits(self.decoder(z.flatten(-2)), x, reduction="none")
        log_q = logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(self.shape[1]))).sum((-1, -2))
        return (pixels.sum(-1) + kl).mean()


def pixels_of(split: ImageSplit) -> Tensor:
    """All images of a split, from 0 to 1."""
    return split.batch(torch.arange(len(split)))[0].flatten(1).float() / 128


def run(job: tuple[Config, Row, float, int]) -> dict[str, float]:
    """One run: the bound on each split."""
    config, row, rate, seed = job
    images = load_images(ImagesConfig(dataset="digits"))
    data = pixels_of(images.train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # noqa: TID251 -- given back
        model = Autoencoder(config, row)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(config.steps):
            optimizer.zero_grad()
            model.bound(data[torch.randint(len(data), (config.batch_size,))]).backward()
            optimizer.step()
        with torch.no_grad():
            splits = {"validation": images.validation, "test": images.test, "train": images.train}
            return {
                name: model.bound(pixels_of(split).repeat(config.evaluated, 1)).item()
                for name, split in splits.items()
            }


def in_parallel(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> list[Any]:
    """What a function makes of each job, in as many processes; one is this process."""
    if workers == 1:
        return list(map(function, jobs))
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, jobs))


def compared(config: Config, workers: int) -> list[dict[str, Any]]:
    """Every row, tuned and reported."""
    tuning = list(product(config.rows, config.learning_rates, config.tuning_seeds))
    tried = dict(
        zip(tuning, in_parallel(run, [(config, *job) for job in tuning], workers), strict=True)
    )
    rates, tuned = {}, {}
    for row in config.rows:
        tuned[row] = [
            [rate, statistics.mean(tried[row, rate, s]["validation"] for s in config.tuning_seeds)]
            for rate in config.learning_rates
        ]
        rates[row] = min(tuned[row], key=lambda entry: entry[1])[0]
    jobs = [(config, row, rates[row], seed) for row in config.rows for seed in config.seeds]
    outcomes = in_parallel(run, jobs, workers)
    rows = []
    for index, row in enumerate(config.rows):
        own = outcomes[index * len(config.seeds) : (index + 1) * len(config.seeds)]
        edges = (min(config.learning_rates), max(config.learning_rates))
        rows.append(
            {
                "name": row.name,
                **row._asdict(),
                "learning_rate": rates[row],
                "at_edge_of_grid": len(config.learning_rates) > 1 and rates[row] in edges,
                "tuned": tuned[row],
                "train": [outcome["train"] for outcome in own],
                "bound": [outcome["test"] for outcome in own],
            }
        )
    return rows


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row minus the straight-through one, and more samples minus one, paired by seed."""
    by_name = {row["name"]: row for row in rows}
    pairs = [(row, by_name["st at 1"]) for row in rows if row["backward"] != "st"]
    for row in rows:
        if (row["samples"] or 0) > 1:
            pairs.append((row, by_name[Row("gumbel_rao", row["temperature"], 1).name]))
    return [
        {"row": row["name"], "other": other["name"]}
        | vars(Interval.paired(row["bound"], other["bound"]))
        for row, other in pairs
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    results = measure(QUICK if arguments.quick else Config(), arguments.workers)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(config: Config, workers: int) -> dict[str, Any]:
    """The toy and the autoencoder."""
    rows = compared(config, workers)
    return {
        "environment": environment(),
        "config": asdict(config),
        "toy": toy(config),
        "rows": rows,
        "differences": differences(rows),
    }


def table(results: dict[str, Any]) -> Table:
    """The autoencoder's rows, for docs/discrete.md."""
    gaps = {(gap["row"], gap["other"]): gap for gap in results["differences"]}

    def called(name: str, other: str) -> str:
        gap = gaps.get((name, other))
        return "" if gap is None else BOUND.called(Interval(gap["mean"], gap["low"], gap["high"]))

    rows = []
    for row in results["rows"]:
        one = Row("gumbel_rao", row["temperature"], 1).name
        rows.append(
            [
                Row(row["backward"], row["temperature"], row["samples"]).label,
                f"{row['temperature']:g}",
                f"{row['learning_rate']:g}",
                BOUND.spread(Summary.of(row["bound"])),
                called(row["name"], "st at 1"),
                called(row["name"], one),
            ]
        )
    config = results["config"]
    edges = sum(row["at_edge_of_grid"] for row in results["rows"])
    heading = ("gradient", "temperature", "learning rate", "test bound", "− ST", "− one sample")
    caption = (
        f"{config['variables']} variables of {config['categories']} categories, {config['steps']} "
        "steps. Negative evidence lower bound on the test split, nats per image, less is better: "
        f"mean ± standard deviation over {len(config['seeds'])} seeds not used for tuning. "
        "Differences are paired by seed, with 95% intervals, bold where they exclude zero: from "
        "the straight-through gradient, and from one sample at the same temperature. Learning rate "
        f"at an edge of the grid: {edges} of {len(results['rows'])} rows. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def toy_table(results: dict[str, Any]) -> Table:
    """Bias and variance on the toy, for docs/discrete.md."""
    rows = [
        [
            f"{point['temperature']:g}",
            str(point["samples"]),
            f"{point['variance']:.2f}",
            f"{point['predicted']:.2f}",
            f"{point['bias']:.2f} ± {point['bias_error']:.2f}",
        ]
        for point in results["toy"]
    ]
    caption = (
        f"Gradients of three logits, {results['config']['draws']:,} draws; variance is the trace "
        "of the covariance, bias the distance of the mean from the exact gradient, of length "
        f"{results['toy'][0]['exact_norm']:.2f}, ± its standard error. Predicted: the variance "
        f"given the draw over K, plus that of the draw. {where(results['environment'])}"
    )
    return Table("", ("temperature", "samples K", "variance", "predicted", "bias"), rows, caption)


if __name__ == "__main__":
    main()
