"""Quantized models of transformers, saved and loaded as real files, and trained on."""

import copy
import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.quantizers import Surrogate
from fogzo.quantizers.smoothing import Uniform
from toolbox import everything, fill, streams_put_back

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.quantizers import auto  # noqa: E402

from fogzo.integrations.transformers import METHOD, FogzoConfig, update_config_  # noqa: E402

BATCH = torch.arange(16).reshape(2, 8) * 7 % 32
QUANTIZERS = {
    "lsq, inputs of lsq": (fogzo.lsq(2), fogzo.lsq(4)),
    "quest": (fogzo.quest(2), None),
    "fixed per channel, inputs per token": (
        fogzo.fixed(2, granularity="channel"),
        fogzo.abs_max(8, granularity="token"),
    ),
    "bbq": (fogzo.bbq(2), None),
    "sign": (fogzo.sign(), fogzo.fixed(2, step_size=0.5)),
}


def llama(tied=False, dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
    return fill(model, 0.2).eval()


def loss_of(model):
    return cross_entropy(model(BATCH).logits.flatten(0, 1).float(), BATCH.flatten())


def calibrated(model):
    if any(getattr(layer, "measures_input", False) for layer in model.modules()):
        with fogzo.calibrate_(model), torch.no_grad():
            model(BATCH)
    return model


def trained(model, steps=2):
    """Weights after some steps with the estimator."""
    optimizer = torch.optim.AdamW(fogzo.parameter_groups(model, 0.1), lr=1e-2)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    model.train()
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        estimator.refine_grads_(lambda: loss_of(model), expected_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().state_dict()


def load(folder, **options):
    """The model of a folder, of which nothing was missing or unexpected."""
    auto = transformers.AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def assert_same(a, b):
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", QUANTIZERS)
def test_what_is_saved_is_loaded_and_trains_on(case, tied, tmp_path):
    quantizer, inputs = QUANTIZERS[case]
    one_step = quantizer.granularity == "tensor" and quantizer.rotation is None
    chosen = everything if tied and one_step else None  # head and embeddings, too
    model = fogzo.quantize_(llama(tied), quantizer, chosen, activations=inputs)
    trained(calibrated(model))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3

    again = load(tmp_path)
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    if chosen:
        head, embeddings = again.lm_head, again.model.embed_tokens
        assert head.weight is embeddings.weight and head.weight_step is embeddings.weight_step
        assert head.weight_step_knee is embeddings.weight_step_knee
    # Tensors that are mapped from files are not aligned, and sums over them round differently.
    assert_same(trained(copy.deepcopy(again)), trained(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", QUANTIZERS)
def test_a_float_folder_is_quantized_while_it_is_loaded(case, tied, tmp_path):
    quantizer, inputs = QUANTIZERS[case]
    model = llama(tied)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, quantization_config=FogzoConfig(quantizer, activations=inputs))
    fogzo.quantize_(model, quantizer, activations=inputs)
    assert_same(calibrated(again).state_dict(), calibrated(model).state_dict())
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_one_place_of_a_tied_weight_is_refused_while_it_is_loaded_too(name, tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    config = FogzoConfig(fogzo.lsq(2), lambda module, found: found == name)
    with pytest.raises(ValueError, match=f"'{name}' shares its weight with .* for both, or"):
        load(tmp_path, quantization_config=config)


def test_a_head_that_is_tied_and_not_the_last_layer_is_left_in_float(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.BertConfig(**shape, num_hidden_layers=1, vocab_size=32)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    options = {"quantization_config": FogzoConfig(fogzo.lsq(2))}
    model = transformers.BertForPreTraining.from_pretrained(tmp_path, **options)
    head = model.cls.predictions.decoder
    assert type(head) is nn.Linear
    assert head.weight is model.bert.embeddings.word_embeddings.weight


def test_all_tensors_are_there_when_the_trainer_resumes(tmp_path):
    # Its own way of resuming: the folder's tensors into the model that it was given.
    model = fogzo.quantize_(llama(), fogzo.lsq(2))
    trained(model)
    model.save_pretrained(tmp_path)
    fresh = fogzo.quantize_(llama(), fogzo.lsq(2))
    saved = load_file(tmp_path / "model.safetensors")
    result = fresh.load_state_dict(saved, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(fresh.state_dict(), model.state_dict())


def test_other_classes_take_the_layers_that_they_have(tmp_path):
    model = fogzo.quantize_(llama(), fogzo.lsq(2), everything)
    model.save_pretrained(tmp_path / "causal")
    with pytest.warns(UserWarning, match=r"LlamaModel has no 'lm_head'"):
        base = transformers.AutoModel.from_pretrained(tmp_path / "causal")
    assert torch.equal(base(BATCH).last_hidden_state, model.model(BATCH).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    causal = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(fogzo.quantized_weights(causal)) == len(fogzo.quantized_weights(base)) == 15
    other = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    other.config.quantization_config = model.config.quantization_config
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has none of the layers that were saved quantized"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "other")


def test_images_too(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=4,
        patch_size=2,
        num_labels=3,
    )
    model = fill(transformers.ViTForImageClassification(config), 0.2).eval()
    fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)
    assert torch.equal(again(images).logits, model(images).logits)


# --- fused experts --------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
MIXTURES = {
    "Mixtral": (transformers.MixtralConfig, {"num_local_experts": 16}),
    "Qwen3Moe": (transformers.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8}),
    # Transposed, with biases, and with no conversion of names between modules and files.
    "GptOss": (
        transformers.GptOssConfig,
        {"num_local_experts": 4, "layer_types": ["full_attention"]},
    ),
}


def mixture(name):
    config, own = MIXTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**SIZES, **own))
    return fill(model, 0.2).eval()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_refined_saved_and_loaded(name, granularity, tmp_path):
    quantizer = fogzo.lsq(2, granularity=granularity)
    model = mixture(name)
    model.save_pretrained(tmp_path / "float")
    fogzo.quantize_(model, quantizer)
    names = [weight.name.rpartition(".")[2] for weight in fogzo.quantized_weights(model)]
    assert names[-2:] == ["gate_up_proj", "down_proj"]
    fresh = load(tmp_path / "float", quantization_config=FogzoConfig(quantizer))
    assert torch.equal(fresh(BATCH).logits, model(BATCH).logits)

    trained(model)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="4KB")
    again = load(tmp_path / "quantized")
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    answer = model(BATCH).logits
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = load(
        tmp_path / "quantized", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    assert torch.equal(spread(BATCH).logits, answer)
    fogzo.dequantize_(model)
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(load(tmp_path / "float")(BATCH).logits, answer)


def test_layers_that_mamba_goes_around_are_named():
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=2, time_step_rank=2
    )
    model = fogzo.quantize_(fill(transformers.MambaForCausalLM(config), 0.2), fogzo.lsq(2))
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model.train()))
    loss = loss_of(model)
    loss.backward()
    with pytest.warns(UserWarning, match=r"'[\w.]+\.conv1d', '[\w.]+\.dt_proj' never ran"):
        estimator.refine_grads_(lambda: loss_of(model), expected_loss=loss)


# --- the loops of others --------------------------------------------------------------------------


def test_the_trainer_writes_it_so(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = fogzo.quantize_(llama(tied=True), fogzo.lsq(2), everything)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in BATCH]
    with streams_put_back():  # it seeds them
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    model.eval()
    for folder in ("out", "checkpoint-2"):
        again = load(tmp_path / folder)
        assert_same(again.state_dict(), model.state_dict())
        assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    first = load(tmp_path / "checkpoint-1")
    with streams_put_back():
        trainer = transformers.Trainer(first, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


def test_accelerate_saves_tied_steps(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(fogzo.quantize_(llama(tied=True), fogzo.lsq(2), everything))
    saved = copy.deepcopy(model.state_dict())
    accelerator.save_state(str(tmp_path))
    trained(model)
    accelerator.load_state(str(tmp_path))
    assert_same(model.state_dict(), saved)
    assert model.lm_head.weight_step is model.model.embed_tokens.weight_step


# --- dtypes and devices ---------------------------------------------------------------------------


def test_half_precision_becomes_float32_unless_it_is_meant(tmp_path, caplog):
    model = llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.WARNING, "fogzo"):
        wide = load(tmp_path / "float", quantization_config=FogzoConfig(fogzo.lsq(2)))
    assert "loading in float32 and not in bfloat16" in caplog.text
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    config = FogzoConfig(fogzo.lsq(2), keep_dtype=True)
    narrow = load(tmp_path / "float", quantization_config=config)
    fogzo.quantize_(model, fogzo.lsq(2))
    assert_same(narrow.state_dict(), model.state_dict())
    # What was trained in half precision stays so.
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)


def test_device_maps_come_after_quantizing(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = fogzo.quantize_(llama(), fogzo.lsq(2), activations=fogzo.abs_max(8))
    model.save_pretrained(tmp_path / "quantized")
    places = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    options = {"device_map": {**places, "model.layers.1": "disk"}}
    options["offload_folder"] = str(tmp_path / "offloaded")
    spread = load(tmp_path / "quantized", **options)
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(spread(BATCH).logits, model(BATCH).logits)

    # Hooks first, which would go around the quantized weights: refused, and while loading too.
    plain = llama()
    plain.save_pretrained(tmp_path / "float")
    hooked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", **options)
    with pytest.raises(ValueError, match=r"remove_hook_from_module.*dispatch_model"):
        fogzo.quantize_(hooked, fogzo.lsq(2))
    with pytest.raises(ValueError, match=r"is offloaded, .* quantize in memory first"):
        load(tmp_path / "float", quantization_config=FogzoConfig(fogzo.lsq(2)), **options)


# --- what the config says -------------------------------------------------------------------------


def test_the_config_follows_the_model(tmp_path):
    model = llama()
    attention = lambda module, name: "self_attn" in name  # noqa: E731
    fogzo.quantize_(model, fogzo.lsq(2), attention)
    fogzo.quantize_(model, fogzo.quest(4), lambda module, name: "mlp" in name)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == METHOD == "fogzo.integrations.transformers"
    assert [len(group["layers"]) for group in saved["groups"]] == [8, 6]
    again = load(tmp_path)
    assert again.model.layers[0].mlp.up_proj.quantizer == fogzo.quest(4)
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)

    answer = again(BATCH).logits
    fogzo.dequantize_(again)
    again.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(load(tmp_path)(BATCH).logits, answer)


def test_a_part_that_was_quantized_alone_is_noted_on_request(tmp_path):
    model = llama()
    fogzo.quantize_(model.model.layers[0], fogzo.lsq(2), everything)
    assert not hasattr(model.config, "quantization_config")
    update_config_(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(BATCH).logits, model(BATCH).logits)


def test_a_model_that_was_saved_in_its_float_phase_measures_its_steps(tmp_path):
    model = fogzo.quantize_(llama(), fogzo.lsq(2), activations=fogzo.lsq(4))
    switch = fogzo.methods.quantize_from(model, 0.5, total_steps=2)
    assert "float_phase" not in str(model.config)
    with torch.no_grad():
        for weight in fogzo.quantized_weights(model):
            weight.param.mul_(3)
    model.save_pretrained(tmp_path / "in float")
    with pytest.warns(UserWarning, match=r"saved before its quantization began.*quantize_from"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in float")
    switch.advance_()
    calibrated(model)
    calibrated(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(BATCH).logits, model(BATCH).logits)
    for name, each in {"quantized": model, "quantized, too": loaded}.items():
        each.save_pretrained(tmp_path / name)
        assert torch.equal(load(tmp_path / name)(BATCH).logits, model(BATCH).logits)


def test_other_models_of_the_same_config_are_not_touched():
    teacher = llama()
    student = transformers.LlamaForCausalLM(teacher.config)
    fogzo.quantize_(student, fogzo.lsq(2))
    assert not hasattr(teacher.config, "quantization_config")
    other = fogzo.quantize_(transformers.LlamaForCausalLM(student.config), fogzo.quest(4))
    fogzo.dequantize_(other)
    assert not hasattr(other.config, "quantization_config")
    assert student.config.quantization_config.groups[0]["weight"]["rotation"] is None
    configs = [module.config for module in student.modules() if hasattr(module, "config")]
    assert len(configs) > 2 and all(config is student.config for config in configs)


def test_a_wrapped_model_is_noted_too():
    wrapper = nn.ModuleDict({"inner": llama()})
    fogzo.quantize_(wrapper, fogzo.lsq(2))
    assert isinstance(wrapper["inner"].config.quantization_config, FogzoConfig)


def test_to_transformers_it_is_a_float_model(tmp_path):
    model = fogzo.quantize_(llama(), fogzo.lsq(2))
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path)):
        assert not getattr(each, "is_quantized", False)
        assert getattr(each, "hf_quantizer", None) is None
        assert each.bfloat16().float() is each
        copied = copy.deepcopy(each)
        assert torch.equal(copied(BATCH).logits, each(BATCH).logits)


def test_what_no_file_holds_is_said():
    surrogate = Surrogate("mine", None, Uniform(), kernel=lambda z: z)
    with pytest.warns(UserWarning, match=r"save_pretrained will not say .* 'mine' has a kernel"):
        model = fogzo.quantize_(llama(), fogzo.lsq(2, surrogate=surrogate))
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match=r"FogzoConfig\(fogzo\.lsq\(bits=2\)\)"):
        FogzoConfig()
    with pytest.raises(ValueError, match="of version 2"):
        FogzoConfig(groups=[], format_version=2)


def test_loading_without_the_import_names_it(tmp_path, monkeypatch, caplog):
    # transformers only warns, by the name of the method, and gives the float latent weights.
    model = fogzo.quantize_(llama(), fogzo.lsq(2))
    model.save_pretrained(tmp_path)
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, METHOD)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        latent = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert f"Unknown quantization type, got {METHOD}" in caplog.text
    assert not torch.equal(latent(BATCH).logits, model(BATCH).logits)
    for call in (fogzo.quantized_weights, lambda model: fogzo.quantize_(model, fogzo.lsq(2))):
        with pytest.raises(ValueError, match=f"import {METHOD} before from_pretrained"):
            call(latent)
    new = transformers.AutoModelForCausalLM.from_config(latent.config)
    with pytest.raises(ValueError, match=r"new model of that config: del model\.config\.quant"):
        fogzo.quantize_(new, fogzo.lsq(2))
    del new.config.quantization_config
    fogzo.quantize_(new, fogzo.lsq(2))


def test_nothing_warns(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fogzo.quantize_(llama(), fogzo.lsq(2))
        model.save_pretrained(tmp_path)
        load(tmp_path)
