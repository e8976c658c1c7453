"""Forward passes spent on few numbers: learned step sizes, or one rate per layer.

    python experiments/few_numbers.py [--quick] [--workers 2] [--output-dir FOLDER]

A slope per step says one number, which FOGZO spreads over all weights. Here it goes to the step
sizes of LSQ, one per layer, or to one layer's learning rate at a time; weights keep STE's gradient.
Learning rates are tuned for each rule by validation loss. Needs data/mnist and data/shakespeare.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import paper
import torch
from forgetting import in_parallel
from torch import Tensor, nn

import fogzo
from fogzo import QuantizedLayer
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.metrics import TEST_ACCURACY, TEST_PERPLEXITY
from fogzo_lab.comparison.tables import where
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import training_step
from fogzo_lab.training.model_config import QuantizerConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.state import Training, own_random_streams

FOLDER = Path(__file__).parent / "few-numbers"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is trained, and how its learning rate is tuned.

    Attributes:
        name: mlp, llama or digits.
        steps: Of every run.
        rates: That are tried.
        seeds: Of the rate that is chosen.
        tuning_seeds: The first of them, which choose it.
    """

    name: str
    steps: int
    rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    networks: tuple[Network, ...]


FULL = Config(
    networks=(
        Network(name="mlp", steps=1200, rates=(1e-3, 3.16e-3, 1e-2), seeds=5, tuning_seeds=2),
        Network(name="llama", steps=450, rates=(3.16e-3, 1e-2), seeds=3, tuning_seeds=2),
    )
)
QUICK = Config(
    networks=(Network(name="digits", steps=6, rates=(1e-3, 3e-3), seeds=2, tuning_seeds=1),)
)


def recipe(network: Network, seed: int) -> TrainConfig:
    """A network with learned step sizes at 2 bits, trained with STE."""
    base = {
        "mlp": paper.mnist_mlp,
        "llama": paper.shakespeare_llama,
        "digits": RECIPES["digits-mlp"],
    }[network.name]()
    lsq = QuantizerConfig(preset="lsq", bits=2)
    return replace(base, quantizer=lsq, estimator="ste", seed=seed, max_steps=network.steps)


class Rule:
    """Stands in the loop for an estimator, and leaves all gradients as they are.

    Args:
        training: The run, whose network is quantized.
    """

    def __init__(self, training: Training) -> None:
        self.record_rng = nullcontext
        self.step = 0
        self.layers = [m for m in training.model.modules() if isinstance(m, QuantizedLayer)]
        self.steps = [layer.weight_step for layer in self.layers if layer.weight_step is not None]

    @torch.no_grad()
    def refine_grads_(
        self, closure: Callable[[], Tensor], expected_loss: Tensor | None = None
    ) -> fogzo.RefineStats:
        """Change the gradients that this rule is about."""
        self.step += 1
        return fogzo.RefineStats(self.step, probe_losses=tuple(self.refine(closure)))

    def refine(self, closure: Callable[[], Tensor]) -> Sequence[float]:
        """The losses that were measured."""
        return ()


class Kept(Rule):
    """Step sizes stay as they were measured on the initial weights."""

    def refine(self, closure: Callable[[], Tensor]) -> Sequence[float]:
        """Leave them without a gradient."""
        for step in self.steps:
            step.grad = None
        return ()


class Measured(Rule):
    """Step sizes follow the slope of the loss along random signs of their relative changes.

    With r a sign per step size s: (L(s exp(h r)) - L(s exp(-h r))) / 2h is the sum over all of
    them of r dL/dlog s, and times r it is each one's derivative, plus noise of the others. It is
    scaled as LSQ scales its own, so that the clipping of gradients sees the same of both.

    Args:
        training: The run.
        h: How far, relative to the step size.
    """

    def __init__(self, training: Training, h: float) -> None:
        super().__init__(training)
        self._h = h
        self._draws = torch.Generator().manual_seed(training.config.seed)

    def refine(self, closure: Callable[[], Tensor]) -> Sequence[float]:
        """Put the slope in the place of LSQ's own gradient of the step sizes."""
        present = [step.clone() for step in self.steps]
        signs = [
            torch.randint(0, 2, step.shape, generator=self._draws).to(step.dtype) * 2 - 1
            for step in self.steps
        ]
        losses = []
        try:
            for way in (self._h, -self._h):
                for step, old, sign in zip(self.steps, present, signs, strict=True):
                    step.copy_(old * torch.exp(way * sign))
                losses.append(float(closure()))
        finally:
            for step, old in zip(self.steps, present, strict=True):
                step.copy_(old)
        slope = (losses[0] - losses[1]) / (2 * self._h)
        for layer, step, sign in zip(self.layers, self.steps, signs, strict=True):
            quantizer = layer.quantizer
            factor = quantizer.scale.grad_scale(layer.weight.numel(), quantizer.grid)
            step.grad = factor * slope * sign / step
        return losses


class TrustRatio(Rule):
    """Each layer's learning rate is multiplied by its agreement, averaged over time.

    A slow factor of the gradient would cancel in Adam, one of the learning rate does not. One
    layer is measured in every step, along its own gradient. The average begins with one value of
    1, is plain over the first measurements and forgets older ones then.

    Args:
        training: The run.
        memory: Measurements of a layer that the average is over.
    """

    def __init__(self, training: Training, memory: int) -> None:
        super().__init__(training)
        weights = fogzo.quantized_weights(training.model)
        averages = [Average(own_group(training.optimizer, w.param), memory) for w in weights]
        estimators = [fogzo.FogzoEstimator([weight], noise_share=0.0) for weight in weights]
        self._turns = cycle(zip(weights, estimators, averages, strict=True))

    def refine(self, closure: Callable[[], Tensor]) -> Sequence[float]:
        """Measure the next layer; its rate is another from the next step on."""
        weight, estimator, average = next(self._turns)
        assert weight.param.grad is not None
        grad = weight.param.grad.clone()
        stats = estimator.refine_grads_(closure)
        weight.param.grad.copy_(grad)
        if stats.agreement is not None:
            average.add(stats.agreement)
        return stats.probe_losses


class Average:
    """A mean that is a parameter group's rate while it is positive."""

    def __init__(self, group: dict[str, Any], memory: int) -> None:
        self._group, self._memory = group, memory
        self._mean, self._count = 1.0, 1

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self._count = min(self._count + 1, self._memory)
        self._mean += (value - self._mean) / self._count
        self._group["rate_factor"] = max(self._mean, 0.0)


def own_group(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """Move a parameter to a group of its own, as it was but for the rate."""
    [old] = [g for g in optimizer.param_groups if any(p is param for p in g["params"])]
    old["params"] = [p for p in old["params"] if p is not param]
    optimizer.add_param_group({**old, "params": [param], "rate_factor": 1.0})
    return optimizer.param_groups[-1]


RULES: dict[str, tuple[str, Callable[[Training], Rule]]] = {
    "lsq": ("LSQ's own gradient", Rule),
    "kept": ("step sizes as they were measured first", Kept),
    "measured-0.01": ("measured along step sizes, 1% away", lambda t: Measured(t, 0.01)),
    "measured-0.05": ("measured along step sizes, 5% away", lambda t: Measured(t, 0.05)),
    "trust-ratio": ("LSQ, a trust ratio per layer", lambda t: TrustRatio(t, 50)),
}
"""What is compared: what it is, and how it is made for a run."""

Job = tuple[Network, str, float, int]


def run(job: Job) -> dict[str, float]:
    """A training by one rule, at one learning rate, with one seed."""
    network, rule, rate, seed = job
    settings = replace(recipe(network, seed), learning_rate=rate)
    with own_random_streams(seed):
        training = Training(settings, Ranks(torch.device("cpu")))
        # Only the part of an estimator that the loop calls.
        training.estimator = RULES[rule][1](training)  # type: ignore[assignment]
        began = time.process_time()
        for _ in range(network.steps):
            training_step(training, training.next_window())
        seconds = time.process_time() - began
        numbers = training.evaluate()
    kept = ("validation_loss", "train_loss", metric(network).key)
    return {key: float(f"{numbers[key]:.5g}") for key in kept} | {"cpu_seconds": round(seconds, 1)}


def metric(network: Network) -> Any:
    """What a network is judged by."""
    return TEST_PERPLEXITY if network.name == "llama" else TEST_ACCURACY


def main() -> None:
    """Tune, run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(QUICK if options.quick else FULL, options.workers)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(config: Config, workers: int) -> dict[str, Any]:
    """All networks."""
    found = [
        {"name": network.name, "rules": rules_of(network, workers)} for network in config.networks
    ]
    return {"config": asdict(config), "environment": environment(), "networks": found}


def rules_of(network: Network, workers: int) -> list[dict[str, Any]]:
    """Every rule at the learning rate of lowest mean validation loss."""
    tuning = [
        (network, rule, rate, seed)
        for rule in RULES
        for rate in network.rates
        for seed in range(network.tuning_seeds)
    ]
    found: dict[Job, dict[str, float]] = dict(
        zip(tuning, in_parallel(run, tuning, workers), strict=True)
    )
    tried = {rule: tried_rates(network, rule, found) for rule in RULES}
    rates = {rule: min(losses, key=lambda pair: pair[1])[0] for rule, losses in tried.items()}
    rest = [
        (network, rule, rates[rule], seed)
        for rule in RULES
        for seed in range(network.tuning_seeds, network.seeds)
    ]
    found |= zip(rest, in_parallel(run, rest, workers), strict=True)
    return [
        {
            "rule": rule,
            "learning_rate": rates[rule],
            "tried": tried[rule],
            "seeds": [found[network, rule, rates[rule], seed] for seed in range(network.seeds)],
        }
        for rule in RULES
    ]


def tried_rates(
    network: Network, rule: str, found: Mapping[Job, Mapping[str, float]]
) -> list[tuple[float, float]]:
    """Learning rates and their mean validation losses."""
    seeds = range(network.tuning_seeds)
    return [
        (rate, statistics.fmean(found[network, rule, rate, s]["validation_loss"] for s in seeds))
        for rate in network.rates
    ]


def table(results: dict[str, Any]) -> Table:
    """Every rule on both networks, its difference from LSQ, and what its steps cost."""
    networks = [Network(**network) for network in results["config"]["networks"]]
    titles = {"mlp": "MLP", "llama": "LLaMA", "digits": "digits"}
    heading = ["step sizes"]
    rows = {rule: [label] for rule, (label, _) in RULES.items()}
    costs: dict[str, list[str]] = {rule: [] for rule in RULES}
    for network, found in zip(networks, results["networks"], strict=True):
        shown, base = metric(network), found["rules"][0]
        heading += [f"{titles[network.name]}: {shown.heading}", "− LSQ"]
        for row in found["rules"]:
            ours, theirs = ([seed[shown.key] for seed in each["seeds"]] for each in (row, base))
            gap = "" if row is base else shown.called(Interval.paired(ours, theirs))
            rows[row["rule"]] += [shown.spread(Summary.of(ours)), gap]
            own, time = (
                statistics.median(seed["cpu_seconds"] for seed in each["seeds"])
                for each in (row, base)
            )
            costs[row["rule"]].append(f"{own / time:.2f}")
    cells = [[*row, " / ".join(costs[rule])] for rule, row in rows.items()]
    sizes = "; ".join(f"{titles[n.name]}: {n.seeds} seeds, {n.steps} steps" for n in networks)
    caption = (
        f"LSQ at 2 bits; {sizes}. Mean ± standard deviation, differences paired by seed, with 95% "
        "intervals, bold where they exclude zero; each rule at the learning rate of lowest "
        f"validation loss, equal steps. CPU time of both networks. {where(results['environment'])}"
    )
    return Table("", [*heading, "CPU time / LSQ's"], cells, caption)


if __name__ == "__main__":
    main()
