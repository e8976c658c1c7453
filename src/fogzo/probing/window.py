"""The micro-batches that the present gradients are made of.

A loop may divide a loss by the number of its micro-batches, scale it, add another one to it, skip
it or call backward later. What counts is what backward() multiplied each loss by on its way to the
weights, which a hook on the loss sees: the gradients are those of ``sum_i weight_i * loss_i``.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fogzo.collectives import is_sharded, local, num_ranks
from fogzo.layers.weights import QuantizedWeight
from fogzo.probing.lender import Lender
from fogzo.probing.micro_batch import MicroBatch
from fogzo.wording import caveat

Version = tuple[int, int] | None
"""Which tensor a gradient is, and how often it was changed in place; None where there is none."""

_SAMPLE = 64  # elements of each gradient, by which to tell what it was multiplied by
_UNIFORM = 1e-2  # angle; gradients in 16 bits are rounded when they are unscaled


class _LaterStart(NamedTuple):
    """What was there when a backward pass after the window's first one began.

    Attributes:
        known: How many micro-batches.
        others: The backward passes that had reached no recorded loss.
        after: A sample of the gradients at the end of the recorded backward pass before.
        now: The same sample at this start.
    """

    known: int
    others: frozenset[int]
    after: Tensor | None
    now: Tensor | None

    def has_gradients(self) -> bool:
        """Whether they are there still, and not all zero (on this rank)."""
        return self.now is None or bool(self.now.any())


def gradient_versions(weights: Sequence[QuantizedWeight]) -> list[Version]:
    """Which tensors the gradients are, and how often each was changed in place."""
    grads = [weight.param.grad for weight in weights]
    return [None if grad is None else (id(grad), local(grad)._version) for grad in grads]


class Window:
    """Records losses, and keeps those that backward() has been called on since the last refine.

    A recorded loss that nobody differentiates lives as long as its graph and is no part of it. If
    the gradients are dropped (a skipped step, an exception), so is what they were made of, when
    the next backward begins.

    Args:
        weights: Whose gradients.
        lender: Knows the models and the random streams.
    """

    def __init__(self, weights: Sequence[QuantizedWeight], lender: Lender) -> None:
        self._weights = weights
        self._lender = lender
        # FSDP keeps gradients to itself until a micro-batch synchronises them.
        self._is_sharded = any(is_sharded(weight.param) for weight in weights)
        self._task = -1  # autograd's number of the backward pass that goes on
        self._seen: list[tuple[MicroBatch, Tensor]] = []  # in it, and their incoming gradients
        self._at_start: list[Version] = []
        self._micro_batches: list[MicroBatch] = []
        self._hooks: list[Any] = []
        self.clear()

    def __len__(self) -> int:
        return len(self._micro_batches)

    def clear(self) -> None:
        """Begin a new window."""
        for hook in (*self._hooks, *(micro_batch.hook for micro_batch in self._micro_batches)):
            hook.remove()
        self._hooks, self._micro_batches = [], []
        self._others: set[int] = set()  # backward passes that have reached no recorded loss
        self._versions: list[Version] = []
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        self._later: list[_LaterStart] = []

    def record(
        self, compute_loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function, and return what it returns, whose loss is observed from now on."""
        rng, models = self._lender.rng_state(), self._lender.models
        micro_batch = MicroBatch(compute_loss, args, kwargs, rng, models)
        output, loss = micro_batch.first(args, kwargs)
        if loss.requires_grad:
            micro_batch.hook = loss.register_hook(partial(self._backward_begins, micro_batch))
        return output

    def loss(self, grad_scale: float) -> "RecordedLoss":
        """What the gradients, divided by ``grad_scale``, are the gradient of.

        Raises:
            ValueError: If they are of something else too, or an argument has changed.
        """
        for micro_batch in self._micro_batches:
            micro_batch.check_arguments()
        self._forget_dropped()
        why = None
        if self._before is not None and self._on_any_rank(self._before.any()):
            why = "were not zero when the first recorded loss was differentiated"
        if self._others or self._seen:
            why = "were added to by a backward pass without a recorded loss, or one that failed"
        if why is not None:
            raise ValueError(
                f"the gradients {why}, so they hold more than the recorded losses. Refine once per "
                "optimizer step, after the last backward(), drop the gradients after it, "
                "optimizer.zero_grad(), and record every loss that depends on the quantized weights"
                + caveat("Gradient accumulation")
            )
        weights = [micro_batch.weight for micro_batch in self._micro_batches]
        factors = torch.stack([weight.to(weights[0].device) for weight in weights])
        factor = self._factor()
        factors *= (factor or 1.0) / grad_scale
        parts = list(zip(factors.tolist(), self._micro_batches, strict=True))
        # Among several ranks somebody may average by hand, which leaves nothing to be said.
        return RecordedLoss(parts, was_changed=factor is None and num_ranks() == 1)

    def _backward_begins(self, micro_batch: MicroBatch, grad: Tensor) -> None:
        """The hook on a loss: a backward pass has reached it."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            failed = bool(self._seen)  # the last one has not come to its end
            self._task, self._seen = task, []
            with torch.no_grad():
                self._at_start = gradient_versions(self._weights)
                if self._micro_batches and self._dropped():
                    self.clear()
                if self._micro_batches:
                    known, others = len(self._micro_batches), frozenset(self._others)
                    self._later.append(_LaterStart(known, others, self._after, self._sample()))
                    self._others |= {-1} if failed else set()
                else:
                    self.clear()
                    self._before = self._sample()
                    self._watch()
            self._others.discard(task)  # what it reached before this loss is of it
            self._queue(lambda: self._queue(self._backward_ends))  # after those of DDP and FSDP
        self._seen.append((micro_batch, grad.detach()))

    @torch.no_grad()
    def _backward_ends(self) -> None:
        seen, self._task, self._seen = self._seen, -1, []
        self._versions = gradient_versions(self._weights)
        if self._versions == self._at_start and not self._is_sharded:
            return  # torch.autograd.grad, say, which leaves the gradients alone
        for micro_batch, grad in seen:
            if not any(micro_batch is known for known in self._micro_batches):
                self._micro_batches.append(micro_batch)
            micro_batch.weight = micro_batch.weight.to(grad) + grad
        self._after = self._sample()

    def _watch(self) -> None:
        """Have each weight tell of the backward passes that reach it while the window lasts."""
        tell = partial(_tell, weakref.ref(self))
        for weight in self._weights:
            if weight.param.requires_grad and not self._is_sharded:
                self._hooks.append(weight.param.register_post_accumulate_grad_hook(tell))

    def _reached(self) -> None:
        """A backward pass has added to a gradient; those within another's are a part of it."""
        if self._task == -1:
            self._others.add(torch._C._current_graph_task_id())

    def _queue(self, callback: Callable[[], None]) -> None:
        """Have something called at the end of the backward pass that goes on."""
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(callback)

    def _forget_dropped(self) -> None:
        """Leave out what came before gradients were zeroed by `.data`, which counts no version.

        Only here are values read, which stops a GPU.
        """
        for start in reversed(self._later):
            were_there = start.after is not None and self._on_any_rank(start.after.any())
            if were_there and not self._on_any_rank(start.has_gradients()):
                for micro_batch in self._micro_batches[: start.known]:
                    micro_batch.hook.remove()
                del self._micro_batches[: start.known]
                self._others -= start.others
                self._before = None
                break
        self._later.clear()

    def _dropped(self) -> bool:
        """Whether the gradients of this window are gone."""
        grads = [w.param.grad for w in self._weights if w.param.grad is not None]
        if not grads:
            return any(self._versions)
        # Looking at them stops a GPU, so only if something has been done to them.
        # Asked of all ranks, as a version holds an id, which a later tensor of one may have again.
        if not self._on_any_rank(self._at_start != self._versions):
            return False
        return not self._on_any_rank(any(bool(local(grad).any()) for grad in grads))

    def _factor(self) -> float | None:
        """What the gradients have been multiplied by since the last backward (unscaled, clipped).

        None if something else was done to them: some were multiplied by more than others.
        """
        before, now = self._after, self._sample()
        if before is None or now is None or now.shape != before.shape:
            before = now = torch.zeros(1)
        before, now = before.cpu().double(), now.cpu().double()
        products = [before @ now, before @ before, now @ now]
        if self._is_sharded:  # a rank may hold zeros only, or nothing
            products = list(map(torch.tensor, self._lender.mean_over_ranks(products)))
        along, square_before, square_now = map(float, products)
        if not (0 < square_before < math.inf and 0 < square_now < math.inf):
            return 1.0  # nothing to compare with, or a gradient that is not finite
        cosine = along / math.sqrt(square_before * square_now)
        return along / square_before if cosine > math.cos(_UNIFORM) else None

    def _on_any_rank(self, flag: Tensor | bool) -> bool:
        """Whether it is so here or, of sharded gradients, on another rank, which asks as well."""
        return self._lender.on_any_rank(bool(flag)) if self._is_sharded else bool(flag)

    def _sample(self) -> Tensor | None:
        """A few elements of every gradient and its largest magnitude; None without gradients."""
        grads = [local(w.param.grad).flatten() for w in self._weights if w.param.grad is not None]
        parts = []
        for grad in grads:
            parts.append(grad[:: max(1, len(grad) // _SAMPLE)][:_SAMPLE].float())
            if len(grad):  # where most elements are zero, as an embedding's, a few may all be
                parts.append(torch.linalg.vector_norm(grad, torch.inf).float().reshape(1))
        return torch.cat([part.to(parts[0].device) for part in parts]) if parts else None


def _tell(window: "weakref.ref[Window]", param: Tensor) -> None:
    found = window()
    if found is not None:
        found._reached()


class RecordedLoss:
    """A closure: the weighted sum of the recorded losses, computed again.

    Args:
        parts: Micro-batches and the factor of each.
        was_changed: Whether something has been done to the gradients that is no factor, so that
            they are not this loss's any more.
    """

    _causes = (
        "compute_loss reads something that has changed since it was recorded (give it as an "
        "argument, estimator.record(compute_loss, x, y)), draws from a generator of its own, or "
        "counts its calls"
    )

    def __init__(
        self, parts: Sequence[tuple[float, MicroBatch]], was_changed: bool = False
    ) -> None:
        self._parts = parts
        self.was_changed = was_changed

    @property
    def causes(self) -> str:
        """Why the sum may be another one when it is computed again."""
        return getattr(self._parts[0][1].compute_loss, "causes", self._causes)

    @property
    def expected(self) -> Tensor:
        """The sum when it was differentiated."""
        return self._sum([micro_batch.value for _, micro_batch in self._parts])

    def __call__(self) -> Tensor:
        """The sum at the weights as they are now."""
        return self._sum([micro_batch.again() for _, micro_batch in self._parts])

    def _sum(self, losses: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=losses[0].dtype, device=losses[0].device)
        for (factor, _), loss in zip(self._parts, losses, strict=True):
            total = total + loss * factor
        return total
