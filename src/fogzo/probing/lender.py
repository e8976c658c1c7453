"""Lending weights to a closure, with everything borrowed given back bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fogzo.collectives import (
    compute_device,
    is_sharded,
    local,
    mean_over_ranks,
    recover,
    reshard,
    without_broadcasts,
)
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.rng import RngState
from fogzo.wording import caveat

Closure = Callable[[], Tensor | float]


class Lender:
    """Lends the weights to a closure and takes them back.

    While a loan lasts, probes run without gradients, in the mode the model is in (train mode: the
    function that backward saw), with the step sizes of the unperturbed weights, and each from the
    same random state and the same buffers. When it ends, also by an exception, the weights come
    back from a copy, and gradients, buffers, modes, random streams and the autocast cache are as
    they were.

    All of it belongs under `torch.no_grad`, as the weights are edited in place.

    Each rank edits and copies its own shards of weights that FSDP has sharded. The whole weights
    that FSDP gathered are freed before every probe and at the end. DDP broadcasts no buffers
    meanwhile.

    Args:
        weights: What may be perturbed.
        model: The model, if the records do not name it: its buffers and modes are protected.

    Attributes:
        models: The models that are known.
        recorded_rng: Where every probe's random streams start, if not where the loan's do: the
            `rng_state` before backward's own forward pass.

    Raises:
        ValueError: If weights are sharded and nothing names their model.
    """

    def __init__(self, weights: Sequence[QuantizedWeight], model: nn.Module | None = None) -> None:
        models = [model, *(weight.model for weight in weights)]
        self.models = list(dict.fromkeys(m for m in models if m is not None))
        self._sharded = [weight for weight in weights if is_sharded(weight.param)]
        self._offloaded = any(compute_device(w.param) != w.param.device for w in self._sharded)
        if self._sharded and not self.models:
            raise ValueError(
                f"{self._sharded[0].name!r} is sharded, and its model must be known, so that no "
                "rank uses weights gathered before the perturbation: give the estimator "
                "model=model, the module that fully_shard was called on last"
            )
        self._weights = weights
        self._lent: list[Tensor] = []  # shards, in the weights' own memory
        self._saved: list[Tensor] = []
        self._buffer_copies = _BufferCopies([])
        self.recorded_rng: RngState | None = None
        self._replay: RngState | None = None
        self._met_ddp: dict[Any, bool] = {}

    def mean_over_ranks(self, numbers: Sequence[Tensor]) -> list[float]:
        """The mean of each scalar over the ranks that train this model.

        Those are the ranks of DDP's process group, if a forward pass of this loan went through
        DDP, else all.

        Raises:
            ValueError: If DDP does not average the gradients of these weights at present.
        """
        self._check_averaged()
        groups = {ddp.process_group for ddp in self._met_ddp}
        group = groups.pop() if len(groups) == 1 else None
        return mean_over_ranks(numbers, compute_device(self._weights[0].param), group)

    def on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on one of the ranks, which have to ask for it together."""
        return self.mean_over_ranks([torch.tensor(float(flag))]) != [0.0]

    def _check_averaged(self) -> None:
        alone = [ddp for ddp in self._met_ddp if not ddp.require_backward_grad_sync]
        ours = {id(weight.param) for weight in self._weights}
        if any(id(param) in ours for ddp in alone for param in ddp.parameters()):
            raise ValueError(
                "the gradients are this rank's own, and losses are averaged over ranks: refine "
                "outside of DDP's no_sync(), after the backward pass that averages the gradients; "
                "in accelerate write `with accelerator.accumulate(model):`, not "
                "accelerator.no_sync(model). LocalSGD, which averages weights alone, cannot be "
                "refined" + caveat("DDP")
            )

    def rng_state(self) -> RngState:
        """The random streams as they are, of the devices that the weights are on now."""
        return RngState({compute_device(weight.param) for weight in self._weights})

    @contextmanager
    def lend(self, weights: Sequence[QuantizedWeight], copy: bool = True) -> Iterator[None]:
        """Lend these weights while the context lasts, in which `evaluate` works.

        Args:
            weights: What may be moved in place.
            copy: Whether to put back a copy of them at the end; without one the caller restores
                what it moves, and `reset_` and `mirror_` do nothing.
        """
        self.reshard()
        before = self.rng_state()
        self._replay = self.recorded_rng or before
        modules = [module for model in self.models for module in model.modules()]
        with ExitStack() as loan:  # all of which is given back, whatever raises
            loan.callback(setattr, self, "_met_ddp", {})  # which no copy of this can have
            self._met_ddp = loan.enter_context(without_broadcasts())
            loan.callback(torch.clear_autocast_cache)
            loan.callback(before.restore)
            loan.enter_context(_modes_kept(modules))
            loan.callback(setattr, self, "_buffer_copies", _BufferCopies([]))  # keeps no copies
            self._buffer_copies = _BufferCopies(modules)
            loan.callback(self._buffer_copies.reset_)
            loan.enter_context(_parameters_kept(modules, [weight.param for weight in weights]))
            for weight in weights:
                if weight.hold_step_size is not nullcontext:
                    loan.enter_context(weight.hold_step_size())
            if copy:
                self._lent = [local(weight.param) for weight in weights]
                self._saved = [shard.clone() for shard in self._lent]
            try:
                yield
            except BaseException:
                if self._sharded:
                    recover(self.models)
                raise
            finally:
                self.reset_()
                if self._sharded:
                    reshard(self.models)
                self._lent, self._saved = [], []

    def reshard(self) -> None:
        """Leave no gathered weights behind that were, or are about to be, perturbed."""
        if not self._sharded:
            return
        reshard(self.models)
        held = {id(p) for model in self.models for p in model.parameters()}
        for weight in self._sharded:
            if id(weight.param) not in held:
                raise ValueError(
                    f"FSDP keeps a gathered copy of {weight.name!r}, out of reach of the model "
                    "that the estimator knows: give it model=model, the module that fully_shard "
                    "was called on last, and make it after sharding"
                )

    def holds(self, param: nn.Parameter) -> bool:
        """Whether a module of a known model holds this parameter."""
        return any(param is held for model in self.models for held in model.parameters())

    def reset_(self) -> None:
        """Put the saved weights back while the loan goes on."""
        if self._lent:
            torch._foreach_copy_(self._lent, self._saved)

    def mirror_(self) -> None:
        """Reflect every weight at its saved value: from ``w + p`` to ``w - p``."""
        if self._lent:
            torch._foreach_lerp_(self._lent, self._saved, 2.0)

    def evaluate(self, closure: Closure, reset_buffers: bool = True) -> Tensor:
        """The closure's loss at the weights as they are, a scalar tensor.

        Args:
            closure: Computes the loss.
            reset_buffers: Whether it begins with the buffers of the loan, or with those that the
                closure before it has left.

        Raises:
            ValueError: If the closure returns anything but one number.
        """
        self._begin(reset_buffers)
        try:
            with torch.no_grad():  # again, as a closure may leave gradients switched on
                loss = as_loss(closure())
                if self._offloaded:  # the GPU may still be copying the shards, which move next
                    torch.accelerator.synchronize()
                return loss
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                "the closure calls backward() or differentiates, and probes run without "
                "gradients. It must only return the loss: closure=lambda: loss_fn(model(x), y). "
                "If the loss itself contains derivatives (a gradient penalty, a physics-informed "
                "network), switch gradients on for them: `with torch.enable_grad():` in the closure"
            ) from error

    def differentiate(
        self, closure: Closure, weights: Sequence[QuantizedWeight]
    ) -> list[Tensor | None]:
        """The first-order gradients of the closure's loss; no ``.grad`` of any parameter changes.

        Returns:
            One per weight, None for those that the loss does not depend on.

        Raises:
            ValueError: If the closure returns anything but one number, or one without a history.
        """
        self._begin(reset_buffers=True)
        with torch.enable_grad():
            loss = closure()
        as_loss(loss)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            raise ValueError(
                "the closure's loss has no history to differentiate: it must be computed from the "
                "model's weights, without torch.no_grad(), .item() or .detach(): "
                "lambda: loss_fn(model(x), y)"
            )
        params = [weight.param for weight in weights]
        return list(torch.autograd.grad(loss, params, allow_unused=True))

    def modules_moved(self) -> list[nn.Module]:
        """The modules whose buffers the last closure has changed."""
        return self._buffer_copies.moved()

    def _begin(self, reset_buffers: bool) -> None:
        """Let a closure begin as every other one does."""
        assert self._replay is not None, "a closure outside of lend()"
        self.reshard()
        if reset_buffers:
            self._buffer_copies.reset_()
        self._replay.restore()
        # A cast of the unperturbed weight may be cached from an enclosing autocast block.
        torch.clear_autocast_cache()


def as_loss(value: object, what: str = "the closure must return") -> Tensor:
    """A loss as a scalar tensor of its own.

    Args:
        value: A number or a tensor of one element without dimensions.
        what: How a message begins.

    Raises:
        ValueError: If it is anything but one real number.
    """
    if isinstance(value, float | int) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return value.detach().clone()  # a closure may return the same tensor every time
    if isinstance(value, Tensor):
        came, fix = f"a tensor of shape {tuple(value.shape)}", "closure=lambda: losses.mean()"
    else:
        came, fix = type(value).__name__, "closure=lambda: model(**batch).loss"
    raise ValueError(
        f"{what} the scalar loss that backward() differentiated, got {came}: for example {fix}"
    )


class _BufferCopies:
    """The buffers of modules as they are, to put back.

    Args:
        modules: Whose.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        writable = [  # into an expanded one nothing can write
            (buffer, saved) for _, _, buffer, saved in self._kept if not _is_expanded(buffer)
        ]
        plain = [pair for pair in writable if _is_plain(pair[0])]
        self._plain = [buffer for buffer, _ in plain], [saved for _, saved in plain]
        self._others = [pair for pair in writable if not _is_plain(pair[0])]
        self._versions = {id(buffer): _version(buffer) for buffer, _ in self._others}

    def reset_(self) -> None:
        """Put every one back: what writes by way of ``.data`` counts no change."""
        if self._plain[0]:
            torch._foreach_copy_(*self._plain)
        for buffer, saved in self._others:
            # Those that were made in inference mode can be written to there alone.
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(saved)
            self._versions[id(buffer)] = _version(buffer)
        for module, name, buffer, _ in self._kept:
            module._buffers[name] = buffer  # the closure may have assigned another tensor

    def moved(self) -> list[nn.Module]:
        """The modules of those that differ from what they were."""
        return [kept[0] for kept in self._kept if self._has_moved(*kept)]

    def _has_moved(self, module: nn.Module, name: str, buffer: Tensor, saved: Tensor) -> bool:
        now = module._buffers.get(name)
        if now is None:
            return True
        if now.layout is saved.layout is torch.strided:
            return not torch.equal(now, saved)
        # Sparse ones cannot be compared, but count their changes.
        return now is not buffer or _version(now) != self._versions[id(buffer)]


def _is_plain(buffer: Tensor) -> bool:
    if type(buffer) is not Tensor or buffer.layout is not torch.strided or buffer.is_inference():
        return False
    # CUDA's copy of many at once has no kernel for these.
    return buffer.dtype not in (torch.uint16, torch.uint32, torch.uint64)


def _version(buffer: Tensor) -> int:
    """How often it was written to, which is not counted in inference mode."""
    return 0 if buffer.is_inference() else buffer._version


def _is_expanded(buffer: Tensor) -> bool:
    """Whether several of its entries are one number in memory."""
    if buffer.layout is not torch.strided:  # compressed sparse ones have no strides
        return False
    strides = zip(buffer.shape, buffer.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in strides)


@contextmanager
def _modes_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the modes, and put them back."""
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training is not mode:
                module.training = mode


@contextmanager
def _parameters_kept(modules: Sequence[nn.Module], lent: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lend no gradients, and see to the parameters that are not lent, which are many to copy.

    Raises:
        ValueError: If the closure has changed such a parameter in place.
    """
    named = [
        (module, name, param)
        for module in modules
        for name, param in module._parameters.items()
        if param is not None
    ]
    moved = set(map(id, lent))
    # Their modules shorten rows in place in every forward pass, not the same to the bit each time.
    renormalised = {
        id(param): param.detach().clone()
        for module, _, param in named
        if getattr(module, "max_norm", None) is not None and id(param) not in moved
    }
    others = [
        (module, name, param, renormalised.get(id(param), param.detach()), param._version)
        for module, name, param in named
        # The local part of a sharded one is FSDP's to move.
        if type(param) is nn.Parameter
        and id(param) not in moved
        and not (param.is_meta or param.is_inference())
    ]
    grads = [(param, param.grad) for param in (*lent, *(param for _, _, param in named))]
    for param, _ in grads:
        param.grad = None  # a closure that calls backward or zero_grad has its own
    try:
        yield
        for module, name, param, _, version in others:
            if param._version != version and id(param) not in renormalised:
                raise ValueError(
                    f"the closure changes the parameter {name!r} of a {type(module).__name__}, of "
                    f"shape {tuple(param.shape)}, in place, so every probe would change it once "
                    "more: update it (a moving average of weights, a codebook) outside of the "
                    "closure, after optimizer.step(), or make it a buffer, "
                    f"register_buffer({name!r}, ...), which is given back"
                    + caveat("Frozen weights")
                )
    finally:
        for param, grad in grads:
            param.grad = grad
        for *_, param, before, _ in others:
            if param.data_ptr() != before.data_ptr():  # as ``param.data = ...`` leaves it
                param.copy_(before)
