"""Forward-mode derivatives: the surrogate's, the same as those of the backward pass."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fogzo
from fogzo.quantizers import (
    DRAWN_SURROGATE_NAMES,
    SURROGATE_NAMES,
    TERNARY,
    Quantizer,
    learned_scale,
)

# torch's own, when it first makes a dual tensor
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

PRESETS = {
    "fixed": fogzo.fixed(2),
    "fixed channel": fogzo.fixed(3, granularity="channel"),
    "lsq": fogzo.lsq(2),
    "lsq channel": fogzo.lsq(3, granularity="channel"),
    "lsq group, float16 steps": fogzo.lsq(2, granularity=4, scale_dtype=torch.float16),
    "learned ternary": Quantizer(TERNARY, learned_scale()),
    "quest": fogzo.quest(2),
    "ternary": fogzo.ternary(),
    "sign": fogzo.sign(),
    "abs_max": fogzo.abs_max(4),
}
EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
EVERY_SURROGATE = pytest.mark.parametrize("surrogate", SURROGATE_NAMES)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _inputs(quantizer: Quantizer) -> tuple[Tensor, ...]:
    """A weight, some of it outside the range, and the step sizes that are kept beside it."""
    weight = _draw(6, 8)
    step = quantizer.initial_step_size(weight)
    return (weight,) if step is None else (weight, 0.7 * step)


def _inner(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


@EVERY_PRESET
@EVERY_SURROGATE
def test_forward_mode_is_the_transpose_of_the_backward_pass(preset, surrogate):
    quantizer = replace(preset, surrogate=surrogate)
    inputs = _inputs(quantizer)
    tangents = tuple(_draw(*x.shape, seed=i) for i, x in enumerate(inputs, 1))
    for quantize in (quantizer, quantizer.quantize_input):
        output, tangent = jvp(quantize, inputs, tangents)
        cotangent = _draw(*output.shape, seed=9)
        expected, pull_back = vjp(quantize, *inputs)
        assert torch.equal(output, expected) and torch.equal(output, quantize(*inputs))
        forward, backward = _inner((tangent,), (cotangent,)), _inner(pull_back(cotangent), tangents)
        assert forward == pytest.approx(backward, rel=1e-9, abs=1e-9)


@EVERY_SURROGATE
@pytest.mark.parametrize("pick", [False, True])
def test_levels_that_a_tensor_chooses_have_their_own_derivatives(surrogate, pick):
    quantizer = fogzo.lsq(2, surrogate=surrogate)
    chosen = (
        replace(quantizer, grid=fogzo.quantizers.unsigned(quantizer.grid)) if pick else quantizer
    )
    inputs = _inputs(quantizer)
    tangents = tuple(_draw(*x.shape, seed=i) for i, x in enumerate(inputs, 1))

    def by_tensor(x, step):
        return quantizer.quantize_input(x, step, is_unsigned=torch.tensor(pick))

    torch.testing.assert_close(
        jvp(by_tensor, inputs, tangents), jvp(chosen.quantize_input, inputs, tangents)
    )
    (output, pull_back), (expected, expected_back) = (
        vjp(by_tensor, *inputs),
        vjp(chosen.quantize_input, *inputs),
    )
    assert torch.equal(output, expected)
    torch.testing.assert_close(pull_back(output), expected_back(output))


@pytest.mark.parametrize("surrogate", [*SURROGATE_NAMES, *DRAWN_SURROGATE_NAMES])
def test_stochastic_rounding_has_the_derivatives_of_its_own_draw(surrogate):
    quantizer = replace(fogzo.lsq(2), surrogate=surrogate, stochastic=True)
    inputs = _inputs(quantizer)
    tangents = tuple(_draw(*x.shape, seed=i) for i, x in enumerate(inputs, 1))

    def quantize(weight, step):
        return quantizer(weight, step, training=True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output, tangent = jvp(quantize, inputs, tangents)
        torch.manual_seed(0)
        expected, pull_back = vjp(quantize, *inputs)
    assert torch.equal(output, expected)
    cotangent = _draw(*output.shape, seed=9)
    forward, backward = _inner((tangent,), (cotangent,)), _inner(pull_back(cotangent), tangents)
    assert forward == pytest.approx(backward, rel=1e-9, abs=1e-9)


# --- networks ----------------------------------------------------------------------------------


PRESET_OF_NETWORK = pytest.mark.parametrize("preset", [fogzo.lsq, fogzo.fixed])


def _network(surrogate="tanh", preset=fogzo.lsq) -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.4, generator=generator)
    quantizer = preset(2, surrogate=surrogate)
    fogzo.quantize_(model.double(), quantizer, lambda *_: True, activations=quantizer)
    model(_draw(16, 6))
    return model, {name: param.detach() for name, param in model.named_parameters()}


def _loss_of(model: nn.Module):
    x = _draw(16, 6, seed=3)
    return lambda params, x=x: functional_call(model, params, (x,)).square().mean()


def _tangents(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _draw(*p.shape, seed=i) for i, (name, p) in enumerate(params.items(), 1)}


def _dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return _inner(tuple(a.values()), tuple(b.values()))


@EVERY_SURROGATE
def test_a_networks_directional_derivative_is_its_gradients(surrogate):
    model, params = _network(surrogate)
    loss, tangents = _loss_of(model), _tangents(params)
    _, along = jvp(loss, (params,), (tangents,))
    loss(dict(model.named_parameters())).backward()
    expected = _dot({n: p.grad for n, p in model.named_parameters()}, tangents)
    assert along.item() == pytest.approx(expected, rel=1e-9) and expected != 0


@pytest.mark.parametrize("enabled", [True, False])
def test_dual_tensors_carry_their_tangents_with_and_without_gradients(enabled):
    model, params = _network()
    loss, tangents = _loss_of(model), _tangents(params)
    with torch.set_grad_enabled(enabled), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in params.items()}
        along = forward_ad.unpack_dual(loss(duals)).tangent
    assert along.item() == pytest.approx(_dot(grad(loss)(params), tangents), rel=1e-9)


def test_the_fully_recorded_gradient_is_the_plain_one():
    model, params = _network()
    loss = _loss_of(model)
    loss(dict(model.named_parameters())).backward()
    found = grad(loss)(params)
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad)


@PRESET_OF_NETWORK
def test_gradients_of_samples_by_vmap_inside_and_outside(preset):
    model, params = _network(preset=preset)
    x = _draw(5, 6, seed=4)

    def of_one(params, row):
        return functional_call(model, params, (row[None],)).square().sum()

    expected = [grad(of_one)(params, row) for row in x]
    outside = vmap(grad(of_one), in_dims=(None, 0))(params, x)
    inside = grad(lambda p: vmap(of_one, in_dims=(None, 0))(p, x).sum())(params)
    for name in params:
        rows = torch.stack([sample[name] for sample in expected])
        torch.testing.assert_close(outside[name], rows)
        torch.testing.assert_close(inside[name], rows.sum(0))


@PRESET_OF_NETWORK
def test_gradients_of_an_ensemble_by_vmap_inside_and_outside(preset):
    models = [_network(preset=preset)[0] for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for param in model.parameters():
                param.mul_(1 + 0.1 * i)
        models[1][2].input_state.fill_(1)
    params, buffers = torch.func.stack_module_state(models)
    skeleton, x = _network(preset=preset)[0].to("meta"), _draw(16, 6, seed=3)

    def loss(params, buffers):
        return functional_call(skeleton, (params, buffers), (x,)).square().mean()

    outside = vmap(grad(loss))(params, buffers)
    inside = grad(lambda p: vmap(loss)(p, buffers).sum())(params)
    for i, model in enumerate(models):
        model(x).square().mean().backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(outside[name][i], param.grad)
            torch.testing.assert_close(inside[name][i], param.grad)


@EVERY_SURROGATE
def test_jacobians_agree_by_either_mode(surrogate):
    quantizer = fogzo.lsq(2, surrogate=surrogate)
    inputs = _inputs(quantizer)
    for by_forward, by_backward in zip(
        jacfwd(quantizer, (0, 1))(*inputs), jacrev(quantizer, (0, 1))(*inputs), strict=True
    ):
        torch.testing.assert_close(by_forward, by_backward)


@EVERY_SURROGATE
def test_second_derivatives_agree_by_every_route(surrogate):
    """The derivative of the surrogate's gradient, a matrix that need not be symmetric."""
    model, params = _network(surrogate)
    loss, tangents = _loss_of(model), _tangents(params)
    _, forward_over_reverse = jvp(grad(loss), (params,), (tangents,))
    model_params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss(model_params), model_params.values(), create_graph=True)
    others = _tangents(params)
    by_double_backward = torch.autograd.grad(
        sum((g * t).sum() for g, t in zip(grads, others.values(), strict=True)),
        model_params.values(),
    )
    pairs = dict(zip(params, by_double_backward, strict=True))
    reverse_over_forward = grad(lambda p: jvp(loss, (p,), (others,))[1])(params)
    assert _dot(reverse_over_forward, tangents) == pytest.approx(
        _dot(forward_over_reverse, others), rel=1e-6, abs=1e-9
    )
    assert _dot(forward_over_reverse, others) == pytest.approx(
        _dot(pairs, tangents), rel=1e-6, abs=1e-9
    )


def test_forward_mode_of_forward_mode_is_refused():
    """torch would drop the outer one."""
    model, params = _network()
    loss, tangents = _loss_of(model), _tangents(params)
    with pytest.raises(ValueError, match=r"torch\.func\.jvp\(torch\.func\.grad\(f\)"):
        jvp(lambda p: jvp(loss, (p,), (tangents,))[1], (params,), (tangents,))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("surrogate", ["identity", "tanh"])
def test_a_linearized_network_keeps_its_slopes(surrogate):
    model, params = _network(surrogate)
    loss, tangents = _loss_of(model), _tangents(params)
    value, along = linearize(loss, params)
    expected, slope = jvp(loss, (params,), (tangents,))
    torch.testing.assert_close((value, along(tangents)), (expected, slope))


@pytest.mark.parametrize("inside", [True, False])
def test_forward_mode_and_the_compiler_go_together_or_are_refused(inside):
    torch.compiler.reset()
    quantizer = fogzo.lsq(2, surrogate="tanh")
    inputs = _inputs(quantizer)
    tangents = tuple(_draw(*x.shape, seed=i) for i, x in enumerate(inputs, 1))
    expected = jvp(quantizer, inputs, tangents)

    def along(inputs, tangents):
        return jvp(quantizer, inputs, tangents)

    if inside:
        found = torch.compile(along, backend="eager")(inputs, tangents)
        torch.compiler.reset()
        with pytest.raises(Exception, match="graph_break"):
            torch.compile(along, backend="eager", fullgraph=True)(inputs, tangents)
    else:
        compiled = torch.compile(quantizer.__call__, backend="eager")
        assert torch.equal(compiled(*inputs), expected[0])  # this graph has no derivatives
        found = jvp(compiled, inputs, tangents)
    torch.testing.assert_close(found, expected)
