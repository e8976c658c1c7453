"""One look at a model's quantized layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from fogzo.inspection.agreement import agreements
from fogzo.inspection.findings import diagnose
from fogzo.inspection.inputs import clipped_inputs
from fogzo.inspection.layers import (
    Numbers,
    alive_channels,
    backward_ran,
    dead_channels,
    matrices_in_float,
    numbers_of,
    quantized_layers,
    uses_of_weights,
)
from fogzo.inspection.records import Inspection, LayerInspection
from fogzo.layers import QuantizedLayer, quantized_weights
from fogzo.probing.lender import Closure
from fogzo.quantizers.surrogates import resolve_surrogate


def inspect(
    model: nn.Module,
    *,
    forward: Callable[[], object] | None = None,
    closure: Closure | None = None,
    num_samples: int = 8,
) -> Inspection:
    """Look at each quantized layer, and say what is wrong with it. Nothing is changed.

    ``print(fogzo.inspect(model))`` shows a table by layer and findings. Flips of codes, which take
    several steps, are counted by a `Watch`. It costs about as much as rounding all weights a few
    times; with FSDP2 all ranks call it together, and each layer is gathered once.

    >>> import torch, fogzo
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.linspace(-1, 1, 64).reshape(8, 8))
    >>> quantizer = fogzo.fixed(2, step_size=0.25, surrogate="identity")
    >>> found = fogzo.inspect(fogzo.quantize_(model, quantizer))
    >>> found.layers[0].masked  # all beyond the last level, 0.375
    0.625
    >>> [finding.kind for finding in found.findings]
    ['masked', 'outgrown']

    Args:
        model: Quantized.
        forward: Runs the model on a batch, ``lambda: model(x)``, to see how many input values are
            clipped where inputs are quantized. It runs once, without gradient; buffers, modes and
            random streams come back.
        closure: Recomputes the loss that backward differentiated, ``lambda: loss_fn(model(x), y)``,
            to measure the agreement of each layer: call it between backward and zero_grad, and
            after ``scaler.unscale_(optimizer)`` if the loss was scaled. It takes
            ``2 * num_samples`` forward passes per layer, and two more. Dropout must be off, or the
            probes measure another network than backward saw. It is not called where weights are
            not finite. All ranks give it together, as losses are averaged over them.
        num_samples: Directions per layer for the agreement.

    Raises:
        ValueError: If nothing is quantized, weights are offloaded, or the agreement is asked for
            without gradients, after they were refined or scaled, or with a closure that returns
            another loss each time.
    """
    return inspected(model, quantized_layers(model), {}, forward, closure, num_samples)


def inspected(
    model: nn.Module,
    layers: Sequence[tuple[str, QuantizedLayer]],
    counted: Mapping[str, Numbers],
    forward: Callable[[], object] | None,
    closure: Closure | None = None,
    num_samples: int = 8,
    step: int | None = None,
    steps_counted: int = 0,
    history: Sequence[Inspection] = (),
) -> Inspection:
    """An inspection, with what was counted meanwhile by layer."""
    weights = quantized_weights(model)
    uses = uses_of_weights(model)
    tied = {name: uses[id(layer.weight)] for name, layer in layers}
    clipped = {} if forward is None else clipped_inputs(tied, weights, forward)
    trains = backward_ran(layers)
    numbers = {name: _numbers(layer, counted.get(name, {}), trains) for name, layer in layers}
    # Then no loss says anything.
    broken = any(own["not_finite"] for own in numbers.values())
    measured = {} if closure is None or broken else agreements(weights, closure, num_samples)
    by_param = {id(weight.param): measured.get(weight.name) for weight in weights}
    found = []
    for name, layer in layers:
        agreement, error = by_param.get(id(layer.weight)) or (None, None)
        quantizer = layer.quantizer
        inputs = [own for use in tied[name] if (own := use.activation_quantizer) is not None]
        found.append(
            LayerInspection(
                name=name,
                weights=layer.weight.numel(),
                levels=quantizer.grid.num_levels,
                scale=quantizer.scale.kind,
                surrogate=resolve_surrogate(quantizer.surrogate, quantizer.grid).name,
                clipped=clipped.get(name),
                agreement=agreement,
                agreement_error=error,
                trained=layer.weight.requires_grad,
                evenly_spaced=quantizer.companding is None,
                one_step=quantizer.granularity == "tensor",
                input_scale=inputs[0].scale.kind if inputs else None,
                **numbers[name],
            )
        )
    inspection = Inspection(
        layers=found,
        in_float=matrices_in_float(model),
        step=step,
        counted=steps_counted,
        float_phase=any(layer.is_in_float for _, layer in layers),
    )
    return replace(inspection, findings=diagnose([*history, inspection]))


def _numbers(layer: QuantizedLayer, counted: Numbers, trains: bool) -> Numbers:
    """What a look at a layer tells, and what was counted of it."""
    x = layer.in_step_sizes()
    found = numbers_of(layer, x) | counted
    if "dead" not in found:
        found["dead"] = dead_channels(layer, alive_channels(layer, x, trains))
    return found
