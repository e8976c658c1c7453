"""What a FOGZO step costs, against its floor: an STE step and two forwards without gradient.

    python benchmarks/step_cost.py --output benchmarks/step_cost.json

Each pair of measurements is taken back to back, so that a slow spell of the machine hits both;
the median of the ratios is what counts. Memory is read from torch's own allocator events.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401 -- most programs have it loaded, and its stream costs time
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.recipes.environment import environment


@dataclass(frozen=True)
class Case:
    """A model, its loss on one batch, and how many pairs to time."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    repeats: int


def mlp(name: str, widths: tuple[int, ...], batch: int, repeats: int) -> Case:
    """A multilayer perceptron, all of it quantized."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    fogzo.quantize_(model, fogzo.lsq(bits=2), lambda _, __: True)
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return Case(f"{name}, batch {batch}", model, lambda: cross_entropy(model(x), y), repeats)


def llama(batch: int, length: int, repeats: int) -> Case:
    """A byte-level LLaMA with about a million quantized weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config)
    fogzo.quantize_(model, fogzo.lsq(bits=2))
    tokens = torch.randint(256, (batch, length))
    name = f"LLaMA, {batch} x {length} tokens"
    return Case(name, model, lambda: model(input_ids=tokens, labels=tokens).loss, repeats)


def resnet(batch: int, repeats: int) -> Case:
    """A small ResNet with batch norm on 32 x 32 images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)
    fogzo.quantize_(model, fogzo.lsq(bits=2, granularity="channel"))
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    name = f"ResNet, batch {batch}"
    return Case(name, model, lambda: model(pixel_values=images, labels=labels).loss, repeats)


def measure(case: Case) -> dict[str, Any]:
    """Seconds of both kinds of step, their ratio, and the extra memory of the probes."""
    weights = fogzo.quantized_weights(case.model)
    # So small a learning rate that the model does not change while it is measured.
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-8)
    estimator = fogzo.FogzoEstimator(weights, noise_share=1e-6)

    def backward() -> None:
        optimizer.zero_grad()
        case.loss().backward()

    def forwards() -> None:
        with torch.no_grad():
            case.loss()
            case.loss()

    def floor() -> None:
        backward()
        forwards()
        optimizer.step()

    def fogzo_step() -> None:
        backward()
        estimator.refine_grads_(case.loss)
        optimizer.step()

    def ste_step() -> None:
        backward()
        optimizer.step()

    backward()
    # The first call, so that the copy of the weights is counted.
    refine_peak = peak_bytes(lambda: estimator.refine_grads_(case.loss))
    extra = refine_peak - peak_bytes(forwards)
    for warm_up in (floor, fogzo_step, ste_step):
        warm_up()
    times = [[seconds(step) for step in (floor, fogzo_step, ste_step)] for _ in range(case.repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratios = sorted(row[1] / row[0] for row in times)
    sizes = [weight.param.numel() * weight.param.element_size() for weight in weights]
    return {
        "case": case.name,
        "quantized_weights": sum(weight.param.numel() for weight in weights),
        "floor_ms": 1e3 * medians[0],
        "fogzo_ms": 1e3 * medians[1],
        "ste_ms": 1e3 * medians[2],
        "fogzo_over_floor": statistics.median(ratios),
        "fogzo_over_floor_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "fogzo_over_ste": medians[1] / medians[2],
        "extra_peak_mib": extra / 2**20,
        "weights_mib": sum(sizes) / 2**20,
        "largest_layer_mib": max(sizes) / 2**20,
        "pairs": case.repeats,
    }


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once beyond those at the start, on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def import_seconds(repeats: int = 7) -> float:
    """What ``import fogzo`` takes after ``import torch``, in fresh processes."""
    code = (
        "import torch, time; began = time.perf_counter(); import fogzo;"
        "print(time.perf_counter() - began)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    """Measure every case and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/step_cost.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = [
        mlp("MLP 784-10-10", (784, 10, 10), 128, 1001),
        mlp("MLP 784-1024-256-10", (784, 1024, 256, 10), 128, 101),
        mlp("MLP 784-1024-256-10", (784, 1024, 256, 10), 512, 61),
        llama(8, 128, 31),
        resnet(128, 25),
    ]
    results = []
    for case in cases:
        results.append(measure(case))
        r = results[-1]
        print(
            f"{r['case']:34s} d={r['quantized_weights']:>9,}  FOGZO/floor "
            f"{r['fogzo_over_floor']:.3f}  FOGZO/STE {r['fogzo_over_ste']:.2f}  "
            f"extra {r['extra_peak_mib']:.2f} MiB for {r['weights_mib']:.2f} MiB of weights"
        )
    report = {
        "environment": environment(),
        "threads": arguments.threads,
        "import_seconds": import_seconds(),
        "cases": results,
    }
    print(f"import fogzo after torch: {report['import_seconds']:.3f} s")
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
