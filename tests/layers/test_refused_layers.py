"""Layers that `quantize_` refuses by name: quantized elsewhere, or without usable weights."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import fogzo
from fogzo import QuantizedLayer
from toolbox import everything


def _around(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))


def _with_value(value: float) -> nn.Module:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[3, 2] = value
    return layer


def _of_package(module: str, name: str, **members: object) -> nn.Module:
    """A layer that a package which is not installed would have made."""
    cls = type(name, (nn.Linear,), {"__module__": module})
    layer = cls(8, 8)
    for member, value in members.items():
        setattr(layer, member, value)
    return layer


class _Int8Tensor(Tensor):
    """Stands for the weight that torchao's quantize_ leaves in a layer."""


_Int8Tensor.__module__ = "torchao.quantization"


def _converted_by_torchao() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Int8Tensor))
    return layer


def _prepared_by_torch() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what its own modules import
        from torch.ao.quantization import default_qat_qconfig, prepare_qat

        model = nn.Sequential(nn.Linear(8, 8))
        model.qconfig = default_qat_qconfig
        return prepare_qat(model.train())[0]


def _expanded() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    return layer


REFUSED = {
    "expanded": (_expanded, r"'1\.weight' is expanded.*detach\(\)\.clone\(\)\) first"),
    "NaN": (lambda: _with_value(math.nan), r"'1\.weight' has values that are NaN or infinite"),
    "inf": (lambda: _with_value(-math.inf), r"'1\.weight' has values that are NaN or infinite"),
    "torch.ao QAT": (_prepared_by_torch, r"'1' is quantized already, by torch\.ao\.nn\.qat"),
    "torchao QAT": (
        lambda: _of_package("torchao.quantization.qat.linear", "FakeQuantizedLinear"),
        r"'1' is quantized already, by torchao\.quantization\.qat\.linear\.FakeQuantizedLinear",
    ),
    "torchao": (_converted_by_torchao, r"'1' is quantized already, by torchao.*type of its weight"),
    "brevitas": (
        lambda: _of_package("brevitas.nn.quant_linear", "QuantLinear"),
        r"'1' is quantized already, by brevitas\.nn\.quant_linear\.QuantLinear: start from",
    ),
    "bitnet": (
        lambda: _of_package("transformers.integrations.bitnet", "AutoBitLinear"),
        r"'1' is quantized already, by transformers\.integr",
    ),
    "a fake quantizer within": (
        lambda: _of_package("somewhere", "Layer", weight_quant=nn.Identity()),
        r"'1' is quantized already, by its module 'weight_quant'",
    ),
    "float8": (
        lambda: nn.Linear(8, 8).to(torch.float8_e4m3fn),
        r"'1\.weight' holds torch\.float8_e4m3fn.*layer\.float\(\) first",
    ),
    "lazy": (lambda: nn.LazyLinear(8), r"'1' is lazy.*run a forward pass, model\(x\), before"),
    "max_norm": (
        lambda: nn.Embedding(8, 8, max_norm=1.0),
        r"'1' scales its rows down to max_norm=1\.0.*max_norm=None",
    ),
}


@pytest.mark.parametrize("make, says", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.ternary()], ids=["lsq", "ternary"])
def test_a_refusal_names_the_layer_and_changes_nothing(make, says, quantizer):
    model = _around(make())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=says):
        fogzo.quantize_(model, quantizer, everything)
    assert [type(module) for module in model.modules()] == classes
    assert not any("step" in name for name in model.state_dict())


@pytest.mark.parametrize("make, says", REFUSED.values(), ids=REFUSED.keys())
def test_a_filter_leaves_a_refused_layer_out(make, says):
    model = _around(make())
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name != "1")
    assert isinstance(model[0], QuantizedLayer) and not isinstance(model[1], QuantizedLayer)


@pytest.mark.parametrize("name", ["QuantLinear", "BinaryConv", "MyQATLinear", "BitLinear"])
def test_a_class_that_by_its_name_quantizes_itself_is_doubted(name):
    model = _around(_of_package("my_project", name))
    with pytest.warns(UserWarning, match=rf"class \({name}\), a layer like '1' may quantize"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)


@pytest.mark.parametrize("name", ["QuantumLinear", "QuantileLinear", "BinaryHead"])
def test_other_names_raise_no_doubt(name):
    fogzo.quantize_(_around(_of_package("my_project", name)), fogzo.lsq(2), everything)


# --- layers without weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer", [fogzo.lsq(2), fogzo.fixed(2), fogzo.quest(2), fogzo.ternary(), fogzo.sign()]
)
@pytest.mark.parametrize("activations", [None, fogzo.abs_max(8, granularity="token")])
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
def test_layers_without_weights_are_left_alone(quantizer, activations, sizes):
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(*sizes)
    model = nn.ModuleList([nn.Linear(8, 8), empty, nn.Linear(8, 8)])
    fogzo.quantize_(model, quantizer, everything, activations)
    assert isinstance(model[0], QuantizedLayer) and type(model[1]) is nn.Linear
    assert model[1](torch.ones(2, sizes[0])).shape == (2, sizes[1])
    fogzo.dequantize_(model)


def test_a_model_without_weights_has_nothing_to_quantize():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 8))
    with pytest.raises(ValueError, match="no layer that can be quantized"):
        fogzo.quantize_(model, fogzo.lsq(2), everything)
