"""How far agreements scatter where inputs are quantized, as the steps of a run show.

Quantized inputs round differently between the two sides of a probe, as weights do, and no formula
tells by how much the loss jumps for it. Two things show it, neither of which costs a forward pass:
how far the loss at the weights lies off the middle of a probe's two losses, which is no slope; and,
where that loss is not known or probes are one-sided, by how much more than the weights explain the
agreements of two steps lie apart.
"""

import math
from typing import Any

from fogzo.probing.measure import Measurement
from fogzo.quantizers.checks import is_number

# Of the mean over steps: of about ten.
_PACE = 0.1


class InputScatter:
    """The variance of a slope, over N squared, as a mean over steps."""

    def __init__(self) -> None:
        self._variance: float | None = None
        self._last_agreement: float | None = None

    def take_in(
        self, measured: Measurement, norm: float, beta: float, agreement: float, of_weights: float
    ) -> float:
        """Learn from a step, and say what inputs add to the standard error of its agreement.

        Args:
            measured: Of the step.
            norm: N.
            beta: Of the step.
            agreement: Measured in it.
            of_weights: Its standard error as of weights alone.
        """
        probes = beta * len(measured.slopes)  # in an agreement a slope's variance is over this
        squares = [(d / norm) * (d / norm) for d in measured.second_differences]
        if not squares:
            if self._last_agreement is not None:
                apart = agreement - self._last_agreement
                squares = [probes * (apart * apart / 2 - of_weights * of_weights)]
            self._last_agreement = agreement if math.isfinite(agreement) else None
        if squares and all(map(math.isfinite, squares)):
            now, before = math.fsum(squares) / len(squares), self._variance
            self._variance = now if before is None else before + _PACE * (now - before)
        return math.sqrt(max(self._variance or 0.0, 0.0) / probes)

    def state_dict(self) -> dict[str, float]:
        """What is known so far."""
        known = {"input_variance": self._variance, "last_agreement": self._last_agreement}
        return {key: value for key, value in known.items() if value is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned out of a larger state.

        Args:
            state_dict: Loses the keys that are meant for this.

        Raises:
            ValueError: If they are no finite numbers; nothing is loaded then.
        """
        found = {key: state_dict.pop(key, None) for key in ("input_variance", "last_agreement")}
        for key, value in found.items():
            if value is not None and not (is_number(value) and math.isfinite(value)):
                raise ValueError(
                    f"{key} must be a finite number, got {value!r:.80}: "
                    "estimator.load_state_dict(checkpoint['estimator'])"
                )
        self._variance, self._last_agreement = found.values()
