"""The numbers of one quantized layer as it is: codes, mask, thresholds, step sizes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fogzo.collectives import full, local, reshard, sum_over_shards
from fogzo.inspection.records import InFloat
from fogzo.layers import QuantizedLayer
from fogzo.layers.experts import ExpertMatrices
from fogzo.layers.padding import padding_rows
from fogzo.layers.quantized_layer import require_quantized
from fogzo.layers.selection import left_in_float, quantizable_layers
from fogzo.quantizers.granularity import to_rows
from fogzo.quantizers.step_sizes import MIN_STEP_SIZE
from fogzo.quantizers.surrogates import resolve_surrogate

# A slope below which a weight counts as masked: surrogates with tails never reach 0.
_NO_SLOPE = 0.01
# Of the distance of levels.
_NEAR = 0.05
# As in `fogzo.quantizers.step_sizes`: beside the others of its layer such a channel is nothing.
_NOTHING = 1e-4
_SAMPLE = 2**12  # weights, which tell a step size to a few percent
_CHUNK = 2**22  # codes that are counted at a time, as counting takes integers of 8 bytes

Numbers = dict[str, float]


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """The quantized layers by name, tied ones once.

    Raises:
        ValueError: If there are none, or weights are not there to be looked at.
    """
    layers = require_quantized(model, "fogzo.inspect(model)")
    reshard([model])  # else the weights of the outermost module may be gathered, and out of date
    found: dict[int, tuple[str, QuantizedLayer]] = {}
    for name, layer in layers.items():
        layer._check_own_weight()
        if layer.weight.is_meta:
            raise ValueError(
                f"the weight of {name!r} is on the meta device, offloaded: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings it back"
            )
        found.setdefault(id(layer.weight), (name, layer))
    return list(found.values())


def uses_of_weights(model: nn.Module) -> dict[int, list[QuantizedLayer]]:
    """All quantized layers of each weight, tied ones together, by the weight's identity."""
    uses: dict[int, list[QuantizedLayer]] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            uses.setdefault(id(module.weight), []).append(module)
    return uses


def matrices_in_float(model: nn.Module) -> list[InFloat]:
    """The matrices that are not quantized, largest first."""
    layers = quantizable_layers(model)
    quantized = {n: layer for n, layer in layers.items() if isinstance(layer, QuantizedLayer)}
    unusual = {item.name: item for item in left_in_float(model, layers, quantized, doubtful=set())}
    seen = {id(layer.weight) for layer in quantized.values()}
    left = [
        InFloat(
            name=name,
            weights=param.numel(),
            reason=unusual[name].reason if name in unusual else None,
            selectable=name not in unusual or unusual[name].selectable,
        )
        for name, param in model.named_parameters()
        if id(param) not in seen and sum(size > 1 for size in param.shape) > 1
    ]
    return sorted(left, key=lambda item: -item.weights)


@torch.no_grad()
def numbers_of(layer: QuantizedLayer, x: Tensor) -> Numbers:
    """What one look tells of a layer's weight. All numbers are finite, those of the finite ones.

    Args:
        layer: The layer.
        x: Its `in_step_sizes`.
    """
    grid = layer.quantizer.grid
    step = _step_size(layer)
    not_finite = _not_finite(layer, step)
    finite = x.isfinite()
    if not finite.all():
        x = x[finite]
    # What a dynamic scale measures of zeros is no step size.
    least = 0.0 if layer.quantizer.scale.has_state else 2 * MIN_STEP_SIZE
    step = step[step.isfinite() & (step > least)]
    scale = step.float() * (grid.spacing / (2 if grid.offset else 1))
    rounded = ((scale.half().float() - scale).abs() / scale).nan_to_num_(posinf=1.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cells = (wide - grid.thresholds[0]) / grid.spacing
    distance = (cells - cells.round().clamp_(0, len(grid.thresholds) - 1)).abs_()
    inside = int((distance <= 0.5).sum())
    near = int((distance <= _NEAR).sum())
    return {
        "step_size": float(step.median()) if scale.numel() else 0.0,
        "fp16_error": min(float(rounded.max()), 1.0) if scale.numel() else 1.0,
        "levels_used": _used_levels(layer, x),
        "masked": 1 - _share(gets_gradient(layer, x)) if x.numel() else 0.0,
        "empty": _share(next_to_nothing(layer)),
        "near_thresholds": near / inside if inside else 0.0,
        **_outgrown(layer, wide),
        "not_finite": not_finite,
    }


def gets_gradient(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Which weights have a slope to speak of."""
    grid = layer.quantizer.grid
    slope = resolve_surrogate(layer.quantizer.surrogate, grid).slope(x, grid)
    return slope if slope.dtype == torch.bool else slope > _NO_SLOPE


@torch.no_grad()
def next_to_nothing(layer: QuantizedLayer) -> Tensor:
    """Which output channels have weights that are zero, or nothing beside the other channels.

    The padding of an embedding is meant to be zero.
    """
    rows = _output_rows(layer, full(layer.weight.detach()))
    sizes = torch.linalg.vector_norm(rows.float(), dim=1)
    nothing, padding = sizes <= _NOTHING * sizes[sizes.isfinite()].mean(), padding_rows(layer)
    return nothing if padding is None else nothing & ~padding[:, 0].to(nothing.device)


def backward_ran(layers: Sequence[tuple[str, QuantizedLayer]]) -> bool:
    """Whether a weight has a gradient; zeros alone ``zero_grad(set_to_none=False)`` left."""
    grads = (layer.weight.grad for _, layer in layers)
    return any(grad is not None and bool(full(grad).any()) for grad in grads)


@torch.no_grad()
def alive_channels(layer: QuantizedLayer, x: Tensor, trains: bool) -> Tensor | None:
    """Which output channels have a gradient, or would have one if they were not masked.

    None if nobody knows: where there has been no backward pass, in embeddings, whose outputs are
    tokens that a batch may lack, and in experts, which a batch may leave out.

    Args:
        layer: The layer.
        x: Its `in_step_sizes`.
        trains: Whether `backward_ran`.
    """
    grad = layer.weight.grad
    by_chance = isinstance(layer, nn.Embedding | ExpertMatrices)
    if grad is None or not trains or not layer.weight.requires_grad or by_chance:
        return None
    alive = to_rows(full(grad), layer.output_dim).ne(0).any(1)
    return alive | ~to_rows(gets_gradient(layer, x), layer.output_dim).any(1)


def dead_channels(layer: QuantizedLayer, alive: Tensor | None) -> float:
    """The share of output channels that are dead; `alive` are `alive_channels`."""
    dead = next_to_nothing(layer)
    if alive is not None:
        dead = dead | ~alive
    return _share(dead)


def _step_size(layer: QuantizedLayer) -> Tensor:
    """Step sizes as files hold them."""
    quantizer = layer.quantizer
    if quantizer.companding is None:
        return layer.step_size().detach()
    # There a layer's are the widths of cells before the curve, those of its levels are others.
    return quantizer.current_step_size(layer._whole_weight(), layer._step(), layer.output_dim)


def _not_finite(layer: QuantizedLayer, step: Tensor) -> float:
    """The share of the weights that is not finite, or that of the step sizes if it is more."""
    bad = (~local(layer.weight.detach()).isfinite()).sum()
    (weights,) = sum_over_shards([bad], [layer.weight])
    # The step size in use may be finite although the learned one is not.
    learned = [] if layer.weight_step is None else [full(layer.weight_step.detach())]
    steps = (_share(~tensor.isfinite()) for tensor in (step, *learned))
    return max(weights / layer.weight.numel(), *steps)


def _outgrown(layer: QuantizedLayer, x: Tensor) -> Numbers:
    """What the rule would measure of weights that are in kept step sizes already."""
    quantizer, kept = layer.quantizer, layer.weight_step
    # What a companding quantizer rounds is not in step sizes.
    if quantizer.scale.kind != "fixed" or quantizer.companding is not None or kept is None:
        return {}
    if x.shape != layer.weight.shape or not x.numel():  # some are not finite, or there are none
        return {}
    groups = _output_rows(layer, x).reshape(kept.numel(), -1)
    groups = groups[_spread(len(groups), 64)]
    groups = groups[:, _spread(groups.shape[1], _SAMPLE // len(groups))].cpu().double()
    groups = groups[groups.any(1)]  # of zeros nothing can be measured
    if not len(groups):
        return {"outgrown": 0.0}
    # The squares of weights that have diverged may fit no dtype.
    largest = groups.abs().amax(1, keepdim=True)
    rule = replace(quantizer.scale, value=None)
    return {"outgrown": float((rule.measure(groups / largest, quantizer.grid) * largest).mean())}


def _output_rows(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """A weight, or what has its shape, with a row for each output channel, of experts in turn."""
    if isinstance(layer, ExpertMatrices):
        return (weight.transpose(1, 2) if layer.transposed else weight).flatten(0, 1)
    return to_rows(weight, layer.output_dim)


def _spread(count: int, most: int) -> Tensor:
    """Up to so many indices below a count, at no distance that divides it.

    Or weights might all be of one column.
    """
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()


def _used_levels(layer: QuantizedLayer, x: Tensor) -> float:
    grid = layer.quantizer.grid
    counts = torch.zeros(grid.num_levels, dtype=torch.int64, device=x.device)
    for chunk in x.reshape(-1).split(_CHUNK):
        codes = grid.round_to_code(chunk).long() - grid.low_code
        counts += torch.bincount(codes, minlength=grid.num_levels)
    shares = counts[counts > 0].double() / x.numel()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
