"""Lightning's Trainer with the callback."""

import copy
import itertools
import pickle
import tempfile

import pytest
import torch
from tiny import audit_every_step, differences
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fogzo
from toolbox import Net, batch, streams_put_back

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning.pytorch as lightning
import lightning.pytorch.demos.boring_classes as boring
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

FogzoCallback = fogzo.integrations.lightning.FogzoCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
MANUAL = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
ROWS = 40  # micro-batches of 6 rows, the last one of 4


@pytest.fixture(autouse=True)
def _streams(monkeypatch):
    audit_every_step(monkeypatch)
    with streams_put_back(0):
        yield


class Module(lightning.LightningModule):
    """What users write: dropout, logs, a metric and counters of its own."""

    clip = 0.05

    def __init__(self, manual=False, dropout=0.2, skipped=()):
        super().__init__()
        self.automatic_optimization = not manual
        net = Net(dropout, nn.LayerNorm)
        self.net = fogzo.quantize_(net, fogzo.lsq(2))
        self.mean_loss = torchmetrics.MeanMetric()
        self.skipped, self.seen, self.losses = skipped, 0, []
        self.total = torch.zeros(())
        self.begun = []

    def training_step(self, batch, batch_idx):
        self.begun.append(torch.get_rng_state())
        if batch_idx in self.skipped:
            return None
        x, y = batch
        loss = mse_loss(self.net(x).float(), y)
        self.seen += len(x)
        self.losses.append(loss.item())
        self.total += loss.detach()
        self.mean_loss(loss.detach())
        self.log("loss", loss)
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        self.logger.log_metrics({"raw": loss.item()}, step=batch_idx)
        if self.automatic_optimization:
            return {"loss": loss, "more": x}
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        with optimizer.toggle_model():
            self.manual_backward(loss / 2)
        if batch_idx % 2 or len(x) < 6:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return None

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader():
    return DataLoader(TensorDataset(*batch(ROWS)), batch_size=6)


class Logger(CSVLogger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__(tempfile.mkdtemp())  # where a Trainer puts checkpoints
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(metrics)

    def save(self):
        pass


def trainer(callback, **options):
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05, **options}
    return lightning.Trainer(
        callbacks=[] if callback is None else [callback],
        logger=Logger(),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


class Kept(FogzoCallback):
    """Keeps the statistics of all steps."""

    def __init__(self, **options):
        super().__init__(**options)
        self.all = []

    def on_before_optimizer_step(self, *args):
        super().on_before_optimizer_step(*args)
        self.all.append(self.stats)


def by_hand(begun, epochs=1, skipped=(), autocast=False):
    """The same run in a plain loop."""
    module = Module()
    model = module.net
    (optimizer,), _ = module.configure_optimizers()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.1)
    stats = []

    def compute_loss(x, y):
        return mse_loss(model(x).float(), y)

    chunks = list(enumerate(zip(*(tensor.split(6) for tensor in batch(ROWS)), strict=True)))
    torch.set_rng_state(begun)
    for start in range(0, len(chunks), 2):
        for i, (x, y) in chunks[start : start + 2]:
            if i not in skipped:
                with torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False):
                    loss = estimator.record(compute_loss, x, y)
                (loss / 2).backward()
        stats.append(estimator.refine_grads_())
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, stats


@pytest.fixture(params=[False, True], ids=["automatic", "manual"])
def run(request):
    """A run in either way of optimization."""
    module, callback = Module(manual=request.param), Kept(noise_share=0.1)
    own = module.training_step
    runner = trainer(callback, **(MANUAL if request.param else {}))
    runner.fit(module, loader())
    assert module.training_step == own
    return module, callback, runner


def test_a_run_equals_the_plain_loop_bit_for_bit(run):
    module, callback, runner = run
    model, stats = by_hand(module.begun[0])
    assert callback.all == stats
    assert len(stats) == runner.global_step == callback.estimator.step == 4
    assert max(differences(module.net, model)) == 0


def test_probes_leave_no_trace_in_logs_metrics_and_the_modules_own_numbers(run):
    module, callback, runner = run
    assert module.seen == ROWS
    assert len(module.begun) == len(module.losses) == 7
    assert module.total.item() == pytest.approx(sum(module.losses), rel=1e-6)
    logged = runner.logger.logged
    assert [entry["raw"] for entry in logged if "raw" in entry] == module.losses
    batches = (1, 3, 5, 6) if module.automatic_optimization else range(7)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses == pytest.approx([module.losses[i] for i in batches], rel=1e-6)
    mean = sum(module.losses) / 7
    assert runner.callback_metrics["mean_loss"].item() == pytest.approx(mean, rel=1e-6)
    agreements = [entry["agreement"] for entry in logged if "agreement" in entry]
    expected = [stats.agreement for stats in callback.all]
    assert list(dict.fromkeys(agreements)) == pytest.approx(expected)
    assert logged[-2].keys() >= {"agreement", "kappa", "fallbacks", "loss"}


class ByIndex(Module):
    """Weighs each batch by its number."""

    def number(self, batch_idx):
        return batch_idx

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = mse_loss(self.net(x), y) * (1 + self.number(batch_idx) / 4)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2 or len(x) < 6:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip)
            optimizer.step()
            optimizer.zero_grad()
        return None


class ByCounters(ByIndex):
    """The same by what it counts itself."""

    def number(self, batch_idx):
        self.seen += 1
        self.losses.append(self.seen)
        self.total += 1
        self.mean_loss(1.0)
        assert self.seen == len(self.losses) == self.total == self.mean_loss.weight
        return self.seen - 1


class BySchedule(ByIndex):
    """The same by an object that it holds."""

    def number(self, batch_idx):
        return next(self.schedule)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_loss_that_counts_its_calls_is_replayed_with_the_count_of_each(manual):
    runs = []
    for cls in (ByCounters, ByIndex):
        module, callback = cls(manual, dropout=0.0), Kept(noise_share=0.1)
        trainer(callback, **(MANUAL if manual else {})).fit(module, loader())
        runs.append((module, callback))
    (counting, kept), (told, expected) = runs
    assert counting.seen == counting.total == 7
    assert kept.all == expected.all and len(kept.all) == 4
    assert max(differences(counting.net, told.net)) == 0


def test_a_count_that_nobody_puts_back_is_told_where_it_would_be():
    module = BySchedule()
    module.schedule = itertools.count()
    with pytest.raises(ValueError, match=r"self\.global_step, and keep .* of the LightningModule"):
        trainer(FogzoCallback()).fit(module, loader())


def test_bfloat16_runs_again_in_bfloat16():
    module, callback = Module(), Kept(noise_share=0.1)
    trainer(callback, precision="bf16-mixed").fit(module, loader())
    model, stats = by_hand(module.begun[0], autocast=True)
    assert callback.all == stats
    assert max(differences(module.net, model)) == 0


def test_a_scaler_changes_no_agreement():
    agreements = []
    for scale in (1.0, 2.0**12):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        module, callback = Module(dropout=0.0), Kept(noise_share=0.1)
        trainer(callback, plugins=[precision]).fit(module, loader())
        agreements.append([stats.agreement for stats in callback.all])
    assert agreements[1] == pytest.approx(agreements[0], rel=0.02)


class TwoNetworks(Module):
    """Two backward passes and optimizers in a step, of which one trains quantized weights."""

    def __init__(self):
        super().__init__(manual=True, dropout=0.0)
        self.critic = nn.Linear(3, 1)
        self.steps = 0

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.critic, self.net)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            loss = sign * (self.critic(self.net(x)) - self.critic(y)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
            self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.step()
            self.steps += 1


def test_of_several_backward_passes_the_one_before_the_step_is_measured():
    module, callback = TwoNetworks(), Kept(noise_share=0.0, agreement="measured")
    trainer(callback, **MANUAL).fit(module, loader())
    assert module.steps == 14
    measured = callback.all[1::2]
    assert [stats.step for stats in measured] == list(range(7))
    for stats, loss in zip(measured, module.losses[1::2], strict=True):
        assert sum(stats.probe_losses) / 2 == pytest.approx(loss, rel=0.3)


class Skipping(Module):
    """Clips in every batch, takes no step in some, and begins each one without gradients."""

    def __init__(self, skipped):
        super().__init__(manual=True, dropout=0.0, skipped=skipped)
        self.refined = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(mse_loss(self.net(x), y))
        raw = self.net.first.weight.grad.clone()
        self.clip_gradients(optimizer, gradient_clip_val=1e6)
        self.refined.append(not torch.equal(self.net.first.weight.grad, raw))
        if batch_idx not in self.skipped:
            optimizer.step()


def test_a_step_that_is_skipped_after_clipping_leaves_the_next_to_be_refined():
    module, callback = Skipping(skipped=(1, 2, 4)), Kept(noise_share=0.1)
    runner = trainer(callback, **MANUAL)
    runner.fit(module, loader())
    assert module.refined == [True] * 7
    assert [stats.step for stats in callback.all] == [0, 3, 5, 6]
    logged = [entry["agreement"] for entry in runner.logger.logged if "agreement" in entry]
    expected = [stats.agreement for stats in callback.all]
    assert list(dict.fromkeys(logged)) == pytest.approx(expected)


class CriticLast(TwoNetworks):
    """Both backward passes come before both steps, the critic's without the quantized network."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        critic, net = self.optimizers()
        made = self.net(x)
        for optimizer, loss in (
            (net, self.critic(made).square().mean()),
            (critic, (self.critic(made.detach()) - self.critic(y)).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05)
        for optimizer in (net, critic):
            optimizer.step()


def test_a_backward_pass_of_another_network_leaves_refined_gradients_refined():
    module, callback = CriticLast(), Kept(noise_share=0.1)
    trainer(callback, **MANUAL).fit(module, loader())
    assert [stats.step for stats in callback.all[::2]] == list(range(7))


class ByClosure(Skipping):
    """Its backward pass is in the closure of its optimizer's step."""

    def training_step(self, batch, batch_idx):
        optimizer, (x, y) = self.optimizers(), batch

        def closure():
            optimizer.zero_grad()
            self.manual_backward(mse_loss(self.net(x), y))

        optimizer.step(closure)


def test_a_backward_pass_in_the_closure_of_a_step_is_reached_by_probes():
    module, callback = ByClosure(()), Kept(noise_share=0.1)
    trainer(callback, **MANUAL).fit(module, loader())
    assert [stats.step for stats in callback.all] == list(range(7))


class ClippingTooOften(Skipping):
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(mse_loss(self.net(x), y))
        self.clip_gradients(self.optimizers(), gradient_clip_val=1.0)


def test_a_backward_pass_that_adds_to_refined_gradients_is_refused():
    with pytest.raises(ValueError, match=r"after the last backward\(\), drop the gradients"):
        trainer(FogzoCallback(), **MANUAL).fit(ClippingTooOften(()), loader())


def test_latent_weights_in_sixteen_bits_are_warned_of():
    with pytest.warns(RuntimeWarning, match="16 bits.*bf16-mixed"):
        trainer(FogzoCallback(), precision="bf16-true", max_steps=1).fit(
            Module(dropout=0.0), loader()
        )


def test_skipped_micro_batches_are_no_part_of_a_step():
    module, callback = Module(skipped=(2, 4, 5)), Kept(noise_share=0.1)
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer(callback).fit(module, loader())
    assert [stats and stats.step for stats in callback.all] == [0, 1, 1, 2]


def test_copies_of_a_module_in_mid_training_have_methods_of_their_own():
    class Averaging(Kept):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.copies = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))

    callback = Averaging()
    trainer(callback).fit(Module(), loader())
    for copied in callback.copies:
        assert copied.training_step.__self__ is copied.manual_backward.__self__ is copied
    assert len(callback.all) == 4


def test_the_noise_grows_until_the_end_and_the_loss_falls():
    module, callback = Module(dropout=0.0), Kept(kappa=0.02, start=0.5)
    trainer(callback, max_epochs=6, gradient_clip_val=1.0).fit(module, loader())
    assert module.losses[-7] < module.losses[0]
    kappas = [stats.kappa for stats in callback.all]
    assert kappas[:12] == [None] * 12
    assert kappas[-1] == pytest.approx(0.02, rel=0.2)


def test_another_run_counts_its_own_fallbacks():
    callback = FogzoCallback()
    callback.load_state_dict({"estimator": {"step": 0, "seed": 0}, "fallbacks": 3})
    for expected in (3, 0):
        trainer(callback, max_steps=1).fit(Module(), loader())
        assert callback.state_dict()["fallbacks"] == expected


def test_a_resumed_run_is_one_that_was_never_interrupted(tmp_path):
    # Lightning continues in the middle of an epoch with whatever its loader gives then.
    rows = TensorDataset(*(tensor.repeat(7, 1) for tensor in batch(6)))
    same = DataLoader(rows, batch_size=6)
    runs = []
    for seed, path in ((0, None), (1, tmp_path / "step=2.ckpt")):
        module, callback = Module(dropout=0.0), Kept(kappa=0.1, seed=seed)
        runner = trainer(callback, max_epochs=2)
        if path is None:
            saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
            runner.callbacks.append(saving)
        runner.fit(module, same, ckpt_path=path, weights_only=False)
        runs.append((module, callback))
    (whole, kept), (resumed, kept_again) = runs
    assert kept_again.all == kept.all[2:]
    assert kept_again.estimator.state_dict() == {"step": 8, "seed": 0}
    assert max(differences(whole.net, resumed.net)) == 0


def test_a_checkpoint_that_is_validated_is_not_where_the_next_run_begins(tmp_path):
    callback = Kept(kappa=0.1)
    for fold in range(2):
        callback.all.clear()
        runner = trainer(callback)
        module = Module()
        runner.fit(module, loader())
        assert (callback.all[0].kappa, callback.estimator.step) == (0.0, 4)
        runner.save_checkpoint(tmp_path / f"{fold}.ckpt")
        module.validation_step = lambda batch, batch_idx: None
        runner.validate(module, loader(), ckpt_path=tmp_path / f"{fold}.ckpt", weights_only=False)


class WithBatchNorm(Module):
    """One of the networks for which weight averaging runs another epoch, forward only."""

    def __init__(self):
        super().__init__()
        self.net = fogzo.quantize_(Net(0.0), fogzo.lsq(2))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def test_the_last_epoch_of_weight_averaging_is_left_alone():
    module, callback = WithBatchNorm(), Kept(noise_share=0.1)
    runner = trainer(callback, max_epochs=2, accumulate_grad_batches=1)
    runner.callbacks.append(StochasticWeightAveraging(1e-3, swa_epoch_start=1))
    runner.fit(module, loader())
    batches = len(loader())
    assert len(module.begun) == 3 * batches  # what probes add is taken back
    assert callback.estimator.step == 2 * batches


class WithoutManualBackward(Module):
    def training_step(self, batch, batch_idx):
        self.net(batch[0]).sum().backward()
        self.optimizers().step()


class ByRawOptimizer(Module):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.net(batch[0]).sum())
        self.optimizers(use_pl_optimizer=False).step()


class ByIterator(Module):
    def training_step(self, dataloader_iter):
        return self.net(next(dataloader_iter)[0][0]).sum()


class TwoOptimizers(Module):
    def configure_optimizers(self):
        halves = self.net.first, self.net.second
        return [torch.optim.SGD(half.parameters(), lr=0.1) for half in halves]


class WithLBFGS(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.net.parameters())


class Streamed(IterableDataset):
    def __iter__(self):
        return zip(*batch(ROWS), strict=True)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"callback": FogzoCallback(kappa=0.01), "max_epochs": -1},
            "until the end of a run",
        ),
        ({"callback": FogzoCallback(kappa=0.01), "data": Streamed()}, "until the end of a run"),
        ({"module": WithoutManualBackward(manual=True), **MANUAL}, r"self\.manual_backward"),
        ({"module": ByRawOptimizer(manual=True), **MANUAL}, r"= self\.optimizers\(\), not"),
        ({"module": ByIterator()}, "dataloader_iter"),
        ({"module": TwoOptimizers(manual=True), **MANUAL}, "trained by 2 optimizers"),
        ({"module": WithLBFGS()}, "LBFGS"),
        ({"module": boring.BoringModel()}, "quantize the model first"),
    ],
)
def test_what_cannot_be_refined_is_refused(options, says):
    module = options.pop("module", None) or Module()
    callback = options.pop("callback", None) or FogzoCallback()
    data = DataLoader(options.pop("data", loader().dataset), batch_size=6)
    runner = trainer(callback, **options)
    with pytest.raises(ValueError, match=says):
        runner.fit(module, data)


class Described(fogzo.FogzoEstimator):
    """A class of one's own, which looks for a weight."""

    def __init__(self, weights, *, name, **options):
        super().__init__([w for w in weights if w.name == name], **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kapa": 0.1}, r"no option 'kapa', but .*: FogzoCallback\(kappa=0.1\)"),
        (
            {"nsamples": 3},
            r"no option 'nsamples', but .*num_samples.*: FogzoCallback\(num_samples=3\)",
        ),
        ({"colour": 3}, r"no option 'colour', .*: FogzoCallback\(num_samples=2\)"),
        ({"kappa": -1}, "kappa is a noise-to-signal power"),
        ({"start": 2}, "start is the fraction"),
        ({"num_samples": 0}, "num_samples must be a positive integer"),
        ({"noise_share": 1.5}, "noise_share"),
        ({"evaluate": "fast"}, "evaluate must be one of"),
        ({"model": 3}, "model must be the nn.Module"),
        ({"estimator": fogzo.SpsaEstimator, "kappa": 0.1}, "leave noise_share out"),
    ],
)
def test_options_that_would_fail_when_training_begins_are_refused_at_once(options, says):
    with pytest.raises(ValueError, match=says):
        FogzoCallback(**options)


@pytest.mark.filterwarnings("error")
def test_options_that_no_single_weight_would_take_are_accepted():
    schedule = fogzo.linear_noise_share(total_steps=10, num_weights=999)
    FogzoCallback(noise_share=schedule, model=Net(), evaluate="lean")
    FogzoCallback(estimator=fogzo.ControlVariateEstimator, weight=fogzo.every(2, schedule))
    FogzoCallback(estimator=Described, name="first", num_samples=2, kappa=0.1)
    FogzoCallback(estimator=Described, name="first", its_own=3)  # out of **options, perhaps
    FogzoCallback(noise_share=0.9)  # of which it is warned when the weights are known


def test_a_run_without_an_end_is_told_to_name_one_with_the_noise_that_was_asked_for():
    callback = FogzoCallback(kappa=0.01, start=0.5)
    with pytest.raises(ValueError, match=r"share\(total_steps=10_000, kappa=0.01, start=0.5\)\)"):
        trainer(callback).fit(Module(), DataLoader(Streamed(), batch_size=6))
    schedule = fogzo.linear_noise_share(total_steps=10_000, kappa=0.01, start=0.5)
    for advised in (FogzoCallback(noise_share=schedule), FogzoCallback()):
        trainer(advised).fit(Module(), DataLoader(Streamed(), batch_size=6))
        assert advised.estimator.step == 4


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_strategies_that_keep_the_gradients_to_themselves_are_refused(package, monkeypatch):
    runner = trainer(None)
    strategy = pytest.importorskip(f"{package}.strategies").FSDPStrategy()
    monkeypatch.setattr(runner._accelerator_connector, "strategy", strategy)
    with pytest.raises(ValueError, match="fully_shard in configure_model"):
        FogzoCallback().on_fit_start(runner, Module())


def test_options_that_say_two_things_are_refused():
    with pytest.raises(ValueError, match="noise_share of your own"):
        FogzoCallback(kappa=0.01, noise_share=0.1)
    made = fogzo.FogzoEstimator(fogzo.quantized_weights(Module()))
    with pytest.raises(ValueError, match=r"FogzoCallback\(estimator=fogzo.FogzoEstimator, num_"):
        FogzoCallback(estimator=made)
    first, second = FogzoCallback(), FogzoCallback()
    runner = trainer(first)
    runner.callbacks.append(second)
    with pytest.raises(ValueError, match="two callbacks"):
        runner.fit(Module(), loader())
