"""Steps on several ranks: real processes on this machine that average gradients by gloo."""

import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn
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
        ranks: Number of processes.
        widths: Sizes of a perceptron's layers, from the input to the output.
        batch: Examples per step on each rank.
        threads: Threads of each rank.
        rounds: Rounds of turns, which all ranks must take together.
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
        deadline = time.monotonic() + _SECONDS_LIMIT
        processes = spawn(_rank, (settings, folder), nprocs=settings.ranks, join=False)
        assert processes is not None
        try:
            while not processes.join(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise NotHereError(f"the ranks took more than {_SECONDS_LIMIT:.0f} s")
        except ProcessException as error:
            said = str(error).strip().splitlines()[-1]
            raise NotHereError(f"rank {error.error_index} failed: {said:.150}") from error
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        return Turns(json.loads((folder / "rounds.json").read_text(encoding="utf-8")))


def _rank(rank: int, settings: RankSettings, folder: Path) -> None:
    """Run one process."""
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
