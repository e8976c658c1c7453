"""What is to be forgotten: a knowledge graph with canaries, digits with wrong labels."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.data.images import load_images


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
