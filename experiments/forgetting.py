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
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.methods import forget_
from fogzo.methods.forgetting import shortest
from fogzo_lab.comparison.intervals import Interval, Summary
from fogzo_lab.comparison.tables import where
from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.images import load_images
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table

FOLDER = Path(__file__).parent / "forgetting"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and what is done to it.

    Attributes:
        name: ``"graph"`` or ``"digits"``.
        bits: Of a weight.
        forgotten: Canaries, or wrong labels.
        steps: Of training, by Adam with a cosine schedule.
        learning_rate: At its start.
        batch_size: Of training and of NegGrad+.
        keep_batch: Examples of a closure of what is kept.
        keep_steps: Of training on what is kept afterwards, at a tenth of the learning rate.
        entities: Of the graph.
        relations: Of the graph.
        dims: Complex numbers of an embedding, or hidden units.
    """

    name: str
    bits: int
    forgotten: int = 60
    steps: int = 600
    learning_rate: float = 0.02
    batch_size: int = 512
    keep_batch: int = 32
    keep_steps: int = 50
    entities: int = 160
    relations: int = 8
    dims: int = 32

    @property
    def key(self) -> str:
        """What the results call it."""
        return f"{self.name}-{self.bits}"


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
        tuning_seeds: Of runs that choose.
        seeds: Of runs that are reported.
    """

    tasks: tuple[Task, ...] = (Task(name="graph", bits=4), Task(name="graph", bits=2), DIGITS)
    neggrad_rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    neggrad_weights: tuple[float, ...] = (0.03, 0.1, 0.3)
    neggrad_steps: int = 200
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(6))


SMALL = Task(name="graph", bits=4, forgotten=20, steps=150, entities=50, relations=3, dims=16)
QUICK = Config(
    tasks=(SMALL,),
    neggrad_rates=(0.003,),
    neggrad_weights=(0.1,),
    neggrad_steps=20,
    tuning_seeds=(100,),
    seeds=(0, 1),
)


class Examples(NamedTuple):
    """Inputs and the class of each."""

    x: Tensor
    y: Tensor

    def pick(self, index: Tensor) -> "Examples":
        """Some of them."""
        return Examples(self.x[index], self.y[index])

    def split(self, size: int) -> "list[Examples]":
        """All of them, in batches."""
        return [
            Examples(*pair) for pair in zip(self.x.split(size), self.y.split(size), strict=True)
        ]


class Problem(NamedTuple):
    """The data of one seed.

    Attributes:
        keep: Examples that may stay in the training set.
        forget: Those that should not have been in it.
        unseen: Drawn like those, never trained on; their loss is the target.
        attack: The same, for the attack.
        test: New examples of the kind that is kept.
        network: A new network.
        score: Of a network on examples; more is better.
    """

    keep: Examples
    forget: Examples
    unseen: Examples
    attack: Examples
    test: Examples
    network: Callable[[], nn.Module]
    score: Callable[[nn.Module, Examples], float]


class ComplEx(nn.Module):
    """Scores ``Re sum_k h_k r_k conj(t_k)`` of all tails t, for pairs (head, relation)."""

    def __init__(self, entities: int, relations: int, dims: int, std: float, generator: Generator):
        super().__init__()
        self.entities = nn.Embedding(entities, 2 * dims)
        self.relations = nn.Embedding(relations, 2 * dims)
        with torch.no_grad():
            for param in self.parameters():
                param.normal_(0, std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (pairs, entities)."""
        a, b = self.entities(x[:, 0]).chunk(2, dim=-1)
        c, d = self.relations(x[:, 1]).chunk(2, dim=-1)
        tails = self.entities(torch.arange(self.entities.num_embeddings))
        return torch.cat([a * c - b * d, a * d + b * c], dim=-1) @ tails.T


def graph(task: Task, seed: int) -> Problem:
    """Facts: the three best tails of every pair under a hidden model of rank 6; canaries: any."""
    generator = Generator().manual_seed(seed)
    hidden = ComplEx(task.entities, task.relations, 6, 1.0, generator)
    pairs = torch.cartesian_prod(torch.arange(task.entities), torch.arange(task.relations))
    tails = hidden(pairs).topk(3).indices
    facts = Examples(pairs.repeat_interleave(3, 0), tails.reshape(-1))
    facts = facts.pick(torch.randperm(len(facts.y), generator=generator))

    def canaries() -> Examples:
        rows = torch.randint(len(pairs), (task.forgotten,), generator=generator)
        others = torch.randint(task.entities, (task.forgotten,), generator=generator)
        return Examples(pairs[rows], others)

    cut = round(0.85 * len(facts.y))
    forget = canaries()
    known = torch.zeros(task.entities, task.relations, task.entities, dtype=torch.bool)
    for examples in (facts, forget):
        known[examples.x[:, 0], examples.x[:, 1], examples.y] = True

    @torch.no_grad()
    def score(model: nn.Module, examples: Examples) -> float:
        scores, y = model(examples.x), examples.y[:, None]
        true = scores.gather(1, y)
        others = known[examples.x[:, 0], examples.x[:, 1]].scatter(1, y, True)
        ranks = 1 + (scores.masked_fill(others, -torch.inf) >= true).sum(1)
        return ranks.reciprocal().mean().item()

    def network() -> nn.Module:
        start = Generator().manual_seed(1000 + seed)
        return ComplEx(task.entities, task.relations, task.dims, 0.3, start)

    everything = torch.arange(len(facts.y)).split(cut)
    keep, test = (facts.pick(index) for index in everything)
    return Problem(keep, forget, canaries(), canaries(), test, network, score)


def digits(task: Task, seed: int) -> Problem:
    """Digits, some of them under a wrong label; unseen ones of those are from the validation."""
    images = load_images(ImagesConfig(dataset="digits"))
    generator = Generator().manual_seed(seed)
    splits = []
    for split in (images.train, images.validation, images.test):
        x, y = split.batch(torch.arange(len(split)))
        x = x.flatten(1).float() / 128
        splits.append(Examples(x, y).pick(torch.randperm(len(y), generator=generator)))
    train, validation, test = splits

    def mislabelled(examples: Examples) -> Examples:
        x, y = examples.pick(torch.arange(task.forgotten))
        return Examples(x, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10)

    @torch.no_grad()
    def score(model: nn.Module, examples: Examples) -> float:
        return (model(examples.x).argmax(1) == examples.y).double().mean().item()

    def network() -> nn.Module:
        start = Generator().manual_seed(1000 + seed)
        sizes = (64, task.dims, task.dims, 10)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(0, (2 / layer.in_features) ** 0.5, generator=start)
                layer.bias.zero_()
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    keep = train.pick(torch.arange(task.forgotten, len(train.y)))
    parts = [mislabelled(examples) for examples in (train, validation, test)]
    return Problem(keep, *parts, test, network, score)


PROBLEMS = {"graph": graph, "digits": digits}


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


def run(job: tuple[Task, int, float, float, int]) -> dict[str, Any]:
    """All rows of a task on one seed, NegGrad+ with these settings."""
    task, seed, rate, weight, steps = job
    torch.set_num_threads(1)
    problem = PROBLEMS[task.name](task, seed)
    everything = Examples(*map(torch.cat, zip(problem.keep, problem.forget, strict=True)))
    original = trained(task, problem, everything, seed)
    target = loss_of(original, problem.unseen).item()
    models = {"original": original, "retrained": trained(task, problem, problem.keep, seed)}
    gradients = {"original": task.steps, "retrained": task.steps}
    reports: dict[str, Any] = {}

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
        return 2 * neggrad(model, task, problem, target, rate, weight, steps, seed)

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
    return {"rows": rows, "reports": reports, "target": target}


def tune(job: tuple[Task, int, Config]) -> list[tuple[float, float, float, bool]]:
    """NegGrad+ with every setting on one seed: score on what is kept, and whether it got there."""
    task, seed, config = job
    torch.set_num_threads(1)
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
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = measure(QUICK if arguments.quick else Config(), arguments.workers)
    write_text(arguments.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(config: Config, workers: int) -> dict[str, Any]:
    """All tasks."""
    found = []
    with ProcessPoolExecutor(workers) as pool:
        for task in config.tasks:
            tried = list(pool.map(tune, [(task, seed, config) for seed in config.tuning_seeds]))
            chosen = choose(tried)
            settings = (chosen["learning_rate"], chosen["weight"], config.neggrad_steps)
            runs = list(pool.map(run, [(task, seed, *settings) for seed in config.seeds]))
            found.append(summarised(task, chosen, runs))
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
    (task,) = [t for t in results["config"]["tasks"] if f"{t['name']}-{t['bits']}" == key]
    caption = (
        f"{task['bits']} bits, {task['forgotten']} examples to forget; mean ± standard deviation "
        f"over {len(found['targets'])} seeds. Attack: 0.5 is chance. Gradients: batches that were "
        f"differentiated. Keep steps: {task['keep_steps']}. NegGrad+: learning rate "
        f"{found['neggrad']['learning_rate']:g}, weight {found['neggrad']['weight']:g}. "
        f"{where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
