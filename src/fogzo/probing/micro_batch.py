"""One forward pass of the loop's own, kept with all that it depended on, to be run again."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fogzo.probing.rng import RngState


class MicroBatch:
    """A function and its arguments, and the state that its first call began from.

    That state is the random streams, the mode of every module and autocast. Containers among the
    arguments are copied, so that what the function or the loop takes out of a dict of tensors is
    there again; tensors are not copied but watched.

    Args:
        compute_loss: Computes the loss, a scalar, or something that holds it; see `loss_of`.
        args: Its arguments.
        kwargs: Its keyword arguments.
        rng: The random streams as they are.
        models: The models whose modes matter.

    Attributes:
        compute_loss: The function.
        value: The loss of the first call.
        weight: What backward() has multiplied it by so far, as a scalar tensor.
        hook: What is to be removed from the loss when it counts no more.
    """

    hook: RemovableHandle

    def __init__(
        self,
        compute_loss: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rng: RngState,
        models: Sequence[nn.Module],
    ) -> None:
        self.compute_loss = compute_loss
        self._args, self._kwargs = _copied(args), _copied(kwargs)
        self._rng = rng
        self._modes = [(m, m.training) for model in models for m in model.modules()]
        self._autocast = [Autocast.now(kind) for kind in rng.device_types]
        self._versions: list[tuple[Tensor, int]] = []
        self.value = self.weight = torch.zeros(())

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Call the function for the first time, and return what it returns, and the loss in it.

        Raises:
            ValueError: If there is no loss in it, or it changes its arguments in place.
        """
        self._versions = list(_versions((self._args, self._kwargs)))
        output = self.compute_loss(*args, **kwargs)
        loss = loss_of(output)
        self.value = loss.detach().clone()
        self.check_arguments("compute_loss changes it")
        return output, loss

    def again(self) -> Tensor:
        """The loss at the weights as they are now. Belongs under `torch.no_grad`."""
        for module, mode in self._modes:
            if module.training is not mode:
                module.training = mode
        self._rng.restore()
        with ExitStack() as blocks:
            for recorded in self._autocast:
                if recorded != Autocast.now(recorded.device_type):
                    blocks.enter_context(torch.autocast(**recorded._asdict()))
            return loss_of(self.compute_loss(*_copied(self._args), **_copied(self._kwargs)))

    def check_arguments(self, who: str = "it was changed after record") -> None:
        """Raise a `ValueError` if a tensor among the arguments has changed since the first call."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise ValueError(
                    f"an argument of compute_loss, a tensor of shape {tuple(tensor.shape)}, is not "
                    f"what it was: {who} in place, so the loss cannot be computed again. Change a "
                    "copy, x = x.mul(2) and not x.mul_(2), or record one: "
                    "estimator.record(compute_loss, x.clone(), y)"
                )


class Autocast(NamedTuple):
    """The state of autocast on one type of device, as `torch.autocast` takes it."""

    device_type: str
    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool

    @classmethod
    def now(cls, device_type: str) -> "Autocast":
        """As it is at present."""
        return cls(
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
            torch.is_autocast_cache_enabled(),
        )


def loss_of(output: object) -> Tensor:
    """The loss in what a function returns: itself, the first of a tuple, "loss" of a dict, `.loss`.

    Raises:
        ValueError: If that is no scalar tensor.
    """
    if isinstance(output, Tensor):
        loss: object = output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple | list):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
        return loss
    came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else None
    raise ValueError(
        "compute_loss must return the scalar loss that backward() differentiates, alone, first in "
        'a tuple, as "loss" in a dict or as .loss of an object, got '
        f"{came or type(output).__name__}: estimator.record(lambda: losses.mean())"
    )


def _copied(value: Any) -> Any:
    """The value with containers of its own, and the same tensors in them."""
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _copied(item)
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _versions(value: Any) -> Iterator[tuple[Tensor, int]]:
    """Each tensor in nested containers, and how often it has been changed in place."""
    if isinstance(value, Tensor):
        if not value.is_inference():  # nobody counts there
            yield value, value._version
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _versions(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _versions(item)
