"""What a benchmark measures and how long it may take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fogzo_lab.options import Example, OneOf, Options, PositiveFloat, PositiveInt
from fogzo_lab.system.devices import Device

Suite = Literal["tiny", "quick", "full"]

SECTION_NAMES = ("steps", "memory", "layers", "compiled", "probes", "scaling", "export")
"""In the order in which they run."""

_Section = Annotated[str, OneOf(SECTION_NAMES)]


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
class BenchConfig(Options):
    """Measure what FOGZO costs here, beside its floor, plain layers and other libraries."""

    suite: Suite = "quick"
    """quick takes about a minute, full about 15 minutes; tiny shows that all runs."""
    output_dir: Path = Path("runs/bench")
    """Folder of results.json and bench.svg."""
    threads: PositiveInt = 1
    """Threads of torch, in every process."""
    device: Device = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1, ..."""
    only: Annotated[tuple[_Section, ...], Example(("steps",))] = ()
    """Sections to run, of steps, memory, layers, compiled, probes, scaling and export; by default
    all."""
    rounds: Annotated[PositiveInt | None, Example(3)] = None
    """Most rounds of a comparison; by default the suite's."""
    seconds: Annotated[PositiveFloat | None, Example(2.0)] = None
    """About how long one comparison is timed; by default the suite's."""

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
