"""What evaluating many probes at once gains over the loop: n-SPSA and FOGZO on a small network.

    python benchmarks/many_probes.py --output benchmarks/many_probes.json

Loop and stacks take turns, so that a slow spell of the machine hits both; the median of the ratios
is what counts. Times are CPU times of one thread, which other programs on the machine disturb less
than wall times; the ratio of those is recorded too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401 -- most programs have it loaded, and its stream costs time
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.recipes.environment import environment

ESTIMATORS = {
    "n-SPSA": fogzo.SpsaEstimator,
    "FOGZO": lambda weights, **options: fogzo.FogzoEstimator(weights, noise_share=0.01, **options),
}


def measure(name: str, batch: int, n: int, at_once: int | str, repeats: int) -> dict[str, Any]:
    """Seconds of a refined gradient of 2n losses on the MLP 784-10-10, both ways."""
    model = nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))
    fogzo.quantize_(model, fogzo.lsq(bits=2), lambda *_: True)
    x, y = torch.randn(batch, 784), torch.randint(10, (batch,))
    weights = fogzo.quantized_weights(model)

    def loss() -> torch.Tensor:
        return cross_entropy(model(x), y)

    loss().backward()
    grads = [weight.param.grad.clone() for weight in weights if weight.param.grad is not None]
    estimators = [ESTIMATORS[name](weights, num_samples=n, probes_at_once=k) for k in (1, at_once)]
    losses: list[tuple[float, ...]] = []

    def refine(estimator: Any) -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.param.grad = grad.clone()
        losses.append(estimator.refine_grads_(loss).probe_losses)

    for estimator in estimators:
        refine(estimator)  # warm-up, and the same step of both
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    times = [[seconds(lambda e=e: refine(e)) for e in estimators] for _ in range(repeats)]
    loop, stacked = (
        statistics.median(cpu for _, cpu in column) for column in zip(*times, strict=True)
    )
    wall, ratios = (sorted(a[i] / b[i] for a, b in times) for i in range(2))
    return {
        "estimator": name,
        "batch": batch,
        "n": n,
        "probes_at_once": at_once,
        "loop_ms": 1e3 * loop,
        "stacked_ms": 1e3 * stacked,
        "loop_forwards_per_second": 2 * n / loop,
        "stacked_forwards_per_second": 2 * n / stacked,
        "speedup": statistics.median(ratios),
        "speedup_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "speedup_range": [ratios[0], ratios[-1]],
        "wall_speedup": statistics.median(wall),
        "wall_speedup_quartiles": [wall[len(wall) // 4], wall[3 * len(wall) // 4]],
        "largest_difference_of_losses": difference,
        "pairs": repeats,
    }


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall time and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure every case and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/many_probes.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [
        *(("n-SPSA", 128, n, "auto") for n in (10, 100, 1000)),
        *(("FOGZO", 128, n, "auto") for n in (10, 100, 1000)),
        *(("n-SPSA", 16, n, "auto") for n in (10, 100, 1000)),
        *(("n-SPSA", 128, 1000, k) for k in (8, 16, 32, 128, 256)),
    ]
    load = os.getloadavg()[0]
    results = []
    for name, batch, n, at_once in cases:
        results.append(measure(name, batch, n, at_once, repeats={10: 101, 100: 31, 1000: 11}[n]))
        r = results[-1]
        low, high = r["speedup_quartiles"]
        print(
            f"{name:7s} batch {batch:3d} n={n:4d} at once {at_once!s:4s}  {r['loop_ms']:7.1f} -> "
            f"{r['stacked_ms']:7.1f} ms CPU  {r['stacked_forwards_per_second']:6.0f} forwards/s  "
            f"{r['speedup']:.2f}x ({low:.2f} to {high:.2f}), wall {r['wall_speedup']:.2f}x"
        )
    report = {
        "environment": environment(),
        "threads": 1,
        "load_average": [load, os.getloadavg()[0]],
        "clock": "CPU time of the process",
        "cases": results,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
