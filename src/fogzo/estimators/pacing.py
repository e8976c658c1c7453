"""Pacing: probe as often as a given share of the training time allows."""

import logging
import math
import statistics
import time

import torch

from fogzo.collectives import mean_over_ranks

logger = logging.getLogger(__name__)

_WARM_UP = 3
_MEASURED = 7


class Pace:
    """Chooses every how many steps to probe, once, from the first steps' own times.

    The first ten probed steps run as they are: three to warm up, seven to measure what a step
    takes inside of the estimator and outside. From then on every ``interval``-th step is probed.

    Args:
        overhead: Time for probing, as a share of the time for everything else in training.

    Attributes:
        interval: Steps from one probed step to the next; None until it is chosen.

    Raises:
        ValueError: If the share is not positive.
    """

    def __init__(self, overhead: float) -> None:
        number = isinstance(overhead, float | int) and not isinstance(overhead, bool)
        if not (number and overhead > 0 and math.isfinite(overhead)):
            raise ValueError(
                f"overhead is a share of the training time, above 0, got {overhead!r}: "
                "overhead=0.15 for 15% more time a step on average"
            )
        self.overhead = overhead
        self.interval: int | None = None
        self._device = torch.device("cpu")
        self._inside: list[float] = []
        self._outside: list[float] = []
        self._began, self._ended = math.nan, math.nan

    def due(self, step: int) -> bool:
        """Whether to probe in this step."""
        return self.interval is None or step % self.interval == 0

    def begin(self, device: torch.device) -> None:
        """Backward is done, the estimator begins.

        Args:
            device: Where the weights are, whose work is waited for while times are measured.
        """
        if self.interval is None:
            self._device = device
            self._began = self._now()

    def end(self, probed: bool) -> None:
        """The estimator is done."""
        if self.interval is not None:
            return
        ended = self._now()
        if probed and math.isfinite(self._ended):
            self._outside.append(self._began - self._ended)
            self._inside.append(ended - self._began)
        self._ended = ended
        if len(self._inside) == _WARM_UP + _MEASURED:
            self._choose()

    def _choose(self) -> None:
        times = [statistics.median(t[_WARM_UP:]) for t in (self._inside, self._outside)]
        # All ranks must choose alike.
        inside, outside = mean_over_ranks([torch.tensor(t) for t in times], self._device)
        steps = inside / (self.overhead * outside)
        self.interval = max(1, math.ceil(steps - 1e-3))  # no step more for a rounding error
        logger.info(
            "probing every %d steps: the probes of a step take %.2f of the rest of it, so that "
            "is %.0f%% more time on average, and overhead=%g allows %.0f%%",
            self.interval,
            inside / outside,
            100 * inside / outside / self.interval,
            self.overhead,
            100 * self.overhead,
        )

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
