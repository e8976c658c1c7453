"""The training loop, readable on its own: where the one call goes, and what surrounds it."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fogzo import (
    ControlVariateEstimator,
    FogzoEstimator,
    PlaceboEstimator,
    SpsaEstimator,
    linear_noise_share,
    quantize_,
    quantized_weights,
)
from fogzo.estimators import GradientEstimator, RefineStats
from fogzo.recipes.config import TrainConfig
from fogzo.recipes.data import ImageData, Split, load_images
from fogzo.recipes.run_folder import Metrics, RunFolder

OnStep = Callable[[Metrics], None]


class DivergedError(RuntimeError):
    """The training loss is no longer finite. Metrics and earlier checkpoints are on disk."""


def train(config: TrainConfig, on_step: OnStep | None = None) -> Metrics:
    """Train one network and write its run folder.

    Args:
        config: What to train.
        on_step: Called after every step with that step's metrics.

    Returns:
        The final numbers, as in result.json: losses in nats, accuracies as fractions, of the
        hard-quantized network on train, validation and test; steps, training seconds, and
        forwards beyond STE's one a step.

    Raises:
        DivergedError: If a training loss is not finite.
    """
    data = load_images(config.data)
    model = build_model(config, data)
    estimator = build_estimator(config, model)
    optimizer, scheduler = build_optimizer(config, model)
    batches = shuffled_batches(data.train, config.batch_size, config.seed)
    seconds, extra_forwards = 0.0, 0

    def checkpoint(step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "estimator": estimator.state_dict() if estimator else None,
        }
        folder.save_checkpoint(step, state)

    with RunFolder(config) as folder:
        model.train()
        for step in range(1, config.max_steps + 1):
            images, labels = next(batches)
            began = time.perf_counter()
            loss, stats = training_step(model, estimator, optimizer, images, labels)
            scheduler.step()
            seconds += time.perf_counter() - began
            extra_forwards += len(stats.probe_losses) if stats else 0

            metrics: Metrics = {"step": step, "loss": loss, "seconds": seconds}
            if stats is not None:
                metrics |= {"agreement": stats.agreement, "loss_gap": stats.loss_gap}
                metrics |= {"kappa": stats.kappa, "fallback": stats.fallback}
            last = step == config.max_steps
            if last or step == 1 or step % config.log_every == 0 or not math.isfinite(loss):
                folder.log(metrics)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the training loss is {loss} at step {step}: try a smaller --learning-rate "
                    f"than {config.learning_rate:g}; everything before is in {folder.path}"
                )
            periodic = config.checkpoint_every > 0 and step % config.checkpoint_every == 0
            if periodic or (last and config.checkpoint_every >= 0):
                checkpoint(step)
            if on_step is not None:
                on_step(metrics)

        result: Metrics = {"steps": config.max_steps, "seconds": seconds}
        result["extra_forwards"] = extra_forwards
        for name in ("train", "validation", "test"):
            result |= {f"{name}_{k}": v for k, v in evaluate(model, getattr(data, name)).items()}
        folder.write_result(result)
    return result


def training_step(
    model: nn.Module,
    estimator: GradientEstimator | None,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> tuple[float, RefineStats | None]:
    """Forward, backward, refine, step. Returns the loss in nats and the estimator's statistics."""
    stats = None
    if estimator is None:
        loss = cross_entropy(model(images), labels)
        loss.backward()
    else:
        with estimator.record_rng():
            loss = cross_entropy(model(images), labels)
            loss.backward()
        stats = estimator.refine_grads_(
            lambda: cross_entropy(model(images), labels), expected_loss=loss
        )
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), stats


def build_model(config: TrainConfig, data: ImageData) -> nn.Sequential:
    """A multilayer perceptron, quantized as the config says."""
    widths = [data.train.images.shape[1], *config.hidden, data.num_classes]
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # noqa: TID251 -- initial weights only, and given back
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    quantizer = config.quantizer.build()
    if quantizer is not None:
        quantize_(model, quantizer, (lambda _, __: True) if config.quantizer.everything else None)
    return model


def build_estimator(config: TrainConfig, model: nn.Module) -> GradientEstimator | None:
    """The estimator by its name; None for plain backward."""
    weights = quantized_weights(model)
    if config.estimator == "ste" or not weights:
        return None
    options: dict[str, Any] = {"num_samples": config.num_samples, "seed": config.seed}
    if config.estimator == "spsa":
        return SpsaEstimator(weights, **options)
    if config.estimator == "control-variate":
        return ControlVariateEstimator(weights, **options)
    schedule = linear_noise_share(
        kappa=0.0 if config.estimator == "lambda" else config.kappa,
        num_weights=sum(weight.param.numel() for weight in weights),
        num_samples=config.num_samples,
        total_steps=config.max_steps,
        start=config.start,
    )
    if config.estimator == "placebo":
        return PlaceboEstimator(weights, noise_share=schedule, **options)
    paired = config.estimator == "fogzo-paired"
    return FogzoEstimator(weights, noise_share=schedule, paired=paired, **options)


def build_optimizer(
    config: TrainConfig, model: nn.Module
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW or SGD with momentum; linear warm-up, then cosine to zero."""
    lr, decay = config.learning_rate, config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay, momentum=0.9)
    warmup = max(1, round(config.warmup_fraction * config.max_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, config.max_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled_batches(data: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless full batches, reshuffled every epoch by a generator of their own.

    Raises:
        ValueError: If there are fewer images than a batch.
    """
    if batch_size > len(data):
        raise ValueError(
            f"a batch of {batch_size} is more than the {len(data)} training images: "
            f"--batch-size {len(data)}"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: len(order) - len(order) % batch_size].split(batch_size):
            yield data.images[rows], data.labels[rows]


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> Metrics:
    """Mean loss in nats and accuracy of the network as it would be deployed."""
    was_training = model.training
    model.eval()
    try:
        logits = model(data.images)
    finally:
        model.train(was_training)
    return {
        "loss": float(cross_entropy(logits, data.labels)),
        "accuracy": float((logits.argmax(1) == data.labels).double().mean()),
    }
