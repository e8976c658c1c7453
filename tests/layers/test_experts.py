"""Fused experts: one quantized matrix per expert in a parameter of three dimensions.

This file is also the program that each rank runs: ``python test_experts.py RANK FOLDER``.
"""

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fogzo
import fogzo.export
from fogzo.layers.experts import ExpertMatrices
from fogzo.quantizers.experts import ExpertQuantizer
from toolbox import (
    PRESETS,
    WAYS,
    Snapshot,
    cpu_mesh,
    draw,
    everything,
    fill,
    joined,
    run_ranks,
)

X, EXPERTS = draw(12, 8), 4


class Mixture(nn.Module):
    """Experts by the protocol of transformers, of which each input takes one."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = EXPERTS, transposed
        shapes = ((8, 16), (16, 8)) if transposed else ((16, 8), (8, 16))
        self.up = nn.Parameter(torch.empty(EXPERTS, *shapes[0]))
        self.down = nn.Parameter(torch.empty(EXPERTS, *shapes[1]))
        self.down_bias = nn.Parameter(torch.empty(EXPERTS, 8))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        up, down = self.up[chosen], self.down[chosen]
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        hidden = torch.bmm(x.unsqueeze(1), up).tanh()
        return torch.bmm(hidden, down).squeeze(1) + self.down_bias[chosen]


class Net(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.inner, self.experts, self.head = nn.Linear(8, 8), Mixture(transposed), nn.Linear(8, 3)
        fill(self, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x)) % (EXPERTS - 1)  # nothing goes to the last
        return self.head(self.experts(self.inner(x), chosen))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_zeros_get_the_step_size_of_a_matrix_of_zeros(transposed, granularity):
    quantizer = fogzo.lsq(2, granularity=granularity)
    alone, _ = quantizer.find_step_size(torch.zeros(8, 4))  # outputs, inputs
    weight = torch.zeros(3, 4, 8) if transposed else torch.zeros(3, 8, 4)
    steps, empty = ExpertQuantizer(quantizer, transposed).find_step_size(weight)
    assert torch.equal(steps, alone.repeat(3, 1)) and empty == len(steps)


def test_experts_that_a_batch_leaves_out_are_not_called_dead():
    model = fogzo.quantize_(Net(), fogzo.lsq(2))
    model(X).square().sum().backward()
    assert not model.experts.up.grad[-1].any()
    found = fogzo.inspect(model)
    assert [layer.name for layer in found.layers] == ["inner", "experts.up", "experts.down"]
    assert [layer.dead for layer in found.layers] == [0, 0, 0]


@pytest.mark.parametrize("transposed", [False, True])
def test_output_channels_of_experts_are_inspected_one_by_one(transposed):
    model = Net(transposed)
    sizes = torch.logspace(-1, 1, 16)
    with torch.no_grad():
        model.experts.up *= sizes if transposed else sizes.unsqueeze(1)
    quantizer = fogzo.fixed(2, granularity="channel")
    fogzo.quantize_(model, quantizer, lambda module, name: name == "experts.up")
    with torch.no_grad():
        (model.experts.up[1].T if transposed else model.experts.up[1])[3] = 0
    (layer,) = fogzo.inspect(model).layers
    assert layer.outgrown == pytest.approx(1, abs=0.01)  # nothing has moved
    assert layer.empty == layer.dead == 1 / (EXPERTS * 16)


def separate(model: Net, quantizer: fogzo.Quantizer) -> list[nn.Linear]:
    """The experts' first matrices as linear layers, quantized one by one."""
    layers = []
    for matrix in model.experts.up.detach():
        layer = nn.Linear(8, 16, bias=False)
        with torch.no_grad():
            layer.weight.copy_(matrix.T if model.experts.is_transposed else matrix)
        layers.append(fogzo.quantize_(layer, quantizer, everything))
    return layers


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_expert_is_quantized_as_a_layer_of_its_own(preset, transposed):
    model, quantizer = Net(transposed), PRESETS[preset]()
    if quantizer.rotation is not None and quantizer.granularity == "tensor":
        pytest.skip("refused")
    layers = separate(model, quantizer)
    state = list(model.state_dict())
    fogzo.quantize_(model, quantizer)
    records = {weight.name: weight for weight in fogzo.quantized_weights(model)}
    assert list(records) == ["inner.weight", "experts.up", "experts.down"]
    record = records["experts.up"]
    assert record.param is model.experts.up and record.of_experts
    assert set(state) <= set(model.state_dict())
    whole = model.experts.up_quantized.quantized_weight()
    for index, layer in enumerate(layers):
        turned = (lambda t: t.T) if transposed else (lambda t: t)
        shape = record.param.shape
        torch.testing.assert_close(turned(whole[index]), layer.quantized_weight())
        assert torch.equal(turned(record.codes()[index]), layer.codes())
        steps = record.step_size().expand(shape)[index]
        torch.testing.assert_close(turned(steps), layer.step_size().expand(16, 8))

    # Forward, gradients, baking in and copies.
    out = model(X)
    baked = fogzo.dequantize_(copy.deepcopy(model))
    assert type(baked.experts) is Mixture and list(baked.state_dict()) == state
    assert torch.equal(baked(X), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), out)
    again = fogzo.quantize_(Net(transposed), quantizer)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), out)
    out.square().sum().backward()
    assert bool(model.experts.up.grad[:-1].flatten(1).any(1).all())
    assert not model.experts.up.grad[-1].any()


@pytest.mark.parametrize("shape", ["tensor_rms", "isotropic"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "stacked"])
def test_an_expert_that_was_not_used_is_left_alone(way, shape):
    model = fogzo.quantize_(Net(), fogzo.lsq(2))
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model), noise_share=0.1, noise_shape=shape, evaluate=way
    )
    loss = model(X).square().mean()
    loss.backward()
    before, plain = Snapshot(model), model.experts.up.grad.clone()
    stats = estimator.refine_grads_(lambda: model(X).square().mean(), expected_loss=loss)
    assert stats.fallback is None
    before.assert_same(rewritten=[weight.name for weight in estimator.weights])
    noise = model.experts.up.grad - stats.applied_agreement * plain
    assert bool(noise[:-1].flatten(1).any(1).all())
    assert not model.experts.up.grad[-1].any()


def test_experts_take_noise_by_their_own_gradient():
    model = fogzo.quantize_(Net(), fogzo.fixed(2))
    estimator = fogzo.PlaceboEstimator(fogzo.quantized_weights(model), noise_share=0.5)
    model(X).square().mean().backward()
    with torch.no_grad():
        model.experts.up.grad[0] *= 1e-3
    plain = model.experts.up.grad.clone()
    stats = estimator.refine_grads_()
    noise = model.experts.up.grad - (stats.applied_agreement or 1) * plain
    assert noise[0].norm() < 1e-2 * noise[1].norm()


def test_a_filter_names_the_parameters():
    seen = {}
    model = Net()

    def chosen(module, name):
        seen[name] = module
        return name == "experts.down"

    fogzo.quantize_(model, fogzo.lsq(2), chosen)
    assert list(seen) == ["inner", "experts.up", "experts.down", "head"]
    assert isinstance(seen["experts.up"], ExpertMatrices)
    assert [weight.name for weight in fogzo.quantized_weights(model)] == ["experts.down"]
    with pytest.raises(ValueError, match=r"'experts\.down' is quantized already"):
        fogzo.quantize_(model, fogzo.lsq(2))
    fogzo.quantize_(model, fogzo.quest(4), lambda module, name: name == "experts.up")
    assert len(fogzo.quantized_weights(model)) == 2


def test_a_float_checkpoint_has_its_steps_measured():
    other = Net()
    with torch.no_grad():
        other.experts.up.mul_(3)
    model = fogzo.quantize_(Net(), fogzo.lsq(2))
    before = model.experts.up_quantized.step_size()
    model.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(model.experts.up_quantized.step_size(), 3 * before)


def test_inputs_of_experts_stay_in_float_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, "fogzo"):
        model = fogzo.quantize_(Net(), fogzo.lsq(2), activations=fogzo.abs_max(8))
    assert "'experts.up', 'experts.down', stay in float" in caplog.text
    assert model.experts.up_quantized.activation_quantizer is None


def test_what_experts_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"cannot quantize 'experts\.up'.*granularity=\"channel\""):
        fogzo.quantize_(Net(), fogzo.quest(2, granularity="tensor"))
    model = Net()
    model.experts.forward = lambda x, chosen: x
    with pytest.raises(ValueError, match=r"'experts\.up' has a forward that was put on"):
        fogzo.quantize_(model, fogzo.lsq(2))
    model = fogzo.quantize_(Net(), fogzo.lsq(2))
    (problem,) = fogzo.export.check(model, "packed")
    assert problem.startswith("'experts.up', 'experts.down' are fused experts, which no format")
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        model.experts._replicate_for_data_parallel()
    del model.experts.up
    with pytest.raises(ValueError, match="'up' of QuantizedMixture is no parameter any longer"):
        model(X)


# torch's tracer looks for a gradient of the view that it is given, and hides the warning of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_experts_answer_the_same():
    model = fogzo.quantize_(Net(), fogzo.lsq(2))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))


# --- two ranks ------------------------------------------------------------------------------------


def refined(quantizer, sharded):
    """The agreement of one step and the gradient that it wrote, whole."""
    model = fogzo.quantize_(Net(), quantizer)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=cpu_mesh())
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.1)
    loss = model(X).square().mean()
    loss.backward()
    stats = estimator.refine_grads_(lambda: model(X).square().mean(), expected_loss=loss)
    grad = model.experts.up.grad
    return stats.agreement, grad.full_tensor() if sharded else grad


def main(rank, folder):
    with joined(rank, folder):
        cases = (fogzo.lsq(2), fogzo.lsq(2, granularity="channel"), fogzo.quest(2))
        torch.save([(refined(q, False), refined(q, True)) for q in cases], folder / f"{rank}.pt")


def test_experts_are_sharded_among_ranks(tmp_path):
    for found in run_ranks(__file__, tmp_path):
        for (agreement, grad), (of_shards, grad_of_shards) in found:
            assert of_shards == pytest.approx(agreement, abs=1e-6)
            torch.testing.assert_close(grad_of_shards, grad)
            assert not grad_of_shards[-1].any()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
