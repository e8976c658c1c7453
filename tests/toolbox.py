"""What tests of the library share: networks, data, quantizers, and what a call may borrow."""

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

import fogzo
from fogzo.probing import stacked
from fogzo.probing.measure import Evaluate
from fogzo.quantizers import Quantizer
from forked import Python, finish

# Rows of 8 weights hold groups of 4, and rotated blocks.
PRESETS: dict[str, Callable[..., Quantizer]] = {
    "fixed": lambda **options: fogzo.fixed(2, **options),
    "fixed per channel": lambda **options: fogzo.fixed(4, granularity="channel", **options),
    "lsq": lambda **options: fogzo.lsq(2, **options),
    "lsq per channel": lambda **options: fogzo.lsq(3, granularity="channel", **options),
    "lsq per group": lambda **options: fogzo.lsq(4, granularity=4, **options),
    "quest": lambda **options: fogzo.quest(2, **options),
    "bbq": lambda **options: fogzo.bbq(2, **options),
    "ternary": lambda **options: fogzo.ternary(**options),
    "sign": lambda **options: fogzo.sign(**options),
    "abs_max": lambda **options: fogzo.abs_max(4, **options),
}
ESTIMATORS: dict[str, Callable[..., fogzo.GradientEstimator]] = {
    "fogzo": lambda w, **options: fogzo.FogzoEstimator(w, noise_share=0.1, **options),
    "isotropic": lambda w, **options: fogzo.FogzoEstimator(
        w, noise_share=0.1, noise_shape="isotropic", **options
    ),
    "lambda only": lambda w, **options: fogzo.FogzoEstimator(w, noise_share=0.0, **options),
    "one-sided": lambda w, **options: fogzo.FogzoEstimator(
        w, noise_share=0.1, one_sided=True, **options
    ),
    "placebo": lambda w, **options: fogzo.PlaceboEstimator(w, noise_share=0.1, **options),
    "spsa": fogzo.SpsaEstimator,
    "control variate": fogzo.ControlVariateEstimator,
}
WAYS: tuple[Evaluate, ...] = get_args(Evaluate)


# Cases


def every(name: str, cases: Mapping[str, object]) -> pytest.MarkDecorator:
    """Run a test with each of these values."""
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


def pairwise(**choices: Collection[Any]) -> pytest.MarkDecorator:
    """Run a test with so many cases that every two values of two arguments meet in one of them.

    Args:
        choices: The values of each argument; of a mapping its keys.
    """
    cases = list(itertools.product(*choices.values()))
    pairs = [
        set(itertools.combinations(enumerate(range_of), 2))
        for range_of in itertools.product(*(range(len(values)) for values in choices.values()))
    ]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(cases[best])
    return pytest.mark.parametrize(
        list(choices), chosen, ids=lambda value: getattr(value, "__name__", str(value))[:40]
    )


EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS)
EVERY_QUANTIZER = every("quantizer", {name: make() for name, make in PRESETS.items()})
IN_16_BITS = pytest.mark.filterwarnings("ignore:the latent weights .* are kept in 16 bits")
EVERY_WAY = pytest.mark.parametrize("evaluate", WAYS)


# Networks and data


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that do not depend on the global stream, the same on every device."""
    generator = Generator("cpu").manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device())


def fill(model: nn.Module, std: float = 0.3, seed: int = 0) -> nn.Module:
    """The model with parameters that do not depend on the global stream."""
    generator = Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            drawn = torch.empty(param.shape, dtype=param.dtype, device="cpu")
            param.copy_(drawn.normal_(0, std, generator=generator))
    return model


def everything(module: nn.Module, name: str) -> bool:
    """A filter that leaves no layer out, heads included."""
    return True


class Net(nn.Module):
    """Two quantized layers, a float head, batch statistics, dropout and a buffer of its own."""

    def __init__(self, dropout: float = 0.3, norm: Callable[[int], nn.Module] = nn.BatchNorm1d):
        super().__init__()
        self.before = nn.Dropout(dropout)
        self.first = nn.Linear(8, 8)
        self.norm = norm(8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(2))
        fill(self, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.norm(self.first(self.before(x))).tanh())
        return self.head(self.second(h).tanh())


def quantized_net(preset: str = "fixed", **options: Any) -> Net:
    """`Net` with both inner layers quantized."""
    return fogzo.quantize_(Net(**options), PRESETS[preset]())


def batch(rows: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Inputs and targets of `Net`."""
    return [draw(rows, size, seed=seed + size).to(dtype) for size in (8, 3)]


def told(mistake: Callable[[], object]) -> str:
    """What a `ValueError` says, for a rank to report."""
    try:
        mistake()
    except ValueError as error:
        return str(error)
    return "nothing"


def backward(loss_of: Callable[[], Tensor]) -> Tensor:
    """The loss, after its backward pass."""
    loss = loss_of()
    loss.backward()
    return loss


def in_chunks_of(
    count: int, monkeypatch: pytest.MonkeyPatch, weights: Sequence[fogzo.QuantizedWeight]
) -> None:
    """Let stacked probes of these weights take so many directions at a time."""
    params = [weight.param for weight in weights]
    size = sum(p.numel() * (p.itemsize + max(p.itemsize, 4)) for p in params)
    monkeypatch.setitem(stacked._MAX_BYTES, torch.get_default_device().type, count * size)


def run_ranks(program: str, folder: Path, count: int = 2, timeout: float = 180) -> list[Any]:
    """Run a file in processes that form a process group, and load what each of them saved.

    Args:
        program: The file, run as ``python FILE RANK FOLDER``, which saves ``FOLDER/RANK.pt``.
        folder: An empty folder.
        count: How many processes.
        timeout: Seconds that each may take.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    finish(*[Python(program, rank, folder) for rank in range(count)], timeout=timeout)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@contextmanager
def joined(rank: int, folder: Path, count: int = 2) -> Iterator[None]:
    """The process group of `run_ranks`, in one of its processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    yield
    dist.barrier()
    dist.destroy_process_group()


def cpu_mesh() -> Any:
    """The ranks of `joined`, for `fully_shard`, which takes a GPU by itself where there is one."""
    from torch.distributed.device_mesh import init_device_mesh  # here, as it takes a second

    return init_device_mesh("cpu", (dist.get_world_size(),))


# What a call may borrow


@contextmanager
def streams_put_back(seed: int | None = None) -> Iterator[None]:
    """Let a test draw from the global streams, from a seed, without shifting those of others."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def assert_bits_equal(a: Tensor, b: Tensor) -> None:
    """Equal, where `torch.equal` calls NaN different from itself and 0 equal to -0."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.detach().view(kind), b.detach().view(kind))


class Snapshot:
    """All that a call may borrow, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = [dict(m._parameters) | dict(m._buffers) for m in model.modules()]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.values = {name: tensor.detach().clone() for name, tensor in tensors}
        self.grads = {
            name: (p.grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters()
        }
        self.modes = [m.training for m in model.modules()]
        self.hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        self.torch_streams = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        self.streams = random.getstate(), str(np.random.get_state())
        self.gradients_on = torch.is_grad_enabled()

    def assert_same(self, rewritten: Collection[str] = ()) -> None:
        """Everything is bit for bit as it was, but the gradients of the ``rewritten``."""
        now = Snapshot(self.model)
        for mine, its in zip(self.own, now.own, strict=True):
            assert mine.keys() == its.keys()
            assert all(mine[name] is its[name] for name in mine), "another tensor"
        for name, value in self.values.items():
            assert_bits_equal(now.values[name], value)
        for name, (grad, value) in self.grads.items():
            assert now.grads[name][0] is grad, f"{name}.grad is another tensor"
            if grad is not None and name not in rewritten:
                assert_bits_equal(grad, value)
        assert now.modes == self.modes
        assert now.hooks == self.hooks
        assert all(map(torch.equal, now.torch_streams, self.torch_streams))
        assert now.streams == self.streams
        assert now.gradients_on == self.gradients_on


class Vandal:
    """A closure that disturbs all it can reach, and ends as it is told at a given call."""

    def __init__(
        self, model: Net, loss_of: Callable[[], Tensor], ending: str = "returns", at: int = 0
    ) -> None:
        self.model, self.loss_of, self.ending, self.at, self.calls = model, loss_of, ending, at, 0

    def __call__(self) -> Tensor:
        loss = self.loss_of()
        random.random()
        np.random.rand(3)
        torch.rand(5)
        self.model.seen.add_(1)
        self.model.seen = loss * torch.ones(2)
        if isinstance(self.model.norm, nn.BatchNorm1d):
            self.model.norm.running_mean = self.model.norm.running_mean * 3 + 1
        self.model.zero_grad()
        self.model.eval()
        self.model.dropout.train()
        torch.set_grad_enabled(True)
        self.calls += 1
        if self.calls > self.at:
            if self.ending == "raises":
                raise OSError("disk gone")
            if self.ending == "is interrupted":
                raise KeyboardInterrupt
            if self.ending == "returns NaN":
                return loss * math.nan
        return loss
