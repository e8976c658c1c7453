"""transformers' Trainer and its subclasses, trained as their users do."""

import copy
import itertools
import math
from collections import Counter, defaultdict, deque

import pytest
import torch
from tiny import audit_every_step, count_calls, differences, llama, sequences, transformers
from torch import nn

import fogzo
from toolbox import Net, batch

refine = fogzo.integrations.transformers.refine

pytestmark = [
    # Of such small batches a measured slope is tiny, or large, now and then.
    pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def _streams():
    with torch.random.fork_rng(devices=[]):
        yield


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def make_trainer(folder, model=None, data=None, cls=None, **options):
    return (cls or transformers.Trainer)(
        model=model or llama(),
        args=arguments(folder, **options),
        train_dataset=data or sequences(),
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train(trainer, **options):
    """Refine and train; the handle of `refine`."""
    handle = refine(trainer, noise_share=0.05, **options)
    trainer.train()
    return handle


def test_a_run_equals_the_plain_loop_bit_for_bit(tmp_path, monkeypatch):
    audit_every_step(monkeypatch)
    trainer = make_trainer(tmp_path, model=llama(dropout=0.0))
    handle = refine(trainer, kappa=0.5, start=0.25, num_samples=2)
    trainer.train()

    model, rows = llama(dropout=0.0), sequences()
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model),
        noise_share=fogzo.linear_noise_share(total_steps=4, kappa=0.5, start=0.25),
        num_samples=2,
        seed=5,
    )
    named = dict(model.named_parameters())
    plain = [n for n in named if n.endswith("_step") or "norm" in n]
    groups = [
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": 0.1},
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    model.train()
    agreements = []
    for start in range(0, len(rows), 4):  # the last window has one micro-batch of two
        window = [rows[i : i + 2] for i in range(start, min(start + 4, len(rows)), 2)]
        batches = [{k: torch.stack([r[k] for r in part]) for k in part[0]} for part in window]
        count = sum((inputs["labels"][:, 1:] != -100).sum() for inputs in batches)
        for inputs in batches:
            output = estimator.record(model, **inputs, num_items_in_batch=count)
            output.loss.backward()
        agreements.append(estimator.refine_grads_().agreement)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    assert differences(trainer.model, model) == [0.0] * len(named)
    assert handle.estimator.state_dict() == {"step": 4, "seed": 5} == estimator.state_dict()
    assert handle.stats.step == 3
    assert agreements[0] is None
    assert logged(trainer, "agreement") == agreements[1:]
    assert logged(trainer, "kappa") == pytest.approx([0, 0.5 / 3, 1 / 3], rel=1e-3)
    assert logged(trainer, "fallbacks") == [0, 0, 0, 0]


def test_the_loss_falls_and_each_step_is_refined_once(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, fogzo.FogzoEstimator, "refine_grads_")
    trainer = make_trainer(
        tmp_path, num_train_epochs=4, max_grad_norm=1.0, learning_rate=0.03, logging_steps=4
    )
    refine(trainer)
    trainer.train()
    assert len(calls) == trainer.state.global_step == 16
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert len(logged(trainer, "agreement")) == 4


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path, model=llama(dropout=0.0), **options)
    refine(whole, kappa=0.5, start=0.3)
    whole.train()
    resumed = make_trainer(tmp_path, model=llama(dropout=0.0), **options)
    handle = refine(resumed, kappa=0.5, start=0.3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # in mid-epoch
    assert max(differences(whole.model, resumed.model)) == 0
    assert handle.estimator.step == 8
    assert logged(resumed, "agreement") == logged(whole, "agreement")

    # A checkpoint from before refine was called: the step is the trainer's.
    (tmp_path / "checkpoint-3" / "fogzo_estimator.pt").unlink()
    older = make_trainer(tmp_path, model=llama(dropout=0.0), **options)
    refine(older, kappa=0.5, start=0.3)
    older.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max(differences(whole.model, older.model)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_probes_compute_what_the_forward_pass_did(options, tmp_path, monkeypatch):
    audit_every_step(monkeypatch)
    trainer = make_trainer(tmp_path, max_steps=2, **options)
    handle = train(trainer)
    assert handle.stats.fallback is None
    assert len(logged(trainer, "agreement")) == 2


class HalfPrecision(transformers.TrainerCallback):
    """Scales losses and unscales gradients as with fp16=True, which needs a GPU."""

    def __init__(self, trainer):
        self.accelerator = trainer.accelerator
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def on_train_begin(self, *args, **kwargs):
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


def test_a_compiled_network_of_ones_own(tmp_path, monkeypatch):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(dropout=0.0, norm=nn.LayerNorm)

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    audit_every_step(monkeypatch)
    trainer = make_trainer(
        tmp_path,
        model=fogzo.quantize_(Regression(), fogzo.lsq(2)),
        data=[{"x": x, "labels": y} for x, y in zip(*batch(8), strict=True)],
        torch_compile=True,
        torch_compile_backend="eager",
    )
    train(trainer)
    assert len(logged(trainer, "agreement")) == 2


def test_a_scaler_of_half_precision_changes_nothing(tmp_path):
    runs = []
    for scaled in (False, True):
        trainer = make_trainer(tmp_path, max_steps=3)
        if scaled:
            trainer.add_callback(HalfPrecision(trainer))
        handle = train(trainer)
        runs.append((logged(trainer, "agreement"), logged(trainer, "grad_norm"), trainer.model))
        assert handle.stats.probe_losses[0] < 10  # in the loss's units
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3)
    assert max(differences(runs[0][2], runs[1][2])) < 1e-5


def test_evaluations_in_mid_training_change_nothing(tmp_path):
    models = []
    for evaluations in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = transformers.Trainer(
            model=llama(dropout=0.0),  # loaders draw from the stream that dropout draws from
            args=arguments(tmp_path, **evaluations),
            train_dataset=sequences(),
            eval_dataset=sequences(4),
        )
        train(trainer)
        models.append(trainer.model)
        assert len(logged(trainer, "eval_loss")) == (4 if evaluations else 0)
    assert max(differences(*models)) == 0


def test_a_data_set_may_draw_random_numbers(tmp_path, monkeypatch):
    audit_every_step(monkeypatch)

    class Noisy(torch.utils.data.Dataset):
        rows = sequences()

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            shift = int(torch.randint(3, ()))
            return {key: value.roll(shift) for key, value in self.rows[i].items()}

    train(make_trainer(tmp_path, data=Noisy()))


def test_a_trainer_of_ones_own_counts_once(tmp_path):
    class Counting(transformers.Trainer):
        tokens = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.tokens += inputs["input_ids"].numel()
            self.rows.append(len(inputs["input_ids"]))
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
            self.model_accepts_loss_kwargs = False
            return (loss, logits) if return_outputs else loss

    trainer = make_trainer(tmp_path, cls=Counting)
    trainer.rows = []
    handle = train(trainer)
    assert trainer.tokens == 14 * 8
    assert trainer.rows == [2] * 7
    assert handle.stats.fallback is None


class Collecting(transformers.Trainer):
    """Keeps losses in every kind of container, and looks at what it holds besides."""

    def __init__(self, **options):
        super().__init__(**options)
        self.floats, self.seen, self.total = [], [], torch.zeros(())
        self.kinds = {"a": [], "b": {}}
        self.again = self.kinds["a"]
        self.kinds["itself"] = self.kinds
        self.recent, self.counts = deque(maxlen=3), defaultdict(Counter)
        self.last, self.weights = torch.zeros(()), list(self.model.parameters())

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = model(**inputs).loss
        value = loss.detach()
        self.floats.append(value.item())
        self.total += value
        self.again.append(value)
        for collected in (self.seen, self.recent):
            collected.append(value)
        self.kinds["b"].setdefault("total", torch.zeros(())).add_(value)
        self.counts["calls"]["all"] += 1
        self.last = value
        if len(self.seen) > 1:
            held = (self.train_dataset, *self.train_dataset[:1], *self.weights, *self.seen[:1])
            self.ids.append([id(value) for value in held])
        return loss


class Calls(list):
    """A list that no probe is kept from appending to, as it is not a plain one."""


def test_tensors_that_a_trainer_collects_are_collected_once(tmp_path):
    trainer = make_trainer(tmp_path, cls=Collecting)
    trainer.ids = Calls()
    train(trainer)
    values = trainer.floats
    assert len(values) == 7
    assert len(trainer.ids) > 7  # it did run again
    assert [float(value) for value in trainer.seen] == values
    assert [float(value) for value in trainer.kinds["a"]] == values
    assert trainer.again is trainer.kinds["a"]
    assert [float(value) for value in trainer.recent] == values[-3:]
    assert trainer.counts == {"calls": {"all": 7}}
    assert trainer.last == values[-1]
    for total in (trainer.total, trainer.kinds["b"]["total"]):
        assert total.item() == pytest.approx(sum(values), rel=1e-6)
    assert all(ids == trainer.ids[0] for ids in trainer.ids)  # none of these was copied


class ByRow(transformers.Trainer):
    """Weighs each micro-batch by its number, which the data say."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        number = int(inputs.pop("row")[0]) // 2
        return model(**inputs).loss * (1 + number / 4)


class ByCounters(ByRow):
    """The same by what it counts itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls, self.rows, self.total = 0, [], torch.zeros(())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert self.calls == len(self.rows) == self.total
        inputs["row"] = torch.tensor([2 * self.calls])
        loss = super().compute_loss(model, inputs)
        self.calls += 1
        self.rows.append(loss)
        self.total += 1
        return loss


class BySchedule(ByRow):
    """The same by an object that it holds."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["row"] = torch.tensor([2 * next(self.schedule)])
        return super().compute_loss(model, inputs)


def weighted(folder, cls):
    data = [{**row, "row": torch.tensor(i)} for i, row in enumerate(sequences())]
    return make_trainer(folder, llama(dropout=0.0), data, cls, remove_unused_columns=False)


def test_a_loss_that_counts_its_calls_is_replayed_with_the_count_of_each(tmp_path, monkeypatch):
    audit_every_step(monkeypatch)
    counting, told = weighted(tmp_path, ByCounters), weighted(tmp_path, ByRow)
    for trainer in (counting, told):
        train(trainer)
    assert counting.calls == counting.total == 7
    assert logged(counting, "agreement") == logged(told, "agreement") != []
    assert max(differences(counting.model, told.model)) == 0


def test_a_count_that_nobody_puts_back_is_told_where_it_would_be(tmp_path):
    trainer = weighted(tmp_path, BySchedule)
    trainer.schedule = itertools.count()
    with pytest.raises(ValueError, match=r"self\.state\.global_step, keep .* of the trainer"):
        train(trainer)


class Logging(transformers.Trainer):
    """Logs in its loss, under the names of the trainer's own line too."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.log({"loss": loss.item(), "mine": loss.item()})
        return loss


def test_what_a_loss_logs_is_logged_once_and_is_not_the_trainers_line(tmp_path):
    trainer = make_trainer(tmp_path, cls=Logging)
    train(trainer)
    own, others = [], []
    for entry in trainer.state.log_history[:-1]:
        (own if "mine" in entry else others).append(entry)
    assert len(own) == 7 and len(others) == 4
    assert not any("fallbacks" in entry for entry in own)
    assert all("fallbacks" in entry for entry in others)


def test_learned_steps_do_not_decay(tmp_path):
    trainer = make_trainer(tmp_path)
    refine(trainer)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len([name for name in decays if name.endswith("_step")]) == 7
    assert all((decay == 0) == ("_step" in n or "norm" in n) for n, decay in decays.items())


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_sft_counts_its_tokens_once(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklm"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words)),
        pad_token="<pad>",
        eos_token="</s>",
    )
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": [3 + (i + j) % 13 for j in range(4 + i % 3)]} for i in range(8)]
    histories = []
    for refined in (False, True):
        options = arguments(tmp_path).to_dict() | {"max_length": 16, "bf16": False}
        kept = {
            k: options[k]
            for k in trl.SFTConfig.__dataclass_fields__
            if k in options and not str(options[k]).startswith("<")
        }
        trainer = trl.SFTTrainer(
            model=llama(dropout=0.0),
            args=trl.SFTConfig(**kept, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        if refined:
            handle = train(trainer)
        else:
            trainer.train()
        histories.append(trainer.state.log_history)
    assert handle.estimator.step == 2
    plain, refined = histories
    assert [e["num_tokens"] for e in plain[:2]] == [e["num_tokens"] for e in refined[:2]]
    assert plain[1]["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    for key in ("loss", "entropy", "mean_token_accuracy"):
        assert refined[0][key] == plain[0][key]
    assert math.isfinite(refined[1]["agreement"])


# Mistakes


def test_what_cannot_be_refined_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"refine\(trainer, kappa=0.01\)"):
        refine(trainer, kappa=0.1, noise_share=0.1)
    made = fogzo.FogzoEstimator(fogzo.quantized_weights(trainer.model))
    with pytest.raises(ValueError, match=r"refine\(trainer, estimator=fogzo.FogzoEstimator, num_"):
        refine(trainer, estimator=made)
    with pytest.raises(ValueError, match=r"'nsamples'.*: refine\(trainer, num_samples=3\)"):
        refine(trainer, nsamples=3)
    with pytest.raises(ValueError, match="start is the fraction"):
        refine(trainer, start=2)
    refine(trainer)  # what was refused has left nothing behind
    with pytest.raises(ValueError, match="once"):
        refine(trainer)
    with pytest.raises(ValueError, match=r"Trainer\(model=fogzo.quantize_"):
        refine(make_trainer(tmp_path, model=fogzo.dequantize_(llama())))
    deep = make_trainer(tmp_path)
    deep.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DDP"):
        refine(deep)


def test_weights_in_half_precision_are_warned_about(tmp_path):
    trainer = make_trainer(tmp_path, model=llama().bfloat16(), max_steps=1)
    refine(trainer)
    with pytest.warns(RuntimeWarning, match="16 bits.* dtype=torch.float32"):
        trainer.train()


def test_an_optimizer_of_ones_own_that_decays_steps_is_warned_about(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=sequences(),
        optimizers=(optimizer, None),
    )
    refine(trainer)
    with pytest.warns(RuntimeWarning, match="fogzo.parameter_groups"):
        trainer.train()


def test_another_run_of_the_same_trainer_starts_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    handle = train(trainer)
    first = copy.copy(handle.estimator)
    trainer.train()
    assert handle.estimator is not first
    assert handle.estimator.step == 1


@pytest.mark.parametrize("library", ["torchao", "brevitas"])
def test_weights_that_another_library_rounds_are_listed_by_its_function(tmp_path, library):
    pytest.importorskip(library)
    make = {"torchao": of_torchao, "brevitas": of_brevitas}[library]
    listing = getattr(fogzo.integrations, library).quantized_weights
    trainer = transformers.Trainer(
        make(), arguments(tmp_path, max_steps=3), train_dataset=PAIRS, data_collator=collate
    )
    with pytest.raises(ValueError, match=r"refine\(trainer, weights=fogzo\.integrations\.torchao"):
        refine(trainer)
    with pytest.raises(ValueError, match=r"weights= is \[\], expected .*refine\(trainer"):
        refine(trainer, weights=[])
    refinement = refine(trainer, weights=listing, noise_share=0.1)
    trainer.train()
    assert refinement.stats.fallback is None and refinement.stats.agreement is not None
    assert [weight.name for weight in refinement.estimator.weights] == ["net.0.weight"]


PAIRS = [{"x": x, "y": y} for x, y in zip(*batch(12), strict=True)]


def collate(pairs):
    return {name: torch.stack([pair[name] for pair in pairs]) for name in ("x", "y")}


class Regressor(nn.Module):
    """A network as a Trainer wants it: its forward pass returns the loss."""

    def __init__(self, layer):
        super().__init__()
        inputs, outputs = PAIRS[0]["x"].numel(), PAIRS[0]["y"].numel()
        self.net = nn.Sequential(layer(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    def forward(self, x, y):
        return {"loss": (self.net(x) - y).square().mean()}


def of_torchao():
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    model = Regressor(nn.Linear)
    base = IntxWeightOnlyConfig(torch.int4, granularity=PerAxis(0))
    quantize_(model, QATConfig(base, step="prepare"), lambda module, name: name == "net.0")
    return model


def of_brevitas():
    import brevitas.nn
    from brevitas.quant import Int8WeightPerChannelFloat

    rule = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4}
    return Regressor(lambda *sizes: brevitas.nn.QuantLinear(*sizes, bias=True, **rule))
