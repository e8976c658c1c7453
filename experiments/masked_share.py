"""Does the share of masked weights predict what noise, measured slopes or no mask gain?

    python experiments/masked_share.py [--output-dir FOLDER]

Reads the finished runs that the long comparisons with a fixed step size keep, all learning rates
that they tried: how many weights STE ends with beyond its range, and how far the validation loss of
each other row, at the same rate and with the same seed, is below STE's. Trains nothing.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from fogzo_lab.comparison.intervals import Summary
from fogzo_lab.comparison.plots import STYLES
from fogzo_lab.comparison.rows import ROWS
from fogzo_lab.figures import drawing
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.run_folder import read_metrics

EXPERIMENTS = Path(__file__).parent
FOLDER = EXPERIMENTS / "masked-share"
NETWORKS = {
    "LLaMA": ("long-llama-identity", "o"),
    "LLaMA, tanh": ("long-llama-tanh", "D"),
    "DeiT": ("long-deit-identity", "s"),
    "DeiT, tanh": ("long-deit-tanh", "P"),
    "ResNet-18": ("long-resnet-identity", "^"),
    "ResNet-18, tanh": ("long-resnet-tanh", "v"),
}
"""By name: the folder, and the marker of a plot."""
OTHERS = ("placebo", "fogzo", "ste-unmasked")
# Runs are known by their folders' names, as their hashes need the data, which a clone lacks.
_NAME = re.compile(
    r"(?P<row>[a-z-]+)-lr(?P<rate>[\d.]+(e-\d+)?)(-kappa[\d.]+)?"
    r"-steps(?P<steps>\d+)-seed(?P<seed>\d+)-"
)


class Point(NamedTuple):
    """Where gains are compared: everything but the row is the same."""

    network: str
    learning_rate: float
    seed: int


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = collect()
    write_text(folder / "results.json", dumps(results, indent=1) + "\n")
    plot(results, folder / "gains.svg")


def collect() -> dict[str, Any]:
    """The masked share of every STE run, the gains of the others, and their rank correlations."""
    masked, losses = {}, {row: {} for row in ("ste", *OTHERS)}
    for name, (folder, _) in NETWORKS.items():
        for named, path in kept_runs(folder):
            if named["row"] not in losses:
                continue
            result = read(path / "result.json")
            if result.get("diverged"):
                continue
            point = Point(name, float(named["rate"]), int(named["seed"]))
            if point in losses[named["row"]]:
                raise ValueError(f"{path} is a second run of {named['row']} at {point}: keep one")
            losses[named["row"]][point] = result["validation_loss"]
            if named["row"] == "ste":
                lines = read_metrics(path / "metrics.jsonl")
                masked[point] = [line["masked"] for line in lines if "masked" in line][-1]
    points = [
        {
            **point._asdict(),
            "masked": round(masked[point], 4),
            "gains": {
                row: round(losses["ste"][point] - losses[row][point], 5)
                for row in OTHERS
                if point in losses[row]
            },
        }
        for point in sorted(masked)
    ]
    return {"points": points, "correlations": correlations(points)}


def kept_runs(folder: str) -> Iterator[tuple[re.Match[str], Path]]:
    """The runs that a comparison keeps, with what their names say, less those at equal time."""
    steps = read(EXPERIMENTS / folder / "config.json")["base"]["max_steps"]
    for path in sorted((EXPERIMENTS / folder / "runs").iterdir()):
        named = _NAME.match(path.name)
        if named is not None and int(named["steps"]) == steps:
            yield named, path


def read(path: Path) -> dict[str, Any]:
    """What a file of JSON holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def correlations(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Spearman's, of the gain with the masked share, by row; of means over seeds."""
    found = {}
    for row in OTHERS:
        means = [(share, gains[row].mean) for _, share, gains in at_rates(points) if row in gains]
        if len(means) > 2:
            test = spearmanr(*zip(*means, strict=True))
            found[row] = {
                "rank_correlation": round(float(test.statistic), 3),
                "p": float(f"{test.pvalue:.2g}"),  # decimals would make a small one 0
                "points": len(means),
            }
    return found


def at_rates(
    points: Sequence[dict[str, Any]],
) -> Iterator[tuple[tuple[str, float], float, dict[str, Summary]]]:
    """Networks with learning rates, and their masked shares and gains over seeds."""
    keys = dict.fromkeys((point["network"], point["learning_rate"]) for point in points)
    for key in keys:
        own = [p for p in points if (p["network"], p["learning_rate"]) == key]
        gains = {
            row: Summary.of([p["gains"][row] for p in own if row in p["gains"]])
            for row in OTHERS
            if any(row in p["gains"] for p in own)
        }
        yield key, Summary.of([p["masked"] for p in own]).mean, gains


def table(results: dict[str, Any]) -> Table:
    """Every learning rate of every network."""
    heading = ["network", "learning rate", "masked at STE's end"]
    heading += [f"{ROWS[row].label}, gain (nats)" for row in OTHERS]
    cells = [
        [network, f"{rate:g}", f"{share:.0%}"]
        + [
            f"{gains[row].mean:+.3f} ± {gains[row].sd:.3f}" if row in gains else ""
            for row in OTHERS
        ]
        for (network, rate), share, gains in at_rates(results["points"])
    ]
    ranks = ", ".join(
        f"{ROWS[row].label} {found['rank_correlation']:.2f} (p = {found['p']:.2g})"
        for row, found in results["correlations"].items()
    )
    caption = (
        "Gain: how far the validation loss is below STE's at the same learning rate, mean ± "
        "standard deviation over the seeds that both were trained with. Rank correlation with "
        f"the masked share over all lines: {ranks}."
    )
    return Table("", heading, cells, caption)


def plot(results: dict[str, Any], path: Path) -> None:
    """A mark per network, learning rate and seed."""
    with drawing(path, (7.5, 3.0)) as figure:
        all_axes = figure.subplots(1, len(OTHERS), sharey=True)
        for axes, row in zip(all_axes, OTHERS, strict=True):
            for network, (_, marker) in NETWORKS.items():
                own = [
                    p for p in results["points"] if p["network"] == network and row in p["gains"]
                ]
                axes.plot(
                    [p["masked"] for p in own],
                    [p["gains"][row] for p in own],
                    color=STYLES[row][0],
                    marker=marker,
                    markersize=4,
                    linestyle="none",
                    label=network,
                )
            axes.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            axes.set(xlabel="share masked at STE's end", title=ROWS[row].label, xlim=(0, 1))
        all_axes[0].set_ylabel("validation loss below STE's (nats)")
        all_axes[0].legend(frameon=False)


if __name__ == "__main__":
    main()
