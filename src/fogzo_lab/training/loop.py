"""The training loop, readable on its own: where the one call goes, and what surrounds it."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fogzo.estimators import RefineStats
from fogzo_lab.data.record import check_unchanged, digest_data, record_data
from fogzo_lab.system.devices import synchronize
from fogzo_lab.system.signals import held_back
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.methods import warn_of_little_to_measure
from fogzo_lab.training.parallel import Ranks, join_ranks, without_sync
from fogzo_lab.training.run_folder import Metrics, RunFolder
from fogzo_lab.training.state import Training, own_random_streams
from fogzo_lab.training.tasks import Batch
from fogzo_lab.training.trackers import check_trackers, tracking

INSPECTED = ("flips", "flips_back", "masked", "frozen", "dead", "bits_used")
"""What metrics hold of an inspection, means over all weights; inspections.jsonl has it by layer."""

OnStep = Callable[[Metrics], None]


# This many consecutive steps with a loss far beyond the first end a run.
_IN_A_ROW = 3


class DivergedError(RuntimeError):
    """The training loss has diverged. Metrics and good checkpoints are on disk."""


def train(config: TrainConfig, on_step: OnStep | None = None) -> Metrics:
    """Train one network and write its run folder.

    A signal that asks the process to end takes effect after the present step and a checkpoint.

    Args:
        config: What to train.
        on_step: Called after every step with that step's metrics.

    Returns:
        The final numbers, as in result.json: for train, validation and test the loss in nats and
        the accuracy of the hard-quantized network, and the perplexity where it is one of text;
        steps, training seconds, forward passes beyond the one per step of STE, refined steps,
        and, by reason, the number of those that fell back to the gradient of backward, if any.

    Raises:
        DivergedError: If a loss is not finite or, for several steps, far beyond the first one;
            result.json then has ``diverged`` and no losses.
        ValueError: If the config cannot be run, the folder holds another run, or another process
            is using it.
        OSError: If a checkpoint cannot be written.
    """
    with join_ranks(config.device) as ranks, own_random_streams(config.seed + ranks.rank):
        return _train(config, ranks, on_step)


def _train(config: TrainConfig, ranks: Ranks, on_step: OnStep | None) -> Metrics:
    # In a separate function, so that the model is freed before the process group is destroyed.
    check_trackers(config)
    if ranks.rank == 0:
        warn_of_little_to_measure(config)
    digests = digest_data(config.data)
    with RunFolder(config, writes=ranks.rank == 0) as folder:

        def build(checkpoint: Path | None) -> Training:
            if checkpoint is not None:
                check_unchanged(folder.path, digests)
            return Training(config, ranks, checkpoint)

        training = folder.begin(build)
        with (
            folder.open(training.step, training.log_position),
            tracking(config, ranks) as track,
        ):
            if ranks.rank == 0:
                record_data(folder.path, digests)
            _take_steps(training, folder, track, on_step)
            result: Metrics = {"steps": training.step, "seconds": training.seconds}
            result |= {"extra_forwards": training.extra_forwards} | training.evaluate()
            if not math.isfinite(sum(v for k, v in result.items() if k.endswith("_loss"))):
                _end_diverged(training, folder, "a loss of the evaluation is not finite", 0)
            result |= training.refinements()
            folder.write_result(result)
            track({"step": training.step} | result)
    return result


def _take_steps(
    training: Training, folder: RunFolder, track: OnStep, on_step: OnStep | None
) -> None:
    config, ranks = training.config, training.ranks
    saved = training.step if training.step else None
    if training.step == 0 and config.checkpoint_every > 0:
        folder.save_checkpoint(training.state_dict())
        saved = 0
    try:
        with held_back() as waiting:
            ending = 0
            while training.step < config.max_steps and not ending:
                window = training.next_window()
                synchronize(ranks.device)
                began = time.perf_counter()
                loss, stats = training_step(training, window)
                synchronize(ranks.device)  # which still computes what the optimizer does
                training.seconds += time.perf_counter() - began

                training.watch(loss)
                last = training.step == config.max_steps
                finite = math.isfinite(loss)
                diverged = training.diverged_steps >= (1 if last or not finite else _IN_A_ROW)
                metrics = _metrics(training, loss, stats)
                log_now = training.step == 1 or not training.step % config.log_every
                if training.inspection is not None:
                    folder.log_inspection(training.inspection)
                    training.inspection = None
                    log_now = True
                if last or diverged or log_now:
                    folder.log(metrics)
                    track(metrics)
                if diverged:
                    first = f", and was {training.first_loss:.4g} at first" if finite else ""
                    why = f"the training loss is {loss:.4g}{first}"
                    _end_diverged(training, folder, why, training.diverged_steps)
                # All ranks end after the same step, no matter which of them received a signal.
                ending = ranks.maximum(waiting())
                if _is_due(config, training.step, bool(ending)):
                    if not training.all_finite():
                        _end_diverged(training, folder, "the weights are not finite", 0)
                    folder.save_checkpoint(training.state_dict())
                    saved = training.step
                if on_step is not None:
                    on_step(metrics)
            if ending and not waiting():
                signal.raise_signal(ending)
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(
            "there is no checkpoint to go on from"
            if saved is None
            else f"--resume goes on from the checkpoint of step {saved}"
        )
        raise
    finally:
        training.windows.close()


def _is_due(config: TrainConfig, step: int, ending: bool) -> bool:
    """Whether a checkpoint is due after a step."""
    every = config.checkpoint_every
    if every < 0:
        return False
    return ending or step == config.max_steps or (every > 0 and step % every == 0)


def _end_diverged(training: Training, folder: RunFolder, why: str, steps: int) -> NoReturn:
    """Record it in result.json and set aside the checkpoints of the last so many steps."""
    folder.set_aside_checkpoints(training.step - steps)
    folder.write_result(
        {
            "steps": training.step,
            "seconds": training.seconds,
            "extra_forwards": training.extra_forwards,
            "diverged": True,
        }
        | training.refinements()
    )
    raise DivergedError(
        f"at step {training.step} {why}: try a smaller --learning-rate than "
        f"{training.config.learning_rate:g}; everything before is in {folder.path}"
    )


def training_step(training: Training, window: list[Batch]) -> tuple[float, RefineStats | None]:
    """Forward, backward, refine, clip, step: one optimizer step over a window of micro-batches.

    Returns:
        The loss in nats, averaged over micro-batches and ranks, and the estimator's statistics.
        If the loss is not finite, the weights stay as they were.
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
            total = total + loss.detach()  # not in place: stacked probes make it one per probe
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
    training.inspect(window[0])  # before an estimator adds noise to the gradients
    if estimator is not None:
        if config.track_flips:
            training.flip_rate = estimator.flip_rate()
        if training.linearized is None:
            stats = estimator.refine_grads_(window_loss, expected_loss=loss if same_loss else None)
        else:
            linearized, scale = training.linearized, scaler.get_scale()
            stats = estimator.refine_grads_(lambda: linearized() / scale)
        evaluated, all_of_it = (sum(len(part[0]) for part in parts) for parts in (probed, window))
        training.count(stats, 1 if evaluated == all_of_it else evaluated / all_of_it)
    training.methods.before_step()
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    training.after_step()
    return mean_loss, stats


def _part(batch: Batch, fraction: float) -> Batch:
    """The first examples of a batch, at least one."""
    inputs, targets = batch
    count = max(1, round(fraction * len(inputs)))
    return inputs[:count], targets[:count]


def _metrics(training: Training, loss: float, stats: RefineStats | None) -> Metrics:
    metrics: Metrics = {"step": training.step, "loss": loss, "seconds": training.seconds}
    metrics |= {"learning_rate": training.learning_rate} | training.methods.metrics()
    if training.inspection is not None:
        metrics |= {key: training.inspection.mean(key) for key in INSPECTED}
    if stats is not None:
        metrics |= {"agreement": stats.agreement, "agreement_error": stats.agreement_error}
        metrics |= {"loss_gap": stats.loss_gap}
        metrics |= {"kappa": stats.kappa, "fallback": stats.fallback}
        if training.config.track_flips:
            metrics |= {"flip_rate": training.flip_rate}
    return metrics
