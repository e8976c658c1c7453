"""The tasks, images and text: their batches, loss and evaluation."""

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fogzo_lab.data.augment import Augmentation
from fogzo_lab.data.batches import ShuffledBatches, Split, StreamedBatches, load
from fogzo_lab.data.config import ImagesConfig, TextConfig
from fogzo_lab.data.images import load_images
from fogzo_lab.data.text import StreamedText, TextSplit, check_vocabulary, load_text
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.models import Shapes, logits
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import Metrics

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, as the network and the loss take them."""


class Windows(Protocol):
    """Endless windows of raw micro-batches, one per step, with a position to resume from."""

    def __next__(self) -> list[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        ...

    def close(self) -> None:
        """End the processes that load ahead, if there are any."""
        ...


class Task(ABC):
    """Data and loss of a run.

    Attributes:
        shapes: The shapes of the data that the network depends on.
        splits: The splits that can be evaluated, by name.
        most_evaluated: Maximum number of evaluated examples of a split.
        evaluated_at_once: How many of them make a batch, unless another size is asked for.
        workers: Processes that load ahead.
    """

    shapes: Shapes
    splits: dict[str, Split[Any]]
    most_evaluated: int
    evaluated_at_once: int = 256
    workers: int = 0

    @abstractmethod
    def windows(self, config: TrainConfig, ranks: Ranks) -> Windows:
        """The training batches of this rank."""

    @abstractmethod
    def prepare(self, raw: Any, device: torch.device, training: bool = True) -> Batch:
        """A raw batch on the device, augmented in training, as all probes of a step see it."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss, in nats, a mean over the batch."""

    def describe(self, split: str, loss: float, accuracy: float) -> Metrics:
        """The numbers of an evaluation: loss in nats and accuracy as a fraction, at least."""
        return {"loss": loss, "accuracy": accuracy}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, ranks: Ranks, batch_size: int | None = None
    ) -> Metrics:
        """Evaluate the hard-quantized network on a split that the ranks share."""
        examples = self.splits[split]
        indices = torch.arange(min(len(examples), self.most_evaluated))
        batches = indices.split(batch_size or self.evaluated_at_once)
        # Sharded networks need every rank in every forward pass, also past the end.
        mine = [batches[i] if i < len(batches) else batches[0] for i in ranks.turns(len(batches))]
        total = torch.zeros(3, dtype=torch.float64)
        was_training = model.training
        model.eval()
        try:
            loaded = load(examples, mine, self.workers)
            for turn, raw in zip(ranks.turns(len(batches)), loaded, strict=True):
                sums = _sums(model, *self.prepare(raw, ranks.device, training=False))
                total += sums.cpu() if turn < len(batches) else 0
        finally:
            model.train(was_training)
        loss, correct, targets = ranks.sum(total).tolist()
        return self.describe(split, loss / targets, correct / targets)


class ImageTask(Task):
    """Classification of images."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._images = images = load_images(config)
        self._augmentation = Augmentation(config.augmentation, images)
        self.most_evaluated, self.workers = config.max_eval_images, config.workers
        self.shapes = Shapes(images.num_classes, images.channels, images.image_size)
        self.splits = {
            "train": images.train,
            "validation": images.validation,
            "test": images.test,
        }

    def windows(self, config: TrainConfig, ranks: Ranks) -> Windows:
        """Batches of images, reshuffled every epoch."""
        return _shuffled(self._images.train, config, ranks, self.workers)

    def prepare(self, raw: Any, device: torch.device, training: bool = True) -> Batch:
        """Standardised, in training augmented, images and their labels."""
        images, labels = (part.to(device, non_blocking=True) for part in raw)
        if training:
            return self._augmentation.train(images, labels)
        return self._augmentation.evaluate(images), labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy, with label smoothing where it was asked for."""
        images, targets = batch
        smoothing = self._config.augmentation.label_smoothing
        return cross_entropy(logits(model, images).float(), targets, label_smoothing=smoothing)


class TextTask(Task):
    """Prediction of the next token."""

    def __init__(self, config: TextConfig, vocab_size: int | None) -> None:
        self._text = text = load_text(config)
        self.most_evaluated = config.max_eval_blocks
        # Logits of 2^14 tokens and 32,000 words, twice, are 4 GiB; training may need less.
        self.evaluated_at_once = min(max(2**14 // config.context, 1), self.evaluated_at_once)
        vocabulary = check_vocabulary(vocab_size, text)
        self.shapes = Shapes(vocabulary, context=config.context)
        self.splits = {"validation": text.validation, "test": text.test}
        if not isinstance(text.train, StreamedText):
            self.splits = {"train": text.train, **self.splits}

    def windows(self, config: TrainConfig, ranks: Ranks) -> Windows:
        """Blocks of text, reshuffled every epoch, or as they stream in."""
        train = self._text.train
        if not isinstance(train, StreamedText):
            return _shuffled(train, config, ranks)
        stream = train.stream(config.seed, ranks.rank, ranks.count)
        return StreamedBatches(stream, config.batch_size, ranks.count, config.accumulation)

    def prepare(self, raw: Any, device: torch.device, training: bool = True) -> Batch:
        """Tokens, and those that follow them."""
        tokens = raw.to(device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of the next token."""
        inputs, targets = batch
        return cross_entropy(logits(model, inputs).flatten(0, 1).float(), targets.flatten())

    def describe(self, split: str, loss: float, accuracy: float) -> Metrics:
        """With the perplexity and the bits per byte, which do not depend on the tokenizer."""
        blocks = self.splits[split]
        assert isinstance(blocks, TextSplit)
        bits = loss / math.log(2) / blocks.bytes_per_token
        perplexity = math.exp(min(loss, 700.0))
        return {
            "loss": loss,
            "accuracy": accuracy,
            "perplexity": perplexity,
            "bits_per_byte": bits,
        }


def load_task(config: TrainConfig) -> Task:
    """The data of a run.

    Raises:
        ValueError: If they cannot be found or used.
    """
    if isinstance(config.data, ImagesConfig):
        return ImageTask(config.data)
    assert config.model.family == "llama"
    return TextTask(config.data, config.model.vocab_size)


def _shuffled(split: Split[Any], config: TrainConfig, ranks: Ranks, workers: int = 0) -> Windows:
    return ShuffledBatches(
        split,
        config.batch_size,
        config.seed,
        rank=ranks.rank,
        ranks=ranks.count,
        accumulation=config.accumulation,
        workers=workers,
    )


def _sums(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed loss, number of right answers, and number of targets."""
    scores, targets = logits(model, inputs).flatten(0, -2).float(), targets.flatten()
    loss = cross_entropy(scores, targets, reduction="sum").double()
    correct = (scores.argmax(1) == targets).sum()
    return torch.stack([loss, correct.double(), loss.new_tensor(len(targets))])
