"""Make finished quantized networks forget: `fogzo.methods.forget_` beside what else one could do.

    python experiments/forgetting.py [--quick] [--output-dir FOLDER] [--workers 2]

Two tasks, each a classification with a few training examples that should not have been learned:

- a small synthetic knowledge graph: facts follow from a hidden model of low rank, canaries do not;
  a ComplEx model (Trouillon et al., arXiv 1606.06357) with 4-bit or 2-bit embeddings answers who
  stands in a relation to a given entity, scored by the filtered mean reciprocal rank;
- digits of scikit-learn with wrong labels for a few, a 2-bit perceptron, scored by its accuracy.

Beside the scores on examples to keep, on new ones and on those to forget, an attack: how well does
the loss tell forgotten examples from as many that were never seen, but drawn the same way (area
under the ROC curve; one half is chance). The target of `forget_` is the loss of still others.

NegGrad+ (ascent on what is to be forgotten, descent on the rest) stops as soon as it is at the same
target; its learning rate and weight are chosen on seeds of their own, by the score on what is kept.
Other rows have nothing tuned. Writes results.json.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from forgetting_problems import PROBLEMS, Examples, Problem, Task
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.methods import forget_
from fogzo.methods.forgetting import shortest
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.tables import where
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "forgetting"


DIGITS = Task(
    name="digits", bits=2, learning_rate=0.01, batch_size=64, keep_batch=8, steps=2000, dims=64
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run.

    Attributes:
        tasks: Each with all rows.
        neggrad_rates: Learning rates to choose from, of Adam.
        neggrad_weights: Of the loss to forget, to choose from.
        neggrad_steps: At most.
        directions: Pairs of forward passes that a direction is estimated from, for its cosine with
            the first-order gradient.
        tuning_seeds: Of runs that choose.
        seeds: Of runs that are reported.
    """

    tasks: tuple[Task, ...] = (Task(name="graph", bits=4), Task(name="graph", bits=2), DIGITS)
    neggrad_rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    neggrad_weights: tuple[float, ...] = (0.03, 0.1, 0.3)
    neggrad_steps: int = 200
    directions: tuple[int, ...] = (1, 100, 1000)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(6))


SMALL = Task(
    name="graph", bits=4, forgotten=20, steps=40, keep_steps=3, entities=50, relations=3, dims=16
)
QUICK = Config(
    tasks=(SMALL,),
    neggrad_rates=(0.003,),
    neggrad_weights=(0.1,),
    neggrad_steps=3,
    directions=(1, 10),
    tuning_seeds=(100,),
    seeds=(0, 1),
)


def loss_of(model: nn.Module, examples: Examples) -> Tensor:
    """Cross-entropy, nats."""
    return cross_entropy(model(examples.x), examples.y)


def train(model: nn.Module, data: Examples, steps: int, rate: float, batch: int, seed: int) -> None:
    """Train in place by Adam with a cosine schedule."""
    generator = Generator().manual_seed(2000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(data.y), (batch,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, data.pick(index)).backward()
        optimizer.step()
        schedule.step()


def trained(task: Task, problem: Problem, data: Examples, seed: int) -> nn.Module:
    """A new quantized network, trained on these examples."""
    model = fogzo.quantize_(problem.network(), fogzo.lsq(task.bits), lambda module, name: True)
    train(model, data, task.steps, task.learning_rate, task.batch_size, seed)
    return model.eval()


def neggrad(
    model: nn.Module, task: Task, problem: Problem, target: float, rate: float, weight: float,
    steps: int, seed: int,
) -> int:  # fmt: skip
    """Descend on what is kept and ascend on the rest, up to the target; how many steps it took."""
    generator = Generator().manual_seed(3000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        forget = loss_of(model, problem.forget)
        if forget.item() >= target:
            return step
        index = torch.randint(len(problem.keep.y), (task.batch_size,), generator=generator)
        optimizer.zero_grad()
        (loss_of(model, problem.keep.pick(index)) - weight * forget).backward()
        optimizer.step()
    return steps


@torch.no_grad()
def random_move(model: nn.Module, share: float, seed: int) -> None:
    """Move all weights in a random direction, until this share of the codes has changed."""
    generator = Generator().manual_seed(4000 + seed)
    weights = fogzo.quantized_weights(model)
    starts = [(w, w.param.clone(), w.codes()) for w in weights]
    noises = [w.step_size() * torch.randn(w.param.shape, generator=generator) for w in weights]

    def changed_at(length: float) -> float:
        changes = []
        for (weight, start, codes), noise in zip(starts, noises, strict=True):
            weight.param.copy_(start + length * noise)
            changes.append((weight.codes() != codes).flatten())
        return torch.cat(changes).double().mean().item()

    length, _, _ = shortest(changed_at, share)
    changed_at(length)


def attack(model: nn.Module, members: Examples, others: Examples) -> float:
    """Area under the ROC curve of the loss as a sign of membership: one half is chance."""
    with torch.no_grad():
        a, b = (cross_entropy(model(e.x), e.y, reduction="none") for e in (members, others))
    return ((a[:, None] < b).double() + (a[:, None] == b).double() / 2).mean().item()


def measured(model: nn.Module, problem: Problem, gradients: int) -> dict[str, float]:
    """All scores of a network, and how many batches were differentiated to make it."""
    found = {name: problem.score(model, getattr(problem, name)) for name in SCORES[:3]}
    return found | {"auc": attack(model, problem.forget, problem.attack), "gradients": gradients}


def cosines(model: nn.Module, problem: Problem, counts: Sequence[int]) -> dict[str, float]:
    """Of SPSA's directions with the first-order gradient of the loss to forget, in radii."""
    weights = fogzo.quantized_weights(model)

    def in_radii() -> Tensor:
        grads = [w.param.grad * w.step_size() * w.surrogate.radius for w in weights]
        return torch.cat([grad.detach().flatten() for grad in grads])

    loss = lambda: loss_of(model, problem.forget)  # noqa: E731
    found = {}
    loss().backward()
    first_order = in_radii()
    for count in counts:
        fogzo.SpsaEstimator(weights, num_samples=count).refine_grads_(loss)
        found[str(count)] = torch.cosine_similarity(in_radii(), first_order, dim=0).item()
    model.zero_grad()
    return found


SCORES = ("keep", "test", "forget", "auc")
ROWS = {
    "original": "as trained",
    "retrained": "trained without them",
    "forget": "`forget_`",
    "forget-keep": "`forget_`, keep steps",
    "no-fisher": "`forget_` without Fisher",
    "no-fisher-keep": "the same, keep steps",
    "neggrad": "NegGrad+",
    "neggrad-keep": "NegGrad+, keep steps",
    "keep": "keep steps alone",
    "keep-8": "eight times as many",
    "random": "random, as many codes changed",
    "random-keep": "the same, keep steps",
}


def run(job: tuple[Task, int, float, float, Config]) -> dict[str, Any]:
    """All rows of a task on one seed, NegGrad+ with these settings."""
    task, seed, rate, weight, config = job
    problem = PROBLEMS[task.name](task, seed)
    everything = Examples(*map(torch.cat, zip(problem.keep, problem.forget, strict=True)))
    original = trained(task, problem, everything, seed)
    target = loss_of(original, problem.unseen).item()
    models = {"original": original, "retrained": trained(task, problem, problem.keep, seed)}
    gradients = {"original": task.steps, "retrained": task.steps}
    reports: dict[str, Any] = {}
    found = cosines(original, problem, config.directions)

    def edited(name: str, edit: Callable[[nn.Module], int]) -> None:
        models[name] = deepcopy(original)
        gradients[name] = edit(models[name])
        models[f"{name}-keep"] = deepcopy(models[name])
        gradients[f"{name}-keep"] = gradients[name] + keep_steps(models[f"{name}-keep"])

    def keep_steps(model: nn.Module, times: int = 1) -> int:
        count = times * task.keep_steps
        rate = task.learning_rate / 10
        train(model, problem.keep, count, rate, task.batch_size, 5000 + seed)
        return count

    def forget(name: str, damping: float) -> Callable[[nn.Module], int]:
        def edit(model: nn.Module) -> int:
            batches = problem.keep.split(task.keep_batch)
            keep = [lambda batch=batch: loss_of(model, batch) for batch in batches]
            loss = lambda: loss_of(model, problem.forget)  # noqa: E731
            report = forget_(model, loss, keep, target=target, damping=damping)
            reports[name] = asdict(report)
            return 1 + len(batches)

        return edit

    def ascend(model: nn.Module) -> int:
        return 2 * neggrad(model, task, problem, target, rate, weight, config.neggrad_steps, seed)

    def at_random(model: nn.Module) -> int:
        random_move(model, reports["forget"]["flipped"], seed)
        return 0

    edited("forget", forget("forget", 0.1))
    edited("no-fisher", forget("no-fisher", 1e9))
    edited("neggrad", ascend)
    edited("random", at_random)
    for name, times in (("keep", 1), ("keep-8", 8)):
        models[name] = deepcopy(original)
        gradients[name] = keep_steps(models[name], times)
    rows = {name: measured(models[name], problem, gradients[name]) for name in ROWS}
    return {"rows": rows, "reports": reports, "target": target, "cosines": found}


def tune(job: tuple[Task, int, Config]) -> list[tuple[float, float, float, bool]]:
    """NegGrad+ with every setting on one seed: score on what is kept, and whether it got there."""
    task, seed, config = job
    problem = PROBLEMS[task.name](task, seed)
    everything = Examples(*map(torch.cat, zip(problem.keep, problem.forget, strict=True)))
    original = trained(task, problem, everything, seed)
    target = loss_of(original, problem.unseen).item()
    found = []
    for rate, weight in product(config.neggrad_rates, config.neggrad_weights):
        model = deepcopy(original)
        neggrad(model, task, problem, target, rate, weight, config.neggrad_steps, seed)
        reached = loss_of(model, problem.forget).item() >= target
        found.append((rate, weight, problem.score(model, problem.keep), reached))
    return found


def choose(tried: Sequence[Sequence[tuple[float, float, float, bool]]]) -> dict[str, Any]:
    """Of the settings that reached the target on most seeds, the one that keeps most."""
    settings = []
    for entries in zip(*tried, strict=True):
        score = statistics.mean(entry[2] for entry in entries)
        reached = sum(entry[3] for entry in entries)
        settings.append([*entries[0][:2], score, reached])
    rate, weight, _, _ = max(settings, key=lambda entry: (entry[3], entry[2]))
    return {"learning_rate": rate, "weight": weight, "tried": settings}


def main() -> None:
    """Tune, run and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    results = measure(QUICK if arguments.quick else Config(), arguments.workers)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output_dir / "results.json", dumps(results, indent=1) + "\n")


def in_parallel(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int) -> list[Any]:
    """What a function makes of each job, in as many processes; one is this process."""
    if workers == 1:
        return list(map(function, jobs))
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, jobs))


def measure(config: Config, workers: int) -> dict[str, Any]:
    """All tasks."""
    found = []
    for task in config.tasks:
        jobs = [(task, seed, config) for seed in config.tuning_seeds]
        chosen = choose(in_parallel(tune, jobs, workers))
        settings = (chosen["learning_rate"], chosen["weight"], config)
        jobs = [(task, seed, *settings) for seed in config.seeds]
        found.append(summarised(task, chosen, in_parallel(run, jobs, workers)))
    return {"environment": environment(), "config": asdict(config), "tasks": found}


def summarised(task: Task, chosen: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A task's rows over seeds, and what `forget_` differs by from the others, paired."""
    rows = {
        name: {key: [run["rows"][name][key] for run in runs] for key in (*SCORES, "gradients")}
        for name in ROWS
    }
    differences = [
        {"row": f"forget{end}", "other": f"{other}{end}", "score": score}
        | vars(Interval.paired(rows[f"forget{end}"][score], rows[f"{other}{end}"][score]))
        for end in ("", "-keep")
        for other in ("no-fisher", "neggrad", "random")
        for score in SCORES
    ]
    return {
        "task": task.key,
        "neggrad": chosen,
        "targets": [run["target"] for run in runs],
        "reports": [run["reports"] for run in runs],
        "cosines": {count: [run["cosines"][count] for run in runs] for count in runs[0]["cosines"]},
        "rows": rows,
        "differences": differences,
    }


def table(results: dict[str, Any], key: str = "graph-4") -> Table:
    """A task's rows, for docs/forgetting.md."""
    (found,) = [task for task in results["tasks"] if task["task"] == key]
    is_graph = key.startswith("graph")
    score = "MRR" if is_graph else "accuracy %"
    heading = ["", f"{score}: kept", "new", "to forget", "attack AUC", "gradients"]
    rows = []
    for name, label in ROWS.items():
        row = found["rows"][name]
        cells = [label]
        for kind in SCORES:
            summary = Summary.of(row[kind])
            cells.append(
                f"{summary.mean:.3f} ± {summary.sd:.3f}"
                if is_graph or kind == "auc"
                else f"{100 * summary.mean:.1f} ± {100 * summary.sd:.1f}"
            )
        rows.append([*cells, f"{statistics.mean(row['gradients']):.0f}"])
    cosines = [
        f"{statistics.mean(values):.3f} from {count}" for count, values in found["cosines"].items()
    ]
    weight = found["neggrad"]["weight"]
    least = ", the least tried" if weight == min(results["config"]["neggrad_weights"]) else ""
    (task,) = [t for t in results["config"]["tasks"] if f"{t['name']}-{t['bits']}" == key]
    caption = (
        f"{task['bits']} bits, {task['forgotten']} examples to forget; mean ± standard deviation "
        f"over {len(found['targets'])} seeds. Attack: 0.5 is chance. Gradients: batches that were "
        f"differentiated. Keep steps: {task['keep_steps']}. NegGrad+: learning rate "
        f"{found['neggrad']['learning_rate']:g}, weight {weight:g}{least}. Mean "
        "cosine of a direction from pairs of forward passes with the first-order gradient: "
        f"{', '.join(cosines)}. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
