"""What shows while quantized layers train: bypassed layers, steps that no optimizer knows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fogzo
from fogzo import QuantizedLayer
from fogzo.layers.audit import LayerAudit
from fogzo.layers.bypasses import warn_of_bypassed_layers
from toolbox import draw, every, everything

PRESETS = {"lsq": fogzo.lsq(2), "quest": fogzo.quest(2), "fixed": fogzo.fixed(2)}
EVERY_PRESET = every("quantizer", PRESETS)
BYPASSED = r"forward of 'inner' never ran.*layer\(x\).*filter_fn"


class HandTied(nn.Module):
    """The middle layer's weight is read by its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x), self.inner.weight).relu())


class Attention(nn.Module):
    """torch's functional attention takes the weights of its layers, as WavLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        bias = self.inner.bias
        out, _ = F.multi_head_attention_forward(
            x, x, x, 8, 2, self.inner.weight, bias, None, None, False, 0.0, self.out.weight, None
        )
        return self.out(out)


class Experts(nn.Module):
    """Of two experts one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(x))


class BoundBefore(nn.Linear):
    """Computes by a method that holds the layer itself."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.compute = super().forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class ByParameters(nn.Linear):
    """Finds its weight among the parameters."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dict(self.named_parameters())["weight"], self.bias)


def _trained(model: nn.Module) -> nn.Module:
    model(draw(4, 8)).square().sum().backward()
    return model


# --- bypassed layers ---------------------------------------------------------------------------


@EVERY_PRESET
@pytest.mark.parametrize("make", [HandTied, Attention])
def test_a_layer_whose_weight_is_read_by_its_parent_is_named(make, quantizer):
    model = _trained(fogzo.quantize_(make(), quantizer, everything))
    with pytest.warns(UserWarning, match=BYPASSED):
        warn_of_bypassed_layers(model, only_with_gradient=True)
    with pytest.warns(UserWarning, match=BYPASSED):
        fogzo.dequantize_(model)


def test_calibration_names_a_bypassed_layer():
    model = fogzo.quantize_(HandTied(), fogzo.lsq(2), everything, fogzo.lsq(2))
    with pytest.warns(UserWarning, match=BYPASSED), fogzo.calibrate_(model):
        model(draw(4, 8))


@pytest.mark.parametrize("make", [BoundBefore, ByParameters])
def test_a_layer_whose_forward_goes_around_self_weight_is_named(make):
    model = nn.Sequential(make(), nn.Linear(8, 2))
    _trained(fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: name == "0"))
    assert torch.equal(model[0](draw(4, 8)), F.linear(draw(4, 8), model[0].weight, model[0].bias))
    with pytest.warns(UserWarning, match=r"forward of '0' .* did not read self\.weight"):
        warn_of_bypassed_layers(model, only_with_gradient=True)
    with pytest.warns(UserWarning, match=r"forward of '0' .* did not read self\.weight"):
        fogzo.dequantize_(model)


def test_a_layer_that_another_forward_replaced_is_named():
    model = fogzo.quantize_(Experts(), fogzo.lsq(2), everything)
    model.used.forward = lambda x: F.linear(x, model.used.weight, model.used.bias)
    with pytest.warns(UserWarning, match="forward of 'used' never ran"):
        warn_of_bypassed_layers(_trained(model), only_with_gradient=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_unused_experts_have_no_gradient_and_are_no_bypass(compiled):
    torch.compiler.reset()
    model = fogzo.quantize_(Experts(), fogzo.lsq(2), everything)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(draw(4, 8)).sum().backward()
    warn_of_bypassed_layers(model, only_with_gradient=True)
    assert [m.forward_ran for m in model.modules() if isinstance(m, QuantizedLayer)] == [1, 0, 1]


def test_of_a_model_that_never_ran_nothing_is_said():
    model = fogzo.quantize_(HandTied(), fogzo.lsq(2), everything)
    other = fogzo.quantize_(HandTied(), fogzo.lsq(2), everything)
    other.load_state_dict(model.state_dict())
    fogzo.dequantize_(other)


def test_a_warning_made_an_error_leaves_the_model_quantized():
    model = _trained(fogzo.quantize_(HandTied(), fogzo.lsq(2), everything))
    with pytest.raises(UserWarning):
        fogzo.dequantize_(model)
    assert all(isinstance(layer, QuantizedLayer) for layer in model.children())
    model(draw(4, 8))


# --- learned step sizes ------------------------------------------------------------------------


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The last step's gradients stay."""
    for _ in range(steps):
        optimizer.step()
        model.zero_grad()
        _trained(model)


@EVERY_OPTIMIZER
def test_an_optimizer_made_before_quantize_is_noticed(make):
    model = _net()
    optimizer = make(model.parameters())
    audit = LayerAudit(_trained(fogzo.quantize_(model, fogzo.lsq(2))))
    audit.check()  # nothing has trained yet
    _train(model, optimizer, 2)
    with pytest.warns(UserWarning, match=r"step sizes of '0', '2' do not.*optimizer made before"):
        audit.check()


@EVERY_OPTIMIZER
@EVERY_PRESET
def test_an_optimizer_made_after_is_not(make, quantizer):
    model = fogzo.quantize_(_net(), quantizer)
    optimizer = make(model.parameters())
    audit = LayerAudit(_trained(model))
    audit.check()
    _train(model, optimizer, 2)
    audit.check()


def test_steps_that_are_frozen_on_purpose_are_no_mistake():
    model = fogzo.quantize_(_net(), fogzo.lsq(2))
    for name, param in model.named_parameters():
        param.requires_grad_("step" not in name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    audit = LayerAudit(_trained(model))
    _train(model, optimizer, 2)
    audit.check()


@pytest.mark.parametrize(
    "quantizer",
    [
        fogzo.lsq(2, granularity="channel"),
        fogzo.lsq(8),
        fogzo.fixed(2, step_size=9.0),
        fogzo.ternary(),
    ],
)
@pytest.mark.filterwarnings("ignore:no step size can be measured")
def test_zero_rows_and_given_or_dynamic_steps_are_no_mistake(quantizer):
    model = _net()
    with torch.no_grad():
        model[0].weight[:12].zero_()
    audit = LayerAudit(_trained(fogzo.quantize_(model, quantizer)))
    audit.check()
