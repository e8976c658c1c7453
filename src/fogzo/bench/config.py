"""What a benchmark measures and how long it may take."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

Suite = Literal["tiny", "quick", "full"]

SECTION_NAMES = ("steps", "memory", "layers", "compiled", "probes", "scaling")
"""In the order in which they run."""


@dataclass(frozen=True)
class Limits:
    """When to stop timing one comparison.

    Attributes:
        rounds: The most rounds, in each of which every alternative has its turn.
        seconds: About how long, but no fewer rounds than quartiles need.
    """

    rounds: int
    seconds: float


_LIMITS: dict[Suite, Limits] = {
    "tiny": Limits(2, 0.01),
    "quick": Limits(101, 1.2),
    "full": Limits(501, 20.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Measure what FOGZO costs here, beside its floor, plain layers and other libraries."""

    suite: Suite = "quick"
    """quick takes about a minute, full about a quarter of an hour; tiny shows that all runs."""
    output_dir: Path = Path("runs/bench")
    """Folder of results.json and bench.svg."""
    threads: int = 1
    """Threads of torch, in every process."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, mps, ..."""
    only: tuple[str, ...] = ()
    """Sections to run, of steps, memory, layers, compiled, probes and scaling; by default all."""
    rounds: int | None = None
    """Most rounds of a comparison; by default the suite's."""
    seconds: float | None = None
    """About how long one comparison is timed; by default the suite's."""

    def check(self) -> None:
        """Raise a `ValueError` if this cannot be measured.

        Not at construction, where the command line's parser would draw a frame around the message.
        """
        for name in ("threads", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}: --{name} 3")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}: --seconds 2")
        for name in self.only:
            if name not in SECTION_NAMES:
                close = get_close_matches(name, SECTION_NAMES, n=1)
                hint = f"--only {close[0] if close else SECTION_NAMES[0]}"
                raise ValueError(
                    f"no section {name!r}: choose from {', '.join(SECTION_NAMES)}, "
                    f"for example {hint}"
                )

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections to run, each once."""
        return tuple(name for name in SECTION_NAMES if not self.only or name in self.only)

    @property
    def limits(self) -> Limits:
        """How long to time one comparison."""
        own = _LIMITS[self.suite]
        return Limits(
            own.rounds if self.rounds is None else self.rounds,
            own.seconds if self.seconds is None else self.seconds,
        )
