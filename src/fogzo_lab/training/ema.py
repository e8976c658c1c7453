"""An exponential moving average of a model's weights, to evaluate instead of the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor, nn

from fogzo.collectives import is_sharded, local, reshard, shard_like


class EmaState(TypedDict):
    """The average in a checkpoint."""

    updates: int
    average: dict[str, Tensor]


class Ema:
    """The moving average of a model's parameters and floating-point buffers.

    Latent weights and learned step sizes of quantized layers are averaged, so that within `applied`
    the codes are those of the averaged latent weights. Integer buffers, such as BatchNorm's count
    of batches, stay as they are in the model.

    The average starts from the weights at the first update, so that it includes neither random
    weights nor step sizes that are not measured yet. Young averages forget faster: the decay of
    update t, counted from 0, is at most (1 + t) / (10 + t).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> ema = Ema(model, decay=0.99)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(model.weight, value)  # an optimizer's step
        ...     ema.update()
        >>> with ema.applied():
        ...     round(model.weight.item(), 4)  # 2/11 of 1, the rest of 2
        1.8182
        >>> model.weight.item()
        2.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start an average of a model.

        Args:
            model: Quantized already and, with FSDP, sharded: each rank averages its own part.
            decay: Fraction of the old average that an update keeps, in (0, 1).

        Raises:
            ValueError: If the decay is not in (0, 1).
        """
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {decay}: --ema-decay 0.99")
        self.decay = decay
        self.updates = 0
        self._model = model
        # Kept, as FSDP exposes gathered weights between a forward pass and its backward pass.
        reshard([model])
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._live = {name: t.detach() for name, t in tensors if t.is_floating_point()}
        self._average = {name: tensor.clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights; call it after every step of the optimizer."""
        average, live = _parts(self._average), _parts(self._live)
        if self.updates == 0:
            torch._foreach_copy_(average, live)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(average, live, 1 - decay)
        self.updates += 1

    def restart(self) -> None:
        """Begin the average anew at the next update."""
        self.updates = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block, then its own, bit for bit."""
        kept = [tensor.clone() for tensor in _parts(self._live)]
        try:
            self._overwrite(_parts(self._average))
            yield
        finally:
            self._overwrite(kept)

    def state_dict(self) -> EmaState:
        """The average by name, sharded as the model is, and the number of updates."""
        return {"updates": self.updates, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: EmaState) -> None:
        """Load the result of `state_dict`; whole tensors are sharded as the model is.

        Raises:
            ValueError: If it is of another model.
        """
        given = state["average"]
        own = {name: (t.shape, t.dtype) for name, t in self._average.items()}
        theirs = {name: (t.shape, t.dtype) for name, t in given.items()}
        differing = sorted({name for name, _ in own.items() ^ theirs.items()})
        if state["updates"] < 0:
            raise ValueError(f"an average has 0 updates or more, got {state['updates']}")
        if differing:
            raise ValueError(
                f"this average is of another model, which differs in {', '.join(differing[:5])}: "
                "load it into a model that is built and quantized by the same config"
            )
        for name, average in self._average.items():
            loaded = given[name]
            part = local(loaded) if is_sharded(loaded) else shard_like(loaded, average)
            local(average).copy_(part)
        self.updates = state["updates"]

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(_parts(self._live), values)
        reshard([self._model])  # else FSDP would go on with what it has gathered


@torch.no_grad()
def _parts(tensors: dict[str, Tensor]) -> list[Tensor]:
    """This rank's parts of the tensors, in their own memory."""
    return [local(tensor) for tensor in tensors.values()]
