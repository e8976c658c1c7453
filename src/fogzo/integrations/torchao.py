"""Layers of torchao's quantization-aware training, whose forward, convert and export stay theirs.

estimator = fogzo.FogzoEstimator(fogzo.integrations.torchao.quantized_weights(model))
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    IntxFakeQuantizeConfig,
)
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS, ZeroPointDomain

from fogzo.collectives import is_sharded
from fogzo.layers.padding import padding_rows
from fogzo.layers.weights import QuantizedWeight
from fogzo.quantizers.grids import Grid
from fogzo.quantizers.surrogates import trust


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """The weights that torchao's QAT rounds to integers, for an estimator.

    Its backward passes gradients up to half a step beyond the end levels, which is the surrogate
    ``"trust"``. Scales that it measures anew in every forward pass stay what they are while an
    estimator's probes run, and what probes change in its fake quantizers is put back.

    Args:
        model: After ``quantize_(model, QATConfig(..., step="prepare"))``.

    Raises:
        ValueError: If it has no such weights, or some that are rounded otherwise (float8, NVFP4,
            MX), are sharded, or are not rounded at present.
    """
    found: dict[int, list[Any]] = {}
    names: dict[int, str] = {}
    quantizers: list[Any] = []
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith("torchao.prototype.qat"):
            raise ValueError(_refusal(name, f"{type(layer).__name__} rounds to floating point"))
        if not isinstance(layer, FakeQuantizedLinear | FakeQuantizedEmbedding):
            continue
        quantizers += [layer.weight_fake_quantizer]
        quantizers += [getattr(layer, "activation_fake_quantizer", None)]
        if layer.weight_fake_quantizer is not None:
            _check(name, layer)
            found.setdefault(id(layer.weight), []).append(layer)
            names.setdefault(id(layer.weight), f"{name}.weight".lstrip("."))
    if not found:
        raise ValueError(
            "found no weight that torchao fake-quantizes: call it after quantize_(model, "
            'QATConfig(base_config, step="prepare")) and before step="convert"'
        )
    made = []
    for key, layers in found.items():
        weight = _Weight(layers, [quantizer for quantizer in quantizers if quantizer is not None])
        quantizers = []  # those of the whole model are put back with the first weight
        record = QuantizedWeight(
            name=names[key],
            param=layers[0].weight,
            step_size=weight.step_size,
            surrogate=trust(),
            model=model,
            codes=weight.codes,
            grid=_grid(layers[0].weight_fake_quantizer.config),
            held=padding_rows(layers[0]),
            hold_step_size=weight.hold_step_size,
            has_constant_step_size=_keeps_scales(layers[0].weight_fake_quantizer.config),
        )
        made.append(record)
    return made


class _Affine(NamedTuple):
    """Step sizes per group, and the value of code 0, or the code of value 0."""

    scale: Tensor
    zero_point: Tensor


class _Weight:
    """One weight, the layers that share it, and the fake quantizers whose state it puts back."""

    def __init__(self, layers: Sequence[Any], guarded: Sequence[Any]) -> None:
        self._layers = layers
        self._guarded = [*guarded, *(layer.weight_fake_quantizer for layer in layers)]

    def step_size(self) -> Tensor:
        layer = self._layers[0]
        return _per_weight(_affine(layer).scale, layer.weight)

    @torch.no_grad()
    def codes(self) -> Tensor:
        layer = self._layers[0]
        quantizer, weight = layer.weight_fake_quantizer, layer.weight.detach()
        scale, zero_point = _affine(layer)
        with _put_back([quantizer]):
            quantized = quantizer(weight)
        if not isinstance(quantizer.config, IntxFakeQuantizeConfig) or (
            quantizer.config.zero_point_domain is ZeroPointDomain.FLOAT
        ):
            quantized = quantized - _per_weight(zero_point, weight)
        return (quantized / _per_weight(scale, weight)).round().to(torch.int32)

    @contextmanager
    def hold_step_size(self) -> Iterator[None]:
        with _put_back(self._guarded):
            for layer in self._layers:
                quantizer, affine = layer.weight_fake_quantizer, _affine(layer)
                if isinstance(quantizer.config, Int4WeightFakeQuantizeConfig):
                    quantizer.forward = partial(_fake_quantize_int4, affine)
                else:
                    quantizer.scale, quantizer.zero_point = affine
                    # In a copy of its own, as layers share one.
                    quantizer.config = copy.copy(quantizer.config)
                    quantizer.config.is_dynamic = False
            yield


@contextmanager
def _put_back(quantizers: Sequence[Any]) -> Iterator[None]:
    """Lend fake quantizers, and put back all that they hold that is no buffer."""
    attributes = [dict(vars(quantizer)) for quantizer in quantizers]
    try:
        yield
    finally:
        for quantizer, own in zip(quantizers, attributes, strict=True):
            vars(quantizer).clear()
            vars(quantizer).update(own)


@torch.no_grad()
def _affine(layer: Any) -> _Affine:
    """The present scales of a layer's weight, measured as its next forward pass would."""
    quantizer, weight = layer.weight_fake_quantizer, layer.weight.detach()
    if isinstance(quantizer.config, Int4WeightFakeQuantizeConfig):
        held = vars(quantizer).get("forward")
        return held.args[0] if held is not None else _measure_int4(quantizer.config, weight)
    with _put_back([quantizer]):
        quantizer(weight)
        return _Affine(quantizer.scale.detach(), quantizer.zero_point.detach())


def _measure_int4(config: Int4WeightFakeQuantizeConfig, weight: Tensor) -> _Affine:
    """What `Int4WeightFakeQuantizer` computes inside its forward pass."""
    groups = weight.float().unflatten(-1, (-1, config.group_size))
    low, high = groups.aminmax(dim=-1)
    scale = (high - low).clamp(min=1e-6) / 15
    return _Affine(scale, low + scale * 8)


def _fake_quantize_int4(affine: _Affine, weight: Tensor) -> Tensor:
    """Its forward pass with scales that stay, bit for bit."""
    scale, zero_point = (part.unsqueeze(-1) for part in affine)
    groups = weight.float().unflatten(-1, (affine.scale.shape[-1], -1))
    low = zero_point - scale * 8
    codes = ((groups - low) / scale).round().clamp(0, 15) - 8
    return (codes * scale + zero_point).view(weight.shape).to(weight.dtype)


def _per_weight(per_group: Tensor, weight: Tensor) -> Tensor:
    """One number per group of a row, broadcastable to the weight."""
    groups = per_group.shape[-1]
    if groups == 1:
        return per_group
    return per_group.repeat_interleave(weight.shape[-1] // groups, dim=-1)


def _grid(config: Any) -> Grid | None:
    """The levels; None where their range differs from group to group."""
    if not (
        isinstance(config, IntxFakeQuantizeConfig)
        and config.is_symmetric
        and config.zero_point_domain is ZeroPointDomain.INT
    ):
        return None
    low, high = _DTYPE_TO_QVALUE_BOUNDS[config.dtype]
    return Grid("torchao", low, high)


def _keeps_scales(config: Any) -> bool:
    """Whether scales are neither measured in every forward pass nor learned."""
    return isinstance(config, IntxFakeQuantizeConfig) and not (
        config.is_dynamic or config.range_learning
    )


def _check(name: str, layer: Any) -> None:
    """Raise a `ValueError` unless the weight is rounded to evenly spaced levels here and now."""
    quantizer = layer.weight_fake_quantizer
    config = quantizer.config
    if isinstance(config, Int4WeightFakeQuantizeConfig):
        if config.activation_dtype != torch.bfloat16:
            raise ValueError(_refusal(name, "its weight is rounded to float8 before int4"))
    elif not isinstance(config, IntxFakeQuantizeConfig):
        raise ValueError(_refusal(name, f"{type(config).__name__} rounds to floating point"))
    elif not isinstance(config.granularity, PerAxis | PerGroup):
        kind = type(config.granularity).__name__
        raise ValueError(
            _refusal(name, f"{kind} scales belong to inputs, and a weight has one per row or group")
        )
    if is_sharded(layer.weight):
        raise ValueError(
            f"the weight of {name!r} is sharded, and no rank could measure its scales: train it "
            "with DDP, DistributedDataParallel(model)"
        )
    if not quantizer.enabled:
        raise ValueError(
            f"{name!r} does not round its weight at present, so there is nothing to estimate: "
            "model.apply(torchao.quantization.qat.linear.enable_linear_fake_quant), and make the "
            "estimator then"
        )


def _refusal(name: str, reason: str) -> str:
    return (
        f"{name!r}: {reason}. Estimators need evenly spaced levels of a weight, integers with "
        "scales of rows or groups: QATConfig(IntxWeightOnlyConfig(torch.int4, "
        'granularity=PerGroup(32)), step="prepare")'
    )
