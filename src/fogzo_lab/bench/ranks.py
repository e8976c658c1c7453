"""Steps on several ranks: real processes on this machine that average gradients by gloo.

This module is also the program of each rank: ``python -m fogzo_lab.bench.ranks RANK FOLDER``.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fogzo import FogzoEstimator
from fogzo_lab.bench.cases import NotHereError
from fogzo_lab.bench.networks import mlp
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.bench.timing import stopwatch
from fogzo_lab.interleaved import Turns, take_turns

_CPU = torch.device("cpu")
_SECONDS_LIMIT = 300.0


@dataclass(frozen=True)
class RankSettings:
    """What every rank trains.

    Attributes:
        ranks: How many processes.
        widths: Of a perceptron, the input's and the output's among them.
        batch: Examples per step, on each rank.
        threads: Of each rank.
        rounds: Of turns, which all ranks must take together.
        calls: Steps per turn.
    """

    ranks: int
    widths: tuple[int, ...]
    batch: int
    threads: int
    rounds: int
    calls: int


def time_on_ranks(settings: RankSettings) -> Turns:
    """Interleaved STE steps and FOGZO steps, as rank 0 saw them.

    Raises:
        NotHereError: If torch has no gloo, or a rank fails.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise NotHereError("this build of torch has no gloo")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(asdict(settings)), encoding="utf-8")
        _run(settings.ranks, folder)
        return Turns(json.loads((folder / "rounds.json").read_text(encoding="utf-8")))


def _run(count: int, folder: Path) -> None:
    """Start all ranks and wait for them; none outlives this."""
    processes = []
    deadline = time.monotonic() + _SECONDS_LIMIT
    try:
        for rank in range(count):
            command = [sys.executable, "-m", "fogzo_lab.bench.ranks", str(rank), str(folder)]
            with (folder / f"{rank}.log").open("w", encoding="utf-8") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        while any(process.poll() is None for process in processes):
            # Others would wait for a rank that has failed.
            _check([process.returncode for process in processes], folder)
            if time.monotonic() > deadline:
                raise NotHereError(f"the ranks took more than {_SECONDS_LIMIT:.0f} s")
            time.sleep(0.05)
        _check([process.returncode for process in processes], folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _check(codes: Sequence[int | None], folder: Path) -> None:
    """Raise what a rank that has ended badly said last."""
    for rank, code in enumerate(codes):
        if code:
            lines = (folder / f"{rank}.log").read_text(encoding="utf-8").strip().splitlines()
            said = lines[-1] if lines else f"exit code {code}"
            raise NotHereError(f"rank {rank} failed: {said:.150}")


def _rank(rank: int, folder: Path) -> None:
    """What one process does."""
    given = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings = RankSettings(**given | {"widths": tuple(given["widths"])})
    torch.set_num_threads(settings.threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.ranks
    )
    turns = _turns(settings)
    if rank == 0:
        (folder / "rounds.json").write_text(json.dumps(turns.rounds), encoding="utf-8")
    gc.collect()  # a wrapper that outlived its process group could wait for it for ever
    dist.barrier()
    dist.destroy_process_group()


def _turns(settings: RankSettings) -> Turns:
    network = mlp(settings.widths, settings.batch, _CPU, wrap=DistributedDataParallel)
    steps = Steps(network)
    estimator = FogzoEstimator(network.weights)
    alternatives = {
        "STE step": stopwatch(steps.ste, _CPU),
        "FOGZO step": stopwatch(lambda: steps.refined(estimator), _CPU),
    }
    calls = dict.fromkeys(alternatives, settings.calls)
    take_turns(alternatives, calls, 2)  # warm-up
    return take_turns(alternatives, calls, settings.rounds)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
