"""A tokenizer in the metadata of gguf: the byte-level BPE of GPT-2, or that of LLaMA 3.

llama.cpp has the expression that splits text into words in its own code, under a name. A tokenizer
that splits otherwise would be another one there, without an error, and is refused.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Expressions by the name that llama.cpp knows them by.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE = "The 3 wörter don't\n\n  end here: 12345, ﬁ, 日本語, emoji 🙂 and\ttabs.  "


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says of a tokenizer.

    Attributes:
        tokens: In the order of their numbers, in the letters of byte-level BPE.
        types: Of each token: normal, control, user-defined or unused.
        merges: Pairs that are joined, the first first.
        pre: The name of the expression that splits text into words.
        special: Numbers of special tokens, by role.
        add_bos: Whether text begins with a token of its own.
        add_eos: Whether it ends with one.
        chat_templates: By name, of which "default" is the only one of most tokenizers.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_templates: dict[str, str]


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """A tokenizer of transformers as gguf says it.

    Args:
        tokenizer: A fast one.
        size: Rows of the embedding; numbers without a token are filled up.

    Raises:
        ValueError: If gguf cannot say it, or it has more tokens than the network.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(_refusal(f"{type(tokenizer).__name__} has no tokenizer.json"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    pre = _pre(state)
    if pre is None or model["type"] != "BPE":
        raise ValueError(_refusal("it is no byte-level BPE that splits text as GPT-2 or LLaMA 3"))
    odd = [
        name
        for name, found in {
            "a normalizer": state["normalizer"],
            "prefixes of subwords": model.get("continuing_subword_prefix"),
            "suffixes of words": model.get("end_of_word_suffix"),
            "dropout": model.get("dropout"),
        }.items()
        if found
    ]
    if odd:
        raise ValueError(_refusal(f"it has {' and '.join(odd)}"))
    numbers: dict[str, int] = model["vocab"]
    added = {token["id"]: token for token in state["added_tokens"]}
    by_number = {number: token for token, number in numbers.items()}
    by_number |= {number: token["content"] for number, token in added.items()}
    if max(by_number) >= size:
        raise ValueError(
            f"the tokenizer has a token of number {max(by_number)}, and the network embeds {size}: "
            "give the tokenizer that it was trained with"
        )
    types = [
        (_CONTROL if added[i]["special"] else _USER_DEFINED)
        if i in added
        else (_NORMAL if i in by_number else _UNUSED)
        for i in range(size)
    ]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    roles = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}
    special = {role: getattr(tokenizer, name, None) for role, name in roles.items()}
    before, after = _around_text(tokenizer)
    begin, end = special["bos"], special["eos"]
    if before not in ([], [begin]) or after not in ([], [end]):
        around = " and ".join(repr(tokenizer.decode(ids)) for ids in (before, after) if ids)
        raise ValueError(
            _refusal(f"it puts {around} around text, and a file says its bos and eos tokens only")
        )
    templates = getattr(tokenizer, "chat_template", None) or {}
    return Vocabulary(
        [by_number.get(i, f"[PAD{i}]") for i in range(size)],
        types,
        pairs,
        pre,
        {role: number for role, number in special.items() if number is not None},
        bool(before),
        bool(after),
        {"default": templates} if isinstance(templates, str) else dict(templates),
    )


def add(writer: "GGUFWriter", found: Vocabulary) -> None:
    """Write it."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    if found.chat_templates:
        named = found.chat_templates.items()
        writer.add_chat_template([{"name": name, "template": text} for name, text in named])
    for role, number in found.special.items():
        getattr(writer, f"add_{role}_token_id")(number)


def check(tokenizer: Any, folder: Any, file: str) -> None:
    """Raise a `RuntimeError` unless transformers reads a tokenizer of the same tokens."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    found, expected = (t(SAMPLE, add_special_tokens=False)["input_ids"] for t in (read, tokenizer))
    if found != expected:
        raise RuntimeError(
            f"transformers reads a tokenizer that makes {found} of {SAMPLE!r}, and the written one "
            f"makes {expected}: nothing was kept. Please report it"
        )


def _around_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that it puts before every text, and after it."""
    bare = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    full = tokenizer(SAMPLE)["input_ids"]
    added = len(full) - len(bare)
    for begin in range(added + 1):
        if full[begin : begin + len(bare)] == bare:
            return full[:begin], full[begin + len(bare) :]
    raise ValueError(_refusal("it splits text otherwise where it adds special tokens"))


def _pre(state: dict[str, Any]) -> str | None:
    """The name of its splitting expression, if llama.cpp has it."""
    found = state["pre_tokenizer"] or {}
    ignores = bool(state["model"].get("ignore_merges"))
    if found.get("type") == "ByteLevel":
        plain = found["use_regex"] and not found["add_prefix_space"]
        return "gpt-2" if plain and not ignores else None
    parts = found.get("pretokenizers", [])
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, letters = parts
    same = split["pattern"] == {"Regex": _LLAMA_3} and split["behavior"] == "Isolated"
    plain = not (split["invert"] or letters["use_regex"] or letters["add_prefix_space"])
    return "llama-bpe" if same and plain and ignores else None


def _refusal(why: str) -> str:
    return (
        f"gguf cannot say this tokenizer, as {why}: leave it out with tokenizer=None, "
        "and give llama.cpp token ids"
    )
