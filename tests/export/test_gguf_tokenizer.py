"""Tokenizers in gguf: what transformers reads back, and what is refused."""

import json

import pytest
import torch
from networks import llama, quantized
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import fogzo
from fogzo.export import export, gguf
from fogzo.export.gguf_tokenizer import _LLAMA_3, SAMPLE, vocabulary

reader = pytest.importorskip("gguf", reason="writes the file, and transformers reads it with it")

TEXTS = [SAMPLE, "the end of the words, the 2024 words of the end\n", "won't WON'T\r\n\n x==y  "]


def splitting(kind):
    letters = {"add_prefix_space": False, "use_regex": kind == "gpt-2"}
    byte_level = pre_tokenizers.ByteLevel(**letters)
    if kind == "gpt-2":
        return byte_level
    pattern = _LLAMA_3 if kind == "llama-bpe" else r"\p{L}+|\s+"
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level]
    )


def trained(kind="gpt-2", around="", **changes):
    options = {"ignore_merges": kind == "llama-bpe"}
    backend = Tokenizer(models.BPE(**options | changes))
    backend.pre_tokenizer, backend.decoder = splitting(kind), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if around:
        numbers = [("<|begin|>", 0), ("<|end|>", 1)]
        backend.post_processor = TemplateProcessing(single=around, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>"
    )


def network():
    return quantized(llama(vocab_size=320), fogzo.lsq(4, scale_dtype=torch.float16))


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe"])
def test_transformers_reads_the_same_tokenizer(kind, tmp_path):
    tokenizer = trained(kind)
    report = export(network(), tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert report.logits_difference == 0
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=gguf.FILE)
    for text in [*TEXTS, "a<|end|>b"]:
        ids = tokenizer(text)["input_ids"]
        assert read(text)["input_ids"] == ids
        assert read.decode(ids) == tokenizer.decode(ids)
    assert (read.bos_token, read.eos_token) == ("<|begin|>", "<|end|>")


def test_what_the_metadata_says():
    found = vocabulary(trained(around="<|begin|> $A"), 320)
    assert (found.pre, found.special) == ("gpt-2", {"bos": 0, "eos": 1})
    assert (found.add_bos, found.add_eos) == (True, False)
    assert found.tokens[:2] == ["<|begin|>", "<|end|>"]
    assert len(found.tokens) == len(found.types) == 320
    assert found.tokens[-1] == "[PAD319]"
    assert [found.types[i] for i in (0, 2, 319)] == [3, 1, 5]
    assert "h e" in found.merges
    assert not vocabulary(trained(), 320).add_bos


def test_the_end_of_text_and_chat_templates_are_in_the_file(tmp_path):
    tokenizer = trained(around="<|begin|> $A <|end|>")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = {"default": template, "tool_use": "tools"}
    export(network(), tmp_path / "out", "gguf", tokenizer=tokenizer)
    fields = reader.GGUFReader(tmp_path / "out" / gguf.FILE).fields
    said = {
        key.removeprefix("tokenizer."): field.contents()
        for key, field in fields.items()
        if "add_" in key or "chat_" in key
    }
    assert said == {
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": True,
        "chat_template": template,
        "chat_template.tool_use": "tools",
        "chat_templates": ["tool_use"],
    }


def test_words_of_other_formats_lie_beside_the_network(tmp_path):
    tokenizer = trained()
    export(network(), tmp_path / "out", "packed", tokenizer=tokenizer, verify=False)
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def with_normalizer():
    tokenizer = trained()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def of_words():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trained("other"), "no byte-level BPE that splits text as GPT-2 or LLaMA 3"),
        (lambda: trained(ignore_merges=True), "no byte-level BPE that splits"),
        (of_words, "no byte-level BPE that splits"),
        (
            lambda: trained(around="$A <|begin|>"),
            r"puts '<\|begin\|>' around text, and a file says",
        ),
        (with_normalizer, "as it has a normalizer: leave it out with tokenizer=None"),
        (ByT5Tokenizer, "ByT5Tokenizer has no tokenizer.json"),
        (object, r"tokenizer must be one of transformers, got <object .*AutoTokenizer"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(network(), tmp_path / "out", "gguf", tokenizer=make())
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_network_is_refused():
    with pytest.raises(ValueError, match=r"token of number \d+, and the network embeds 96"):
        vocabulary(trained(), 96)


def test_the_state_of_a_tokenizer_has_the_parts_that_are_read():
    state = json.loads(trained("llama-bpe").backend_tokenizer.to_str())
    assert {"normalizer", "pre_tokenizer", "added_tokens", "model"} <= set(state)
