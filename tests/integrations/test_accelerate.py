"""Loops of accelerate, as its users write them."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import fogzo
from toolbox import Net, batch, fill

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
refine = fogzo.integrations.accelerate.refine

pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")


@pytest.fixture(autouse=True)
def _streams():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def network():
    return fogzo.quantize_(Net(norm=nn.LayerNorm), fogzo.lsq(2))


def loss_of(model, x, y):
    return mse_loss(model(x), y)


def fresh_accelerator(steps=2, **options):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps, **options)


class Run:
    """A network, an optimizer and unequal batches, prepared."""

    def __init__(self, scaler=None, **options):
        self.accelerator = fresh_accelerator(**options)
        self.accelerator.scaler = scaler  # as with mixed_precision="fp16", which needs a GPU
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = DataLoader(TensorDataset(*batch(28)), batch_size=6)  # the last one of 4 rows
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        if scaler is not None:
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
        self.estimator = refine(self.accelerator, self.model, noise_share=0.1)
        self.stats = []

    def train(self, after=lambda: None):
        """The loop of accelerate's documentation, with `record` in it."""
        accelerator = self.accelerator
        for x, y in self.loader:
            with accelerator.accumulate(self.model):
                loss = self.estimator.record(loss_of, self.model, x, y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self.stats.append(self.estimator.stats)
                    accelerator.clip_grad_norm_(self.model.parameters(), 0.05)
                self.optimizer.step()
                self.optimizer.zero_grad()
            after()
        return self


def by_hand(rng):
    """The same without accelerate."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.1)
    torch.set_rng_state(rng)
    chunks = list(zip(*(tensor.split(6) for tensor in batch(28)), strict=True))
    stats = []
    for window in (chunks[:2], chunks[2:4], chunks[4:]):
        for x, y in window:
            (estimator.record(loss_of, model, x, y) / 2).backward()
        stats.append(estimator.refine_grads_())
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return model, stats


def test_a_run_equals_the_plain_loop_bit_for_bit(monkeypatch):
    run = Run()
    begun = []
    own = run.estimator.record

    def record(*arguments):
        begun or begun.append(torch.get_rng_state())
        return own(*arguments)

    monkeypatch.setattr(run.estimator, "record", record)
    run.train()
    model, stats = by_hand(begun[0])
    assert run.stats == stats
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True)
    )


def test_a_scaler_changes_no_agreement():
    torch.manual_seed(1)
    plain = Run().train()
    torch.manual_seed(1)
    scaled = Run(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**14)).train()
    for a, b in zip(plain.stats, scaled.stats, strict=True):
        assert a.agreement == pytest.approx(b.agreement, rel=1e-3)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_its_state_is_saved_and_loaded(tmp_path):
    run = Run().train()
    run.accelerator.save_state(tmp_path)
    run.train()
    resumed = Run()
    resumed.accelerator.load_state(tmp_path)
    assert resumed.estimator.state_dict() == {"step": 3, "seed": 0}
    resumed.train()
    assert run.stats[3:] == resumed.stats
    pairs = zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_hooks_of_a_device_map_work_after_quantizing_and_are_refused_before():
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    model = fill(Net(norm=nn.LayerNorm), 0.4)
    accelerate.hooks.add_hook_to_module(model.first, hook)
    with pytest.raises(ValueError, match="device_map"):
        fogzo.quantize_(model, fogzo.lsq(2))

    models = [network() for _ in range(2)]
    accelerate.hooks.add_hook_to_module(models[1].first, hook)
    grads = []
    for model in models:
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.1)
        torch.manual_seed(1)
        estimator.record(loss_of, model, *batch()).backward()
        estimator.refine_grads_()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_cannot_be_refined_is_refused():
    run = Run()
    with pytest.raises(ValueError, match=r"if accelerator\.sync_gradients"):
        refine(run.accelerator, run.model)
    other = copy.copy(fresh_accelerator())
    other.__class__ = type(
        "Deep", (type(other),), {"distributed_type": "DistributedType.DEEPSPEED"}
    )
    with pytest.raises(ValueError, match="FSDP2"):
        refine(other, run.model)
    with pytest.raises(ValueError, match=r"refine\(accelerator, model, estimator=fogzo.Fogzo"):
        refine(fresh_accelerator(), run.model, estimator=run.estimator)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"kappa": 0.1},
            r"noise_share=fogzo.linear_noise_share\(total_steps=10_000, kappa=0.1\)\)",
        ),
        ({"kappa": 0.1, "start": 0.5}, r"share\(total_steps=10_000, kappa=0.1, start=0.5\)\)"),
        ({"nsamples": 3}, r"no option 'nsamples', .*: refine\(accelerator, model, num_samples=3\)"),
    ],
)
def test_options_that_an_accelerator_has_not_are_refused_with_those_it_has(options, says):
    with pytest.raises(ValueError, match=says):
        refine(fresh_accelerator(), network(), **options)


def test_a_model_before_its_accelerator_is_refused():
    accelerator, model = fresh_accelerator(), network()
    with pytest.raises(ValueError, match=r"got Net and Accelerator: refine\(accelerator, model\)"):
        refine(model, accelerator)
    with pytest.raises(ValueError, match="got Accelerator and list"):
        refine(accelerator, [model])


def test_weights_that_another_library_rounds_are_listed_by_its_function():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    model, accelerator = Net(norm=nn.LayerNorm), fresh_accelerator(steps=1)
    base = IntxWeightOnlyConfig(torch.int4, granularity=PerAxis(0))
    quantize_(model, QATConfig(base, step="prepare"))
    model = accelerator.prepare(model)
    weights = fogzo.integrations.torchao.quantized_weights
    estimator = refine(accelerator, model, weights=weights, noise_share=0.1)
    accelerator.backward(estimator.record(loss_of, model, *batch()))
    assert estimator.stats.agreement is not None and len(estimator.weights) == len(weights(model))


def test_a_loss_that_was_not_recorded_is_told_how_to_be():
    run = Run(steps=1)
    with pytest.raises(ValueError, match=r"record\(compute_loss, x, y\).*accelerator\.backward"):
        run.accelerator.backward(loss_of(run.model, *batch()))


def test_micro_batches_refined_by_mistake_are_found_out():
    # no_sync by hand: accelerator.sync_gradients says True for every micro-batch.
    run = Run(steps=1)
    x, y = batch()
    with run.accelerator.no_sync(run.model):
        run.accelerator.backward(run.estimator.record(loss_of, run.model, x, y))
    with pytest.raises(ValueError, match="once per optimizer step"):
        run.accelerator.backward(run.estimator.record(loss_of, run.model, x, y))


def test_one_accelerator_trains_one_model_after_another_and_two_at_once():
    accelerator = fresh_accelerator(steps=1)
    x, y = batch()

    def prepared():
        model = network()
        return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step(estimator, model, optimizer):
        accelerator.backward(estimator.record(loss_of, model, x, y))
        if accelerator.backward.refined_by_fogzo is not estimator:
            estimator.refine_grads_()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = prepared()
    first = refine(accelerator, model)
    other, of_other = prepared()
    with pytest.raises(ValueError, match="refines gradients already"):
        refine(accelerator, other)
    second = fogzo.FogzoEstimator(fogzo.quantized_weights(other))  # as the message says
    for _ in range(2):
        step(first, model, optimizer)
        step(second, other, of_other)
    assert (first.step, second.step) == (2, 2)

    freed = weakref.ref(first)
    del model, optimizer, other, of_other, first, second
    accelerator.free_memory()
    model, optimizer = prepared()
    third = refine(accelerator, model)
    step(third, model, optimizer)
    gc.collect()
    assert third.step == 1 and freed() is None
    assert accelerator._custom_objects == [third]


def test_cewt_asks_for_the_optimizer_inside():
    run = Run()
    with pytest.raises(ValueError, match=r"AcceleratedOptimizer wraps another .* no hooks"):
        fogzo.methods.cewt(run.model, run.optimizer)
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.0
    constraint = fogzo.methods.cewt(run.model, run.optimizer.optimizer)  # as the message says
    run.train()
    weights = fogzo.quantized_weights(run.model)
    norms = torch.stack([weight.param.detach().norm() for weight in weights])
    torch.testing.assert_close(norms, torch.tensor(list(constraint.norms.values())))
