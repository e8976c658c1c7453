"""Small texts in every format, and a small tokenizer."""

import json

import pytest

from fogzo_lab.data.config import TextConfig

PROSE = "".join(f"Line {n} of some text, été à {n * n % 97}.\n" for n in range(400))


def config(dataset, **options):
    return TextConfig(**{"dataset": str(dataset), "context": 16, **options})


def decode(split):
    return bytes(split.tokens.tolist()).decode(errors="replace")


def rows(texts, **more):
    return [{"text": text, **more} for text in texts]


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def shards(folder, count=3, documents=20, split="train"):
    for shard in range(count):
        texts = [f"{split} {shard}.{n} " + "abc" * (n % 7) for n in range(documents)]
        write_jsonl(folder / f"{split}-{shard}.jsonl", rows(texts, source="s"))
    return folder


def save_tokenizer(folder, **special):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([PROSE], vocab_size=300, special_tokens=[*special.values()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, **special)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(name):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name)
