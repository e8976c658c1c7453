"""Copies of a model that quantizes inputs: what is stored decides, whoever wrote it and however."""

import copy
import pickle

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import fogzo

ACTIVATIONS = {
    "learned": fogzo.lsq(2),
    "fixed": fogzo.fixed(2),
    "integer": fogzo.lsq(3),
    "float16 steps": fogzo.lsq(2, scale_dtype=torch.float16),
    "unsigned": fogzo.lsq(2, levels="unsigned"),
}
EVERY_ACTIVATION = pytest.mark.parametrize(
    "activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys()
)
X = torch.randn(32, 8, generator=Generator().manual_seed(0))


def _model(activations=ACTIVATIONS["learned"], seed: int = 0) -> nn.Sequential:
    """The second layer's input follows a ReLU."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=generator)
    return fogzo.quantize_(model, fogzo.lsq(2), activations=activations)


def _train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def _assert_alike(copied: nn.Module, model: nn.Module) -> None:
    expected = model.eval()(X)
    assert torch.equal(copied.eval()(X), expected) and expected.isfinite().all()
    assert repr(copied) == repr(model)


# Ways in which a copy comes to hold what the model holds.


def _copy_buffers(model: nn.Module, twin: nn.Module) -> None:
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.copy_(mine)
    for mine, its in zip(model.buffers(), twin.buffers(), strict=True):
        its.copy_(mine)


def _copy_data(model: nn.Module, twin: nn.Module) -> None:
    for mine, its in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        its.data.copy_(mine.data)


def _lerp(model: nn.Module, twin: nn.Module) -> None:
    for mine, its in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        its.copy_(mine)  # as the first update of an average
    for mine, its in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        its.copy_(its * 0.99 + mine * 0.01)
        its.mul_(0.7).add_(mine, alpha=0.3)


def _load(model: nn.Module, twin: nn.Module) -> None:
    twin.load_state_dict(model.state_dict())


def _assign(model: nn.Module, twin: nn.Module) -> None:
    twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _replace_tensors(model: nn.Module, twin: nn.Module) -> None:
    for mine, its in zip(model.modules(), twin.modules(), strict=True):
        its._parameters.update({n: nn.Parameter(p.clone()) for n, p in mine._parameters.items()})
        its._buffers.update({n: b if b is None else b.clone() for n, b in mine._buffers.items()})


WAYS = [_copy_buffers, _copy_data, _load, _assign, _replace_tensors]
EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))


@EVERY_ACTIVATION
@EVERY_WAY
@torch.no_grad()
def test_a_copy_made_before_the_first_step_follows_the_model(activations, way):
    model = _model(activations)
    twin = copy.deepcopy(model)
    with torch.enable_grad():
        _train(model)
    way(model, twin)
    _assert_alike(twin, model)
    # Again, after it was evaluated: the model's inputs change their sign.
    with fogzo.calibrate_(model):
        model(X)
        model[2](-X.repeat(1, 2))
        model[0].input_state.fill_(2)
    way(model, twin)
    _assert_alike(twin, model)
    _assert_alike(pickle.loads(pickle.dumps(twin)), model)


@torch.no_grad()
def test_round_off_in_an_average_of_equal_states_changes_no_levels():
    model = _model()
    with torch.enable_grad():
        _train(model)
    twin = copy.deepcopy(model)
    _lerp(model, twin)
    assert repr(twin) == repr(model)
    assert torch.allclose(twin.eval()(X), model.eval()(X), atol=1e-4)


@EVERY_ACTIVATION
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    "how",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": get_ema_avg_fn(0.9)}],
    ids=["swa", "ema", "ema of each"],
)
def test_averaged_models_quantize_as_the_model_does(activations, use_buffers, how):
    model = _model(activations)
    average = AveragedModel(model, use_buffers=use_buffers, **how)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    twin = average.module.eval()
    assert [layer.input_state.item() for layer in (twin[0], twin[2])] == [
        layer.input_state.item() for layer in (model[0], model[2])
    ]
    # What a fresh model makes of the same state_dict.
    fresh = _model(activations)
    fresh.load_state_dict(twin.state_dict())
    _assert_alike(fresh, twin)
    assert torch.allclose(twin(X), model.eval()(X), atol=0.5)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_that_began_before_the_measuring_is_refused_and_can_be_measured(use_buffers):
    model = _model()
    average = AveragedModel(model, use_buffers=use_buffers)
    average.update_parameters(model)  # takes in steps that do not exist yet
    _train(model)
    average.update_parameters(model)
    with pytest.raises(ValueError, match=r"with fogzo\.calibrate_\(\w+\): \w+\(x\)"):
        average.eval()(X)
    with torch.no_grad(), fogzo.calibrate_(average):
        average(X)
    assert average(X).isfinite().all()


def test_an_average_of_half_a_step_is_refused():
    """The parameters averaged from before the measuring, the buffers copied: a usual EMA loop."""
    model = _model()
    average = copy.deepcopy(model)
    for _ in range(3):
        _train(model, 1)
        with torch.no_grad():
            for its, mine in zip(average.parameters(), model.parameters(), strict=True):
                its.mul_(0.9).add_(mine, alpha=0.1)
            for its, mine in zip(average.buffers(), model.buffers(), strict=True):
                its.copy_(mine)
    with pytest.raises(
        ValueError, match=r"average that began before .* fogzo\.calibrate_\(model\)"
    ):
        average.eval()(X)
    assert not average.train()(X).isfinite().any()


def test_an_average_of_signed_and_unsigned_levels_is_refused_and_can_be_measured():
    model = _model()
    average = AveragedModel(model, use_buffers=True)
    _train(model)
    average.update_parameters(model)
    with torch.no_grad(), fogzo.calibrate_(model):
        model(X)
        model[2](-X.repeat(1, 2))
    average.update_parameters(model)
    with pytest.raises(ValueError, match=r"input_state is 1\.50.*fogzo\.calibrate_\(averaged\)"):
        average.eval()(X)
    with torch.no_grad(), fogzo.calibrate_(average):
        average(X)
    assert average(X).isfinite().all() and average.module[2].input_state.item() == 2


def test_equal_state_dicts_give_equal_outputs():
    models = [_model() for _ in range(3)]
    _train(models[0])
    with torch.no_grad(), fogzo.calibrate_(models[1]):
        models[1](-X)
    with torch.no_grad(), fogzo.calibrate_(models[2]):
        models[2](X)
        models[2][2](-X.repeat(1, 2))
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        _assert_alike(model, models[0])


@torch.no_grad()
def test_a_state_reset_by_hand_is_measured_anew():
    model = _model()
    with fogzo.calibrate_(model):
        model(X)
    model[2].input_state.zero_()
    with pytest.raises(ValueError, match="no step size yet"):
        model.eval()(X)
    with torch.enable_grad():
        model.train()(3 * X)
    assert model[2].input_state.item() == 2


# --- compiled, functional and vectorised -------------------------------------------------------


@torch.no_grad()
def test_a_compiled_copy_follows_the_model_without_breaking_its_graph():
    torch.compiler.reset()
    model = _model(ACTIVATIONS["float16 steps"])
    twin = copy.deepcopy(model).eval()
    with torch.enable_grad():
        _train(model)
    _copy_data(model, twin)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model.eval()(X))
    model[2].input_state.fill_(1)
    model[0].input_state.fill_(2)
    _copy_data(model, twin)
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_layer_measures_its_first_input():
    torch.compiler.reset()
    layer = nn.Linear(8, 4)
    expected = copy.deepcopy(layer)
    for each in (layer, expected):
        fogzo.quantize_(each, fogzo.fixed(2), lambda *_: True, fogzo.fixed(2))
    compiled = torch.compile(layer, backend="aot_eager")
    for x in (X, 2 * X):
        torch.testing.assert_close(compiled(x), expected(x))
    assert layer.input_step == expected.input_step and layer.input_state == 1


@EVERY_ACTIVATION
@torch.no_grad()
def test_tensors_lent_for_one_call_decide_that_call(activations):
    models = [_model(activations, seed).eval() for seed in range(3)]
    for model, inputs in zip(models, (X, 2 * X, -X), strict=True):
        with fogzo.calibrate_(model):
            model(inputs)
    models[1][0].input_state.fill_(2)
    expected = torch.stack([model(X) for model in models])

    unmeasured = _model(activations).eval()
    found = [functional_call(unmeasured, dict(m.state_dict()), (X,)) for m in models]
    assert torch.equal(torch.stack(found), expected)

    skeleton = copy.deepcopy(unmeasured).to("meta")
    params, buffers = stack_module_state(models)

    def one(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (params, buffers), (X,))

    torch.testing.assert_close(vmap(one)(params, buffers), expected)


@EVERY_ACTIVATION
@torch.no_grad()
def test_where_nothing_can_be_read_an_unmeasured_input_shows(activations):
    params, buffers = stack_module_state([_model(activations).eval() for _ in range(2)])
    skeleton = _model(activations).eval().to("meta")
    output = vmap(lambda p, b: functional_call(skeleton, (p, b), (X,)))(params, buffers)
    assert not output.isfinite().any()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_an_estimator_goes_with_its_model(copied):
    model = fogzo.quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), fogzo.lsq(2))
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    other, its = copied((model, estimator))
    (record,) = its.weights
    assert record.param is other[0].weight and record.model is other
    with torch.no_grad():
        other[0].weight_step.mul_(2)
    torch.testing.assert_close(record.step_size(), 2 * estimator.weights[0].step_size())
