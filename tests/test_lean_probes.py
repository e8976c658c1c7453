"""Lean probes give the default's numbers to the bit, and hold one layer beside the model."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

ESTIMATORS = {
    "fogzo": fogzo.FogzoEstimator,
    "n = 3": lambda w, **o: fogzo.FogzoEstimator(w, num_samples=3, **o),
    "paired": lambda w, **o: fogzo.FogzoEstimator(w, paired=True, **o),
    "one-sided": lambda w, **o: fogzo.FogzoEstimator(w, one_sided=True, **o),
    "flips": lambda w, **o: fogzo.FogzoEstimator(w, track_flips=True, **o),
    "spsa": fogzo.SpsaEstimator,
    "control variate": fogzo.ControlVariateEstimator,
}
PRESETS = {
    "lsq": lambda: fogzo.lsq(2),
    "quest": lambda: fogzo.quest(2, block=4),
    "ternary": fogzo.ternary,
}


class Net(nn.Module):
    """Dropout, batch norm, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.twice(self.dropout(self.twice(x).relu()))
        return self.last(x)


def training(preset="lsq", dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fogzo.quantize_(Net().to(dtype), PRESETS[preset](), lambda module, name: True)
        x, y = torch.randn(16, 8, dtype=dtype), torch.randint(4, (16,))
    return model, lambda: cross_entropy(model(x).float(), y)


def step(make, preset="lsq", dtype=torch.float32, **options):
    """Gradients and statistics of a step, and the model."""
    model, loss_of = training(preset, dtype)
    estimator = make(fogzo.quantized_weights(model), **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with estimator.record_rng():
            loss = loss_of()
        loss.backward()
        stats = estimator.refine_grads_(loss_of, expected_loss=loss)
    return [p.grad for p in model.parameters()], stats, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_lean_is_the_default_to_the_bit(name, preset, dtype):
    grads, stats, _ = step(ESTIMATORS[name], preset, dtype)
    lean_grads, lean_stats, model = step(ESTIMATORS[name], preset, dtype, lean=True)
    assert lean_stats == stats
    assert all(torch.equal(a, b) for a, b in zip(grads, lean_grads, strict=True))
    untouched, _ = training(preset, dtype)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, q)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("options", [{}, {"noise_shape": "tensor_rms"}, {"num_samples": 3}])
@pytest.mark.parametrize("preset", PRESETS)
def test_kept_noise_gives_what_drawing_it_twice_gives_in_every_step(preset, options):
    grads = {}
    for keep_noise in (True, False):
        model, loss_of = training(preset)
        estimator = fogzo.ControlVariateEstimator(
            fogzo.quantized_weights(model), keep_noise=keep_noise, **options
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for _ in range(3):
                with estimator.record_rng():
                    loss = loss_of()
                loss.backward()  # gradients add up, so that every step's stay to be seen
                estimator.refine_grads_(loss_of, expected_loss=loss)
        grads[keep_noise] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads[True], grads[False], strict=True))


def test_only_the_layer_at_work_is_moved():
    model, loss_of = training()
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved_at = []

    def look(module, arguments, output):
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, saved[n])]
        moved_at.append((names[module], moved))

    names = {module: name for name, module in model.named_modules()}
    # Before the probes' own hooks, which run last.
    for layer in (model.first, model.twice, model.last):
        layer.register_forward_hook(look)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), lean=True)
    loss_of().backward()
    moved_at.clear()
    estimator.refine_grads_(loss_of)
    order = ["first", "twice", "twice", "last"]
    assert moved_at == [(name, [f"{name}.weight"]) for name in 2 * order]


def test_an_exception_in_a_forward_leaves_nothing_behind():
    model, loss_of = training()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), lean=True)
    loss_of().backward()
    saved = [p.detach().clone() for p in model.parameters()]

    def fail(module, arguments):
        raise RuntimeError("in the middle")

    model.last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        estimator.refine_grads_(loss_of)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), saved, strict=True))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_closure_that_runs_no_quantized_layer_is_refused():
    model, loss_of = training()
    _, other_loss = training()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), lean=True)
    loss_of().backward()
    with pytest.raises(ValueError, match="moved nothing"):
        estimator.refine_grads_(other_loss)


def test_keep_noise_takes_three_words():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"True, False or \"auto\", got 'yes'.*keep_noise=False"):
        fogzo.FogzoEstimator([("w", layer.weight, 0.5)], keep_noise="yes")


def test_what_lean_probes_cannot_do_is_refused_at_once():
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="model=model, or leave lean=True out"):
        fogzo.FogzoEstimator([("w", layer.weight, 0.5)], lean=True)
    fogzo.FogzoEstimator([("w", layer.weight, 0.5)], lean=True, model=layer)
    with pytest.raises(ValueError, match="lean=True or probes_at_once"):
        fogzo.FogzoEstimator(
            [("w", layer.weight, 0.5)], lean=True, model=layer, probes_at_once="auto"
        )
