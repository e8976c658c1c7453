"""Layers of brevitas that round their weights to integers; its proxies and export stay its own.

estimator = fogzo.FogzoEstimator(fogzo.integrations.brevitas.quantized_weights(model))
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import RoundSte, TensorClamp
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.quant.delay import _DelayQuant
from brevitas.core.scaling import ConstScaling
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.nn.mixin import QuantWeightMixin
from torch import Tensor, nn

from fogzo.collectives import is_sharded
from fogzo.layers.padding import padding_rows
from fogzo.layers.weights import QuantizedWeight, inputs_of_an_output
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.surrogates import Surrogate, identity_unmasked, trust


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """The weights that brevitas rounds to integers, for an estimator.

    The surrogate is what its clamp says: `TensorClamp` passes gradients up to half a step beyond
    the end levels (``"trust"``), those whose names end in ``Ste`` everywhere
    (``"identity_unmasked"``). Scales and zero points stay what they are while an estimator's probes
    run. So do the counters of brevitas, plain numbers that every forward pass in train mode
    increments: ``collect_stats_steps`` counts the steps of the loop and no probe.

    Args:
        model: With layers of `brevitas.nn`, or after `brevitas.graph.quantize`.

    Raises:
        ValueError: If it has no such weights, or some that are rounded otherwise (binary, to
            float8, by way of inputs or of a second scale), are sharded, compiled or not rounded at
            present.
    """
    found: dict[int, list[Any]] = {}
    names: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _DelayQuant) and layer.quant_delay_steps > 0:
            raise ValueError(
                f"{name!r} begins to quantize in the course of a step (quant_delay_steps), and "
                "probes would count for steps: make the estimator after the delay"
            )
        if isinstance(layer, QuantWeightMixin) and layer.weight_quant.tensor_quant is not None:
            _check(name, layer)
            found.setdefault(id(layer.weight), []).append(layer)
            names.setdefault(id(layer.weight), f"{name}.weight".lstrip("."))
    if not found:
        raise ValueError(
            "found no layer whose weight brevitas quantizes: "
            "brevitas.nn.QuantLinear(64, 64, bias=True, weight_bit_width=4), and leave "
            "weight_quant as it is"
        )
    owned = [m for m in model.modules() if type(m).__module__.startswith("brevitas.")]
    made = []
    for key, layers in found.items():
        weight = _Weight(layers, owned)
        owned = []  # those of the whole model are put back with the first weight
        record = QuantizedWeight(
            name=names[key],
            param=layers[0].weight,
            step_size=weight.step_size,
            surrogate=_surrogate(layers[0]),
            model=model,
            codes=weight.codes,
            grid=_grid(layers[0]),
            held=padding_rows(layers[0]),
            hold_step_size=weight.hold_step_size,
            # All others measure the weights in every forward pass, or learn.
            has_constant_step_size=isinstance(
                layers[0].weight_quant.tensor_quant.scaling_impl, ConstScaling
            ),
            fan_in=inputs_of_an_output(
                layers[0].weight, layers[0].output_channel_dim, getattr(layers[0], "groups", 1)
            ),
        )
        made.append(record)
    return made


class _Weight:
    """One weight, the layers that share it, and the modules whose state it puts back."""

    def __init__(self, layers: Sequence[Any], guarded: Sequence[nn.Module]) -> None:
        self._layers, self._guarded = layers, guarded

    def step_size(self) -> Tensor:
        # A learned scale may have crossed zero.
        return _quantized(self._layers[0]).scale.detach().abs()

    def codes(self) -> Tensor:
        return _quantized(self._layers[0]).int().detach()

    @contextmanager
    def hold_step_size(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_put_back(self._guarded))
            for module in self._guarded:
                if hasattr(module, "collect_stats_steps"):
                    hook = module.register_forward_pre_hook(_go_on_collecting)
                    stack.callback(hook.remove)
            for layer in self._layers:
                for module, output in _scales(layer):
                    hook = module.register_forward_hook(partial(_instead, output))
                    stack.callback(hook.remove)
            yield


def _go_on_collecting(module: Any, args: object) -> None:
    """Let no probe be the one that ends the collection of statistics."""
    if module.counter == module.collect_stats_steps:
        module.counter -= 1


def _instead(held: Tensor, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return held


@torch.no_grad()
def _quantized(layer: Any) -> Any:
    """The present weight as an `IntQuantTensor`, leaving the layer as it was."""
    proxy = layer.weight_quant
    with _put_back(proxy.modules()):
        return proxy.create_quant_tensor(proxy.tensor_quant(layer.weight.detach()))


def _scales(layer: Any) -> list[tuple[nn.Module, Tensor]]:
    """The modules that measure a weight's scale and zero point, with what they say at present."""
    parts = layer.weight_quant.tensor_quant
    found: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as stack:
        for module in (parts.scaling_impl, parts.zero_point_impl):
            hook = module.register_forward_hook(
                lambda module, args, output: found.append((module, output.detach()))
            )
            stack.callback(hook.remove)
        _quantized(layer)
    return found


@contextmanager
def _put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what modules of brevitas hold: counters and flags, and tensors in place."""
    modules = list(modules)
    attributes = [dict(vars(module)) for module in modules]
    tensors = [
        (tensor, tensor._version, tensor.detach().clone())
        for module in modules
        for held in (module._parameters, module._buffers)
        for tensor in held.values()
        if tensor is not None and type(module).__module__.startswith("brevitas.core.")
    ]
    try:
        yield
    finally:
        for module, own in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(own)
        with torch.no_grad():
            for tensor, version, saved in tensors:
                if tensor._version != version:
                    tensor.copy_(saved)


def _surrogate(layer: Any) -> Surrogate:
    clamp = layer.weight_quant.tensor_quant.int_quant.tensor_clamp_impl
    return trust() if isinstance(clamp, TensorClamp) else identity_unmasked()


def _grid(layer: Any) -> Grid | None:
    """The levels; None where they are not the same for all groups, or are learned."""
    parts = layer.weight_quant.tensor_quant
    if not (
        isinstance(parts.zero_point_impl, ZeroZeroPoint)
        and isinstance(parts.msb_clamp_bit_width_impl, BitWidthConst)
        and isinstance(parts.int_quant.float_to_int_impl, RoundSte)
    ):
        return None
    bits = parts.msb_clamp_bit_width_impl()
    ends = (int(end(bits)) for end in (parts.int_quant.min_int, parts.int_quant.max_int))
    return Grid("brevitas", *ends)


def _check(name: str, layer: Any) -> None:
    """Raise a `ValueError` unless the weight is rounded to integers by one scale, here and now."""
    proxy = layer.weight_quant
    parts = proxy.tensor_quant
    if isinstance(parts, torch.jit.ScriptModule) or proxy.is_proxy_compiled:
        raise ValueError(
            f"the weight of {name!r} is quantized by compiled code, whose scales cannot be held: "
            "unset BREVITAS_JIT and leave out compile_quant"
        )
    if not isinstance(parts, RescalingIntQuant):
        raise ValueError(
            f"{name!r}: {type(parts).__name__} does not round a weight to integers by one scale, "
            "which estimators need: weight_quant=brevitas.quant.Int8WeightPerChannelFloat, "
            "weight_bit_width=4. For binary weights build the model of torch's own layers, "
            f"nn.{type(layer).__name__.removeprefix('Quant')}, without brevitas, and then "
            "fogzo.quantize_(model, fogzo.sign())"
        )
    if "LearnedRound" in type(parts.int_quant.float_to_int_impl).__name__:
        raise ValueError(
            f"{name!r} learns how to round and keeps its weight, so there is no weight's gradient "
            "to estimate: weight_float_to_int_impl_type=FloatToIntImplType.ROUND"
        )
    if is_sharded(layer.weight):
        raise ValueError(
            f"the weight of {name!r} is sharded, and no rank could measure its scales: train it "
            "with DDP, DistributedDataParallel(model)"
        )
    if not proxy.is_quant_enabled or parts.observer_only:
        raise ValueError(
            f"{name!r} does not round its weight at present, so there is nothing to estimate: "
            "layer.weight_quant.disable_quant = False, and make the estimator then"
        )
