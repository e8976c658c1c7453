"""How a model is quantized, as names and quantizers: read from one model, put onto another."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fogzo.layers.activations import Activations, activation_quantizers
from fogzo.layers.attach import (
    KeptSteps,
    attach_,
    check_weight_quantizer,
    has_one_step,
    kept_steps,
    quantizer_for,
)
from fogzo.layers.experts import layer_name
from fogzo.layers.fast_path import leave_fast_path
from fogzo.layers.quantizable import warn_of_own_quantization
from fogzo.layers.quantized_layer import QuantizedLayer, warn_of_empty_groups
from fogzo.layers.selection import (
    FilterFn,
    check_ties,
    output_dim,
    quantizable_layers,
    select_layers,
    warn_of_selection,
)
from fogzo.quantizers import Quantizer
from fogzo.quantizers.experts import ExpertQuantizer
from fogzo.quantizers.step_sizes import knee_of


class LayerForm(NamedTuple):
    """How one layer is quantized: its weight, and its input or None."""

    weight: Quantizer
    input: Quantizer | None


def forms_of(model: nn.Module) -> dict[str, LayerForm]:
    """How each quantized layer of a model is quantized, by name."""
    return {
        layer_name(name, module): LayerForm(_given(module.quantizer), module._given)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }


def _given(quantizer: Quantizer | ExpertQuantizer) -> Quantizer:
    return quantizer.matrix if isinstance(quantizer, ExpertQuantizer) else quantizer


def chosen_forms(
    model: nn.Module, quantizer: Quantizer, filter_fn: FilterFn | None, activations: Activations
) -> dict[str, LayerForm]:
    """What `fogzo.quantize_` would do to a model, whose weights may still be to be loaded.

    Raises:
        ValueError: If nothing is selected, a quantizer does not fit its layer, or a tied weight is
            selected in one place and not in another.
    """
    check_weight_quantizer(quantizer)
    layers = quantizable_layers(model)
    selected = select_layers(model, layers, filter_fn)
    check_ties(model, layers, selected, has_one_step(quantizer))
    inputs = activation_quantizers(selected, activations)
    warn_of_own_quantization(selected)
    warn_of_selection(model, layers, selected, default=filter_fn is None)
    return {name: LayerForm(quantizer, inputs[name]) for name in selected}


def attach_forms_(model: nn.Module, forms: Mapping[str, LayerForm]) -> None:
    """Quantize layers whose weights are still to be loaded, on the meta device.

    Step sizes are loaded with them, or measured by `settle_`.

    Raises:
        ValueError: If the model has no such layer, or one is quantized already.
    """
    layers = quantizable_layers(model)
    steps: dict[int, KeptSteps] = {}
    for name, form in forms.items():
        layer = layers.get(name)
        if layer is None or isinstance(layer, QuantizedLayer):
            state = "is no layer of this model" if layer is None else "is quantized already"
            raise ValueError(
                f"{name!r} {state}: load into the plain model, of the class that was saved"
            )
        weight = cast(Tensor, layer.weight)
        if id(weight) not in steps:
            own = quantizer_for(layer, form.weight)
            step = own.empty_step_size(weight, output_dim(layer) or 0)
            steps[id(weight)] = kept_steps(form.weight, step)
        attach_(name, layer, form.weight, steps[id(weight)], [])
        cast(QuantizedLayer, layer).attach_input(form.input)
    leave_fast_path(model)


@torch.no_grad()
def settle_(model: nn.Module, loaded: set[int]) -> None:
    """Finish what `attach_forms_` began, once the weights are there.

    Layers that share a weight share its step sizes again. What no file held is measured on the
    weights; those of inputs wait for inputs, as after `fogzo.quantize_`.

    Args:
        model: Its weights are loaded.
        loaded: Identities of the tensors that came from files.

    Raises:
        ValueError: If a step size is to be measured on a weight that is offloaded.
    """
    owners: dict[int, QuantizedLayer] = {}
    for layer in model.modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        owner = owners.setdefault(id(layer.weight), layer)
        if owner is not layer and layer.weight_step is not None:
            if id(owner.weight_step) not in loaded and id(layer.weight_step) in loaded:
                owner.weight_step = layer.weight_step
                owner.weight_step_knee = layer.weight_step_knee
            layer.weight_step, layer.weight_step_knee = owner.weight_step, owner.weight_step_knee
    for layer in owners.values():
        step = layer.weight_step
        if step is not None and id(step) not in loaded:
            if layer.weight.is_meta:
                raise ValueError(
                    f"the weight of {layer._name!r} is offloaded, and no step size can be measured "
                    "on it: quantize in memory first, model.save_pretrained(folder), then load "
                    "that folder with a device_map"
                )
            measured, empty = layer.quantizer.find_step_size(layer.weight, layer.output_dim)
            assert measured is not None
            warn_of_empty_groups(layer.quantizer, {layer._name: (empty, len(measured))})
            step.copy_(measured)
            if layer.weight_step_knee is not None:
                layer.weight_step_knee.copy_(knee_of(step))
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            if layer.input_state is not None and id(layer.input_state) not in loaded:
                layer.attach_input(layer._given)
            layer.was_loaded_()
