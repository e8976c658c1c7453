"""Optional logging to TensorBoard, W&B or trackio, through accelerate."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.parallel import Ranks
from fogzo_lab.training.run_folder import Metrics, flat


def check_trackers(config: TrainConfig) -> None:
    """Check that this machine has the trackers of the config, before anything is written.

    Raises:
        ValueError: If accelerate or a tracker is not installed.
    """
    if not config.trackers:
        return
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError as error:
        raise ValueError("--trackers needs accelerate: pip install 'fogzo[trackers]'") from error
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [tracker for tracker in config.trackers if tracker not in available]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}, or leave "
            "--trackers out (metrics.jsonl is always written)"
        )


@contextmanager
def tracking(config: TrainConfig, ranks: Ranks) -> Iterator[Callable[[Metrics], None]]:
    """A function that logs the metrics of a step to the configured trackers, if any.

    Raises:
        ValueError: If accelerate or a tracker is not installed.
    """
    if not config.trackers or ranks.rank:
        yield lambda metrics: None
        return
    check_trackers(config)
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=config.device == "cpu", log_with=list(config.trackers), project_dir=config.output_dir
    )
    settings = {
        name: value if isinstance(value, int | float | str) else str(value)  # what trackers take
        for name, value in flat(dataclasses.asdict(config)).items()
    }
    accelerator.init_trackers(config.recipe, config=settings)

    def track(metrics: Metrics) -> None:
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        accelerator.log(numbers, step=metrics["step"])

    try:
        yield track
    finally:
        for tracker in accelerator.trackers:  # `end_training` would destroy the process group too
            tracker.finish()
