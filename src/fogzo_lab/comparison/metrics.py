"""The numbers that gradients are compared by: their names, their units and which way is up."""

import math
from dataclasses import dataclass

from fogzo_lab.comparison.intervals import Interval, Summary


@dataclass(frozen=True)
class Metric:
    """A number and how it is shown.

    Attributes:
        key: Its name in JSON.
        name: Its name for people.
        unit: points, nats or nothing.
        factor: What it is shown times.
        digits: After the decimal point.
        more_is_better: Which way is up.
    """

    key: str
    name: str
    unit: str = ""
    factor: float = 1
    digits: int = 3
    more_is_better: bool = False

    @property
    def heading(self) -> str:
        """Name and unit over a column of values."""
        return self.name + {"points": " %", "nats": " (nats)", "": ""}[self.unit]

    def text(self, value: float, sign: str = "") -> str:
        """The value without its unit; a dash where there is none."""
        return f"{self.factor * value:{sign}.{self.digits}f}" if math.isfinite(value) else "–"

    def spread(self, summary: Summary | None) -> str:
        """Mean and standard deviation; a run that has no such number has diverged."""
        if summary is None or not math.isfinite(summary.mean):
            return "diverged"
        return f"{self.text(summary.mean)} ± {self.text(summary.sd)}"

    def interval(self, found: Interval | None) -> str:
        """A difference and its interval; nothing where there is none, unless a run diverged."""
        if found is None or not found.exists:
            return "" if found is None or math.isfinite(found.mean) else "diverged"
        ends = f"{self.text(found.low, '+')}, {self.text(found.high, '+')}"
        return f"{self.text(found.mean, '+')} [{ends}]"

    def called(self, found: Interval | None) -> str:
        """A difference and its interval, bold and in a word where it is significant (Markdown)."""
        text = self.interval(found)
        verdict = found.verdict(self.more_is_better) if found is not None else None
        return f"**{text}** {verdict}" if verdict in ("better", "worse") else text


TEST_ACCURACY = Metric("test_accuracy", "test accuracy", "points", 100, 2, more_is_better=True)
TEST_PERPLEXITY = Metric("test_perplexity", "test perplexity", digits=2)
TRAIN_LOSS = Metric("train_loss", "train loss", "nats", digits=4)
METRICS = {
    metric.key: metric
    for metric in (
        TEST_ACCURACY,
        Metric("test_loss", "test loss", "nats", digits=4),
        TEST_PERPLEXITY,
        TRAIN_LOSS,
    )
}
"""What rows are compared by, in the order of results.json."""
