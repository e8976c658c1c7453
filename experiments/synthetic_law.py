"""Mean and variance of every estimator on a linear loss, beside the formulas derived for them.

    python experiments/synthetic_law.py [--quick] [--output-dir FOLDER]

On a linear loss of slope D (per radius of each weight) all formulas are exact, so any distance
beyond the Monte Carlo error is a mistake in the estimator or in the formula. With first-order
gradient g of norm N and direction ghat, c = ghat . D, q the noise share, beta = 1 - q, w the
control variate's weight, d weights, n samples and kappa4 the kurtosis of the noise:

    estimator        mean                     trace of the covariance
    FOGZO            beta c ghat + q D        (beta q [(d+2) c^2 + |D|^2] + q^2 k |D|^2) / n
    FOGZO, paired    beta c ghat + q D        q^2 k |D|^2 / n
    control variate  g + w (D - g)            w^2 k |D - g|^2 / n
    placebo          g                        N^2 q d / n
    n-SPSA           D                        k |D|^2 / n

with k = d + kappa4 - 2. Writes results.json and variance.svg.
"""

import argparse
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import fogzo
from fogzo.probing.directions import Direction, Directions
from fogzo.quantizers import resolve_surrogate, uniform
from fogzo_lab.comparison.tables import where
from fogzo_lab.figures import drawing
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "synthetic-law"
ALLOWED_ERRORS = 4.0
"""Standard errors within which a measurement agrees. Of four hundred independent normal ones, some
would lie beyond in one run of forty."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        weights: d of each sweep; 10000 is drawn by the generator's packed path.
        samples: n of the sweep over samples.
        shares: q of FOGZO and the placebo, w of the control variate.
        repeats: Monte Carlo repeats of a point with one sample.
        step_sizes: The weights are two tensors with these step sizes.
        cosine: Between the first-order gradient and the loss's slope.
        guide_norm: N, where |D| = 1.
        seed: Of the gradients, and of the first point's directions; the next one's is one more.
    """

    weights: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10000)
    samples: tuple[int, ...] = (1, 2, 4, 16)
    shares: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.99)
    repeats: int = 12_000
    step_sizes: tuple[float, float] = (0.05, 0.4)
    cosine: float = 0.6
    guide_norm: float = 1.5
    seed: int = 0


QUICK = Config(weights=(10, 100), samples=(1, 2), shares=(0.01, 0.5), repeats=20)


@dataclass(frozen=True)
class Case:
    """One point: an estimator and its settings."""

    estimator: str
    weights: int
    samples: int
    share: float
    law: str = "identity"


@dataclass(frozen=True)
class Law:
    """What the formulas say, along the guide, along the rest of the loss's slope, and in all."""

    mean_along_guide: float
    mean_along_rest: float
    variance: float


class PairedFogzo(fogzo.FogzoEstimator):
    """Both signs of the guide for each u: the noise that says nothing about the loss cancels."""

    def plan(self, noise_share: float, directions: Directions) -> list[Direction]:
        """Two directions per sample."""
        plan = super().plan(noise_share, directions)
        return [v._replace(guide=sign * v.guide) for v in plan for sign in (1, -1)]


LITERAL: dict[str, Any] = {"agreement": "measured", "noise_shape": "isotropic"}
MAKERS: dict[str, Callable[..., Any]] = {
    "fogzo": partial(fogzo.FogzoEstimator, **LITERAL),
    "fogzo-paired": partial(PairedFogzo, **LITERAL),
    "control-variate": lambda weights, noise_share, **options: fogzo.ControlVariateEstimator(
        weights, weight=noise_share, **options
    ),
    "placebo": partial(fogzo.PlaceboEstimator, noise_shape="isotropic"),
    "spsa": lambda weights, noise_share, **options: fogzo.SpsaEstimator(weights, **options),
}


def main() -> None:
    """Measure every point and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few points and repeats")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Shares that drown the gradient are meant here; the library would say so each time.
    logging.getLogger("fogzo").setLevel(logging.ERROR)

    config = QUICK if arguments.quick else Config()
    # Each point draws directions of its own, so that their errors are independent.
    seeds = itertools.count(config.seed)
    points = [measure(case, config, seed) for case, seed in zip(cases(config), seeds, strict=False)]
    results = {
        "environment": environment(),
        "config": asdict(config),
        "points": points,
        "summary": summary(points),
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output_dir / "results.json", dumps(results, indent=1) + "\n")
    plot(results, arguments.output_dir / "variance.svg")


def cases(config: Config) -> list[Case]:
    """Sweeps over q, d and n around a middle point, each point once, and other laws of noise."""
    middle = config.weights[len(config.weights) // 2]
    share = config.shares[len(config.shares) // 2 - 1]
    found = []
    for name in MAKERS:
        shares = (1.0,) if name == "spsa" else config.shares
        own = 1.0 if name == "spsa" else share
        found += [Case(name, d, 1, q) for q in shares for d in (config.weights[0], middle)]
        found += [Case(name, d, 1, own) for d in config.weights]
        found += [Case(name, middle, n, own) for n in config.samples]
    # The kurtosis counts only where weights are few.
    few = config.weights[0]
    found += [Case("spsa", few, 1, 1.0, law) for law in ("identity", "erf", "tanh")]
    found += [Case("fogzo", few, 1, config.shares[-1], law) for law in ("erf", "tanh")]
    return list(dict.fromkeys(found))


def measure(case: Case, config: Config, seed: int) -> dict[str, Any]:
    """One point: measured over formula, with standard errors."""
    surrogate = resolve_surrogate(case.law, uniform(2))
    generator = torch.Generator().manual_seed(config.seed)
    frame = torch.randn(case.weights, 3, generator=generator, dtype=torch.float64)
    guide, rest, other = torch.linalg.qr(frame)[0].unbind(1)
    slope = config.cosine * guide + math.sqrt(1 - config.cosine**2) * rest
    gradient = config.guide_norm * guide

    split = case.weights // 2
    sizes = (split, case.weights - split)
    params = [nn.Parameter(torch.zeros(size)) for size in sizes]
    weights = [
        fogzo.QuantizedWeight(f"w{i}", param, lambda s=step: torch.tensor(s), surrogate)
        for i, (param, step) in enumerate(zip(params, config.step_sizes, strict=True))
    ]
    eps = torch.cat(
        [
            torch.full((size,), step * surrogate.radius, dtype=torch.float64)
            for size, step in zip(sizes, config.step_sizes, strict=True)
        ]
    )
    first, second = (slope / eps).float().split(sizes)
    grads = (gradient / eps).float().split(sizes)

    def loss() -> Tensor:
        return torch.dot(first, params[0]) + torch.dot(second, params[1])

    estimator = MAKERS[case.estimator](
        weights, num_samples=case.samples, noise_share=case.share, seed=seed
    )
    law = formula(case, config, surrogate.perturbation.kurtosis)
    mean = law.mean_along_guide * guide + law.mean_along_rest * rest
    # For errors of the same size: averages over samples vary less, heavy-tailed noise more.
    repeats = max(config.repeats // 4, config.repeats // case.samples)
    repeats *= 1 if case.law == "identity" else 4
    deviations = torch.empty(repeats, 4, dtype=torch.float64)
    axes = torch.stack([guide, rest, other])
    for repeat in range(repeats):  # every call draws new directions
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        estimator.refine_grads_(loss)
        refined = torch.cat([params[0].grad, params[1].grad]) * eps
        refined -= mean
        torch.mv(axes, refined, out=deviations[repeat, :3])
        deviations[repeat, 3] = refined.dot(refined)

    found = deviations.mean(0).tolist()
    errors = (deviations.std(0) / math.sqrt(repeats)).tolist()
    return {
        **asdict(case),
        "seed": seed,
        "repeats": repeats,
        "variance": compared(found[3] - law.variance, errors[3], law.variance),
        "mean_along_guide": compared(found[0], errors[0], law.mean_along_guide),
        "mean_along_rest": compared(found[1], errors[1], law.mean_along_rest),
        "mean_elsewhere": compared(found[2], errors[2], 0.0),
    }


def formula(case: Case, config: Config, kurtosis: float) -> Law:
    """The mean and the trace of the covariance, by the table above, with |D| = 1."""
    d, n, q = case.weights, case.samples, case.share
    k, norm, c = d + kurtosis - 2, config.guide_norm, config.cosine
    across = math.sqrt(1 - c * c)
    match case.estimator:
        case "fogzo":
            variance = (1 - q) * q * ((d + 2) * c * c + 1) + q * q * k
            return Law(c, q * across, variance / n)
        case "fogzo-paired":
            return Law(c, q * across, q * q * k / n)
        case "control-variate":
            gap = 1 - 2 * c * norm + norm * norm
            return Law(norm + q * (c - norm), q * across, q * q * k * gap / n)
        case "placebo":
            return Law(norm, 0.0, norm * norm * q * d / n)
        case "spsa":
            return Law(c, across, k / n)
        case _:
            raise ValueError(f"no formula for {case.estimator!r}")


def compared(deviation: float, error: float, expected: float) -> dict[str, float | None]:
    """A measurement beside its formula, as a ratio and in standard errors of distance."""
    return {
        "formula": expected,
        "ratio": 1 + deviation / expected if expected else None,
        "ratio_error": error / abs(expected) if expected else None,
        "errors_away": deviation / error,
    }


LABELS = {
    "fogzo": "FOGZO",
    "fogzo-paired": "FOGZO, paired",
    "control-variate": "control variate",
    "placebo": "placebo",
    "spsa": "n-SPSA",
}
FORMULAS = {
    "fogzo": ("β c ĝ + q D", "(β q [(d+2) c² + D²] + q² k D²) / n"),
    "fogzo-paired": ("β c ĝ + q D", "q² k D² / n"),
    "control-variate": ("g + w (D − g)", "w² k (D − g)² / n"),
    "placebo": ("g", "N² q d / n"),
    "spsa": ("D", "k D² / n"),
}
"""Mean and trace of the covariance, for people."""
KINDS = ("variance", "mean_along_guide", "mean_along_rest", "mean_elsewhere")


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """How many measurements agree, and how closely they could have told."""
    distances = [abs(point[kind]["errors_away"]) for point in points for kind in KINDS]
    by_estimator = {}
    for name, count in Counter(point["estimator"] for point in points).items():
        own = [point for point in points if point["estimator"] == name]
        off = [abs(point[kind]["errors_away"]) for point in own for kind in KINDS]
        ratios = [point["variance"]["ratio"] for point in own]
        by_estimator[name] = {
            "points": count,
            "measurements": len(off),
            "within": sum(distance <= ALLOWED_ERRORS for distance in off),
            "largest_distance": max(off),
            "variance_ratio": [min(ratios), max(ratios)],
            "largest_variance_ratio_error": max(p["variance"]["ratio_error"] for p in own),
        }
    return {
        "allowed_errors": ALLOWED_ERRORS,
        "measurements": len(distances),
        "within": sum(distance <= ALLOWED_ERRORS for distance in distances),
        "within_2": sum(distance <= 2 for distance in distances),
        "largest_distance": max(distances),
        "by_estimator": by_estimator,
    }


def table(results: dict[str, Any]) -> Table:
    """Every estimator beside its formulas, for docs/results.md."""
    heading = ("gradient", "mean", "trace of its covariance", "points")
    heading += ("measured / formula", "its largest standard error")
    rows = []
    for name, entry in results["summary"]["by_estimator"].items():
        low, high = entry["variance_ratio"]
        rows.append(
            [
                LABELS[name],
                *FORMULAS[name],
                str(entry["points"]),
                f"{low:.3f} to {high:.3f}",
                f"{entry['largest_variance_ratio_error']:.3f}",
            ]
        )
    found, config = results["summary"], results["config"]
    caption = (
        f"On a linear loss of slope D, with STE gradient g = N ĝ, c = ĝ·D, k = d + κ₄ − 2; d from "
        f"{min(config['weights'])} to {max(config['weights'])}, n from {min(config['samples'])} to "
        f"{max(config['samples'])}, q from {min(config['shares']):g} to 1. "
        f"{found['within_2']} of {found['measurements']} means and variances lie within 2 standard "
        f"errors of their formula, {found['within']} within {found['allowed_errors']:g}. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


MARKS = {
    "fogzo": "o",
    "fogzo-paired": "s",
    "control-variate": "^",
    "placebo": "x",
    "spsa": "D",
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Variances beside their formulas, and the ratios of all points."""
    with drawing(path, (8.2, 3.4)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        draw_variances(left, results)
        draw_ratios(right, results)


def draw_variances(axes: Axes, results: dict[str, Any]) -> None:
    """Trace of the covariance against the share of noise, markers on the formula's lines."""
    middle = results["config"]["weights"][len(results["config"]["weights"]) // 2]
    for name, mark in MARKS.items():
        points = sorted(
            (point["share"], point["variance"]["formula"], point["variance"]["ratio"])
            for point in results["points"]
            if (point["estimator"], point["weights"], point["samples"]) == (name, middle, 1)
        )
        shares = [share for share, _, _ in points]
        axes.plot(shares, [value for _, value, _ in points], color="0.6", linewidth=0.8)
        measured = [value * ratio for _, value, ratio in points]
        style = {"color": "black", "markersize": 4, "linestyle": "", "fillstyle": "none"}
        axes.plot(shares, measured, marker=mark, label=LABELS[name], **style)
    axes.set(xscale="log", yscale="log", xlabel="share of noise q (weight w)")
    axes.set(ylabel="trace of the covariance / |D|²", title=f"{middle} weights: lines are formulas")
    axes.legend(frameon=False, fontsize=7)


def draw_ratios(axes: Axes, results: dict[str, Any]) -> None:
    """Measured over formula of every point, with two standard errors."""
    start = 0
    for name, mark in MARKS.items():
        ratios = [p["variance"] for p in results["points"] if p["estimator"] == name]
        axes.errorbar(
            range(start, start + len(ratios)),
            [entry["ratio"] for entry in ratios],
            [2 * entry["ratio_error"] for entry in ratios],
            color="black",
            marker=mark,
            markersize=3.5,
            fillstyle="none",
            linestyle="",
            linewidth=0.7,
            label=LABELS[name],
        )
        start += len(ratios) + 2
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set(ylabel="measured variance / formula", xticks=[], title="all points, ± 2 errors")
    axes.set(xlabel="points, by estimator")


if __name__ == "__main__":
    main()
