"""Train the recipes with embedded data as they are shipped, beside baselines that learn nothing.

    python experiments/embedded.py [--workers 2]

Every run keeps its recipe's settings; nothing is tuned for either estimator, so this shows that
both learn and does not compare them. An interrupted run is resumed. Writes
experiments/embedded/results.json.
"""

import argparse
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fogzo_lab.comparison.intervals import Summary
from fogzo_lab.comparison.tables import where
from fogzo_lab.data.config import TextConfig
from fogzo_lab.data.images import load_images
from fogzo_lab.data.text import TextSplit, load_text, unigram_loss
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.loop import train

FOLDER = Path(__file__).parent / "embedded"
SETTINGS: dict[str, dict[str, Any]] = {
    "STE": {"estimator": "ste"},
    "FOGZO": {"estimator": "fogzo"},
    "FOGZO, isotropic noise, kappa 1e-6": {
        "agreement": "measured",
        "noise_shape": "isotropic",
        "kappa": 1e-6,
    },
}
ROWS = [
    *(
        (name, row)
        for name in ("digits-resnet", "digits-deit", "pydoc-llama")
        for row in ("STE", "FOGZO")
    ),
    ("digits-deit", "FOGZO, isotropic noise, kappa 1e-6"),
]
SEEDS = (0, 1, 2)
KEPT = ("test_loss", "test_accuracy", "train_loss")


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    jobs = [(*row, seed) for row in ROWS for seed in SEEDS]
    with ProcessPoolExecutor(
        parser.parse_args().workers, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        outcomes = dict(zip(jobs, pool.map(run, jobs), strict=True))
    rows = [summarise(*row, [outcomes[*row, seed] for seed in SEEDS]) for row in ROWS]
    results = {
        "environment": environment(),
        "baselines": {name: baseline(name) for name, _ in ROWS},
        "rows": rows,
    }
    write_text(FOLDER / "results.json", dumps(results, indent=1) + "\n")


def run(job: tuple[str, str, int]) -> dict[str, Any]:
    """One training run, or what is left of it."""
    name, row, seed = job
    label = re.sub(r"\W+", "-", row.lower())
    folder = FOLDER / "runs" / f"{name}-{label}-{seed}"
    config = replace(RECIPES[name](), seed=seed, output_dir=folder, resume=True)
    return train(replace(config, **SETTINGS[row]))


def summarise(name: str, label: str, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and single values over seeds."""
    row: dict[str, Any] = {"recipe": name, "row": label, "seeds": len(outcomes)}
    for key in ("steps", "extra_forwards"):
        row[key] = outcomes[0][key]
    for key in KEPT:
        values = [outcome[key] for outcome in outcomes]
        row[key] = {**vars(Summary.of(values)), "values": values}
    return row


def baseline(name: str) -> dict[str, float]:
    """Uniform loss, unigram loss and majority-class accuracy on the test split."""
    data = RECIPES[name]().data
    if isinstance(data, TextConfig):
        text = load_text(data)
        assert isinstance(text.train, TextSplit)
        commonest = text.train.tokens.long().bincount().argmax()
        return {
            "uniform_loss": math.log(text.vocab_size),
            "frequency_loss": unigram_loss(text),
            "frequency_accuracy": float((text.test.tokens == commonest).double().mean()),
        }
    images = load_images(data)
    train_labels = images.train.batch(torch.arange(len(images.train)))[1]
    labels = images.test.batch(torch.arange(len(images.test)))[1]
    counts = torch.bincount(train_labels, minlength=images.num_classes).double()
    shares = counts / counts.sum()
    return {
        "uniform_loss": math.log(images.num_classes),
        "frequency_loss": float(-shares[labels].log().mean()),
        "frequency_accuracy": float((labels == counts.argmax()).double().mean()),
    }


def table(results: dict[str, Any]) -> Table:
    """What the recipes reach beside the baselines, for docs/results.md."""
    heading = ("recipe", "gradient", "test loss (nats)", "test accuracy %")
    heading += ("uniform / unigram loss", "majority-class accuracy %")
    rows = []
    for row in results["rows"]:
        known = results["baselines"][row["recipe"]]
        loss, accuracy = row["test_loss"], row["test_accuracy"]
        rows.append(
            [
                f"`{row['recipe']}`",
                row["row"],
                f"{loss['mean']:.3f} ± {loss['sd']:.3f}",
                f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}",
                f"{known['uniform_loss']:.3f} / {known['frequency_loss']:.3f}",
                f"{100 * known['frequency_accuracy']:.1f}",
            ]
        )
    seeds = results["rows"][0]["seeds"]
    facts = results["environment"]
    caption = (
        f"Mean ± standard deviation over {seeds} seeds. Python {facts['python']}, {where(facts)}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
