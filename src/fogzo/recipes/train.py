"""The training loop, readable on its own: where the one call goes, and what surrounds it."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fogzo.estimators import RefineStats
from fogzo.recipes.config import TrainConfig
from fogzo.recipes.parallel import Ranks, join_ranks, without_sync
from fogzo.recipes.run_folder import Metrics, RunFolder
from fogzo.recipes.tasks import Batch
from fogzo.recipes.trackers import tracking
from fogzo.recipes.training import Training, own_random_streams

OnStep = Callable[[Metrics], None]


class DivergedError(RuntimeError):
    """The training loss is no longer finite. Metrics and good checkpoints are on disk."""


def train(config: TrainConfig, on_step: OnStep | None = None) -> Metrics:
    """Train one network and write its run folder.

    Args:
        config: What to train.
        on_step: Called after every step with that step's metrics.

    Returns:
        The final numbers, as in result.json: for train, validation and test the loss in nats and
        the accuracy of the hard-quantized network, and the perplexity where it is one of text;
        steps, training seconds, forwards beyond STE's one a step, steps that were refined, and
        by reason how many of them fell back to the gradient of backward, if any did.

    Raises:
        DivergedError: If a training loss is not finite.
        ValueError: If the config cannot be run, or the folder holds another run.
        OSError: If a checkpoint cannot be written.
    """
    with join_ranks(config.device) as ranks, own_random_streams(config.seed + ranks.rank):
        return _train(config, ranks, on_step)


def _train(config: TrainConfig, ranks: Ranks, on_step: OnStep | None) -> Metrics:
    # In a function of its own, so that what it trained is gone before the ranks part.
    folder = RunFolder(config, writes=ranks.rank == 0)
    training = Training(config, ranks, folder.checkpoint)
    with folder.open(training.step), tracking(config, ranks) as track:
        if training.step == 0 and config.checkpoint_every > 0:
            folder.save_checkpoint(training.state_dict())
        while training.step < config.max_steps:
            window = training.next_window()
            began = time.perf_counter()
            loss, stats = training_step(training, window)
            training.seconds += time.perf_counter() - began

            metrics = _metrics(training, loss, stats)
            last = training.step == config.max_steps
            finite = math.isfinite(loss)
            if last or not finite or training.step == 1 or not training.step % config.log_every:
                folder.log(metrics)
                track(metrics)
            if not finite:
                folder.set_aside_checkpoint(training.step - 1)
                raise DivergedError(
                    f"the training loss is {loss} at step {training.step}: try a smaller "
                    f"--learning-rate than {config.learning_rate:g}; everything before is in "
                    f"{folder.path}"
                )
            every = config.checkpoint_every
            if every >= 0 and (last or (every and training.step % every == 0)):
                _save(training, folder)
            if on_step is not None:
                on_step(metrics)

        result: Metrics = {"steps": training.step, "seconds": training.seconds}
        result |= {"extra_forwards": training.extra_forwards} | training.evaluate()
        if training.estimator is not None and training.estimator.interval is not None:
            result |= {"probe_every": training.estimator.interval}
        if training.refined_steps:
            result |= {"refined_steps": training.refined_steps}
        if training.fallbacks:
            result |= {"fallbacks": dict(training.fallbacks)}
        folder.write_result(result)
        track({"step": training.step} | result)
    return result


def training_step(training: Training, window: list[Batch]) -> tuple[float, RefineStats | None]:
    """Forward, backward, refine, clip, step: one optimizer step over a window of micro-batches.

    Returns:
        The loss in nats, averaged over micro-batches and ranks, and the estimator's statistics.
        Where the loss is not finite, the weights are left as they were.
    """
    optimizer, scaler, estimator = training.optimizer, training.scaler, training.estimator
    config = training.config
    same_loss = config.probe_fraction == 1 and config.probe_precision is None
    probed = [_part(batch, config.probe_fraction) for batch in window]

    def window_loss() -> Tensor:
        """The loss that backward differentiates; without gradient, what a probe measures."""
        probing = not torch.is_grad_enabled()
        total = torch.zeros((), device=training.ranks.device)
        for i, batch in enumerate(probed if probing else window, start=1):
            with without_sync(training.parallel, skip=i < len(window)):
                with training.autocast(probing):
                    loss = training.task.loss(training.parallel, batch) / len(window)
                if not probing:
                    scaler.scale(loss).backward()  # at once, so that one graph lives at a time
            total = total + loss.detach()  # not in place: probes_at_once makes it one a probe
        return total

    training.set_learning_rate()
    stats = None
    if estimator is None:
        loss = window_loss()
    else:
        with estimator.record_rng():  # the probes replay its dropout masks
            loss = window_loss()
    mean_loss = training.ranks.mean(loss)
    training.step += 1
    if not math.isfinite(mean_loss):
        return mean_loss, None
    scaler.unscale_(optimizer)
    if estimator is not None:
        stats = estimator.refine_grads_(window_loss, expected_loss=loss if same_loss else None)
        training.count(stats)
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if training.ema is not None:
        training.ema.update()
    return mean_loss, stats


def _part(batch: Batch, fraction: float) -> Batch:
    """The first examples of a batch, at least one."""
    inputs, targets = batch
    count = max(1, round(fraction * len(inputs)))
    return inputs[:count], targets[:count]


def _metrics(training: Training, loss: float, stats: RefineStats | None) -> Metrics:
    metrics: Metrics = {"step": training.step, "loss": loss, "seconds": training.seconds}
    metrics |= {"learning_rate": training.optimizer.param_groups[0]["lr"]}
    if stats is not None:
        metrics |= {"agreement": stats.agreement, "loss_gap": stats.loss_gap}
        metrics |= {"kappa": stats.kappa, "fallback": stats.fallback}
        if training.config.track_flips:
            metrics |= {"flip_rate": stats.flip_rate}
    return metrics


def _save(training: Training, folder: RunFolder) -> None:
    if not training.all_finite():
        raise DivergedError(
            f"the weights are not finite after step {training.step}: try a smaller "
            f"--learning-rate than {training.config.learning_rate:g}; the last good checkpoint is "
            f"in {folder.path}"
        )
    folder.save_checkpoint(training.state_dict())
