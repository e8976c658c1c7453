"""A tiny language model, and data that it can learn, for the tests of hosts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fogzo
from fogzo.probing.audit import Audit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 16


def llama(dropout: float = 0.1, **config: Any) -> nn.Module:
    """The same quantized network at every call."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    return fogzo.quantize_(model, fogzo.lsq(2))


def sequences(count: int = 14, unequal: bool = True) -> list[dict[str, torch.Tensor]]:
    """Numbers that count upwards; from some the labels leave out more than from others."""
    rows = []
    for i in range(count):
        tokens = (torch.arange(8) + i) % VOCABULARY
        labels = tokens.clone()
        if unequal:
            labels[: i % 5] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def audit_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare what probes run with what was recorded in every step, not in the 1st, 10th, ..."""
    monkeypatch.setattr(Audit, "due", property(lambda self: True))


def differences(a: nn.Module, b: nn.Module) -> list[float]:
    """The largest difference of each parameter of two models."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return [float((p - q).detach().abs().max()) for p, q in pairs]


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """What each call of a method returned, from now on."""
    own: Callable[..., Any] = getattr(owner, name)
    returned: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        returned.append(own(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(owner, name, counted)
    return returned
