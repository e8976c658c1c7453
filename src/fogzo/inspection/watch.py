"""Counting, as training goes on, which codes change and which changes undo the last one."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fogzo.collectives import shard_like, sum_over_shards
from fogzo.inspection.layers import (
    Numbers,
    alive_channels,
    backward_ran,
    dead_channels,
    gets_gradient,
    quantized_layers,
)
from fogzo.inspection.records import Inspection
from fogzo.inspection.snapshot import inspected
from fogzo.layers import QuantizedLayer

_SAMPLE = 4096  # weights of a layer whose movement is followed
# Of the mean movement of weights that have a gradient.
_STILL = 0.1


class Watch:
    """Inspects a model every so many steps, and before that counts flips for some steps.

    Call `update` once per optimizer step. Where gradients are to be seen (channels without one are
    dead), call it between backward and ``zero_grad``, before an estimator adds noise to them:

    ``loss.backward(); watch.update(); estimator.refine_grads_(...); optimizer.step()``

    While it counts, the ``window`` steps before each inspection, it keeps 2 bytes per weight (of
    each rank's shard) and rounds the weights once per step; else nothing, so a run that is resumed
    between two windows has the same inspections.

    Args:
        model: Quantized.
        every: Steps from one inspection to the next.
        window: Steps over which flips are counted, at most ``every``.

    Attributes:
        step: Calls so far.
        history: The inspections so far.

    Raises:
        ValueError: If nothing is quantized, or a number is not positive.
    """

    def __init__(self, model: nn.Module, every: int = 100, window: int = 20) -> None:
        for name, value in (("every", every), ("window", window)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be a number of steps, 1 or more, got {value!r}: "
                    "Watch(model, every=100, window=20)"
                )
        quantized_layers(model)
        self.model, self.every, self.window = model, every, min(window, every)
        self.step = 0
        self.history: list[Inspection] = []
        self._counters: dict[str, _Counter] = {}

    def update(self, forward: Callable[[], object] | None = None) -> Inspection | None:
        """Count a step. With sharded weights, all ranks call it together.

        Args:
            forward: Runs the model on a batch, if clipped inputs are to be counted: once per
                inspection; see `inspect`.

        Returns:
            An inspection after every so many calls, else None. Its findings take the earlier ones
            into account.
        """
        self.step += 1
        until = -self.step % self.every
        if until > self.window:
            return None
        layers = quantized_layers(self.model)
        trains = backward_ran(layers)
        for name, layer in layers:
            self._counters.setdefault(name, _Counter()).see(layer, trains)
        if until:
            return None
        inspection = inspected(
            self.model,
            layers,
            {name: self._counters[name].numbers(layer) for name, layer in layers},
            forward,
            step=self.step,
            steps_counted=max(self._counters[name].steps for name, _ in layers),
            history=self.history,
        )
        self.history.append(inspection)
        for counter in self._counters.values():
            counter.begin()
        if self.window < self.every:
            self._counters.clear()
        return inspection

    def state_dict(self) -> dict[str, int]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where `state_dict` was taken; the history stays what it is.

        Raises:
            ValueError: If it is not a state of a watch.
        """
        given = state_dict if isinstance(state_dict, dict) else {}
        if not (set(given) == {"step"} and isinstance(given["step"], int) and given["step"] >= 0):
            raise ValueError(
                f"expected one integer, step, got {state_dict!r:.80}: "
                "watch.load_state_dict(checkpoint['watch'])"
            )
        if self.step != given["step"]:
            self._counters.clear()
        self.step = int(given["step"])


class _Counter:
    """Counts for one weight, of this rank's shard.

    Attributes:
        steps: Over which changes were counted.
    """

    def __init__(self) -> None:
        self._codes: Tensor | None = None
        self._last: Tensor | None = None  # the direction of each code's last change, -1, 0 or 1
        self._sample: Tensor | None = None  # of the weights in step sizes
        self._was_in_float = False
        self.begin()

    def begin(self) -> None:
        """Count from here on."""
        self.steps = 0
        self._flips: list[Tensor] = []
        self._back: list[Tensor] = []
        self._path: Tensor | None = None
        self._masked: Tensor | None = None
        self._alive: Tensor | None = None

    @torch.no_grad()
    def see(self, layer: QuantizedLayer, trains: bool) -> None:
        """Compare with the last time.

        Args:
            layer: The layer of the weight.
            trains: Whether `backward_ran`.
        """
        if layer.is_in_float != self._was_in_float:  # step sizes were measured anew, so all moved
            self._was_in_float, self._codes = layer.is_in_float, None
            self.begin()
        whole = layer.in_step_sizes()
        x = shard_like(whole, layer.weight)
        grid = layer.quantizer.grid
        codes = grid.round_to_code(x).to(_code_dtype(grid.low_code, grid.high_code))
        flat = x.reshape(-1)
        stride = max(1, flat.numel() // _SAMPLE)
        sample = flat[::stride].to(torch.promote_types(x.dtype, torch.float32), copy=True)
        masked = ~gets_gradient(layer, sample)
        before, sample_before = self._codes, self._sample
        if before is not None and sample_before is not None and before.shape == codes.shape:
            assert self._last is not None
            up, down = codes > before, codes < before
            self._back.append(((up & (self._last < 0)) | (down & (self._last > 0))).sum())
            self._flips.append((up | down).sum())
            self._last.masked_fill_(up, 1).masked_fill_(down, -1)
            path = (sample - sample_before).abs_()
            self._path = path if self._path is None else self._path.add_(path)
            self._masked = masked if self._masked is None else self._masked & masked
            self.steps += 1
        else:
            self._last = torch.zeros_like(codes, dtype=torch.int8)
        self._codes, self._sample = codes, sample
        alive = alive_channels(layer, whole, trains)
        if alive is not None:
            self._alive = alive if self._alive is None else self._alive | alive

    @torch.no_grad()
    def numbers(self, layer: QuantizedLayer) -> Numbers:
        """What was counted, over all ranks."""
        found = {"dead": dead_channels(layer, self._alive)}
        if not self.steps:
            return found
        assert self._path is not None and self._masked is not None
        free = ~self._masked
        moved = (self._path * free).sum()
        sums: Sequence[Tensor] = (
            *(torch.stack(counts).sum() for counts in (self._flips, self._back)),
            *(moved, free.sum(), self._path.new_tensor(len(free)), self._path.sum()),
        )
        params = [layer.weight] * len(sums)
        flips, back, moved_sum, moving, seen, path = sum_over_shards(sums, params)
        if not math.isfinite(path):
            return found  # weights that are not finite have no distance, and no codes that flip
        # All of it may be masked.
        typical = moved_sum / moving if moving else path / max(seen, 1)
        still = (self._masked & (self._path < _STILL * typical)).sum()
        (frozen,) = sum_over_shards([still.double()], [layer.weight])
        found |= {
            "flips": flips / self.steps / layer.weight.numel(),
            "flips_back": back / flips if flips else 0.0,
            "moved": typical / self.steps,
            "frozen": frozen / seen if seen else 0.0,
        }
        return found


def _code_dtype(low: int, high: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int8, torch.int16):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return dtype
    return torch.int32
