"""What the README shows trains as STE does, to chance, whatever the optimizer."""

import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fogzo

SEEDS = range(3)
STEPS = 15
OPTIMIZERS = {
    "adamw": lambda parameters: [torch.optim.AdamW(parameters, lr=1e-2)],
    "sgd": lambda parameters: [torch.optim.SGD(parameters, lr=0.1, momentum=0.9)],
    "muon": lambda parameters: [
        torch.optim.Muon([p for p in parameters if p.dim() == 2 and min(p.shape) > 1], lr=1e-2),
        torch.optim.AdamW([p for p in parameters if p.dim() != 2 or min(p.shape) == 1], lr=3e-3),
    ],
}
PRESETS = {
    "lsq": lambda: fogzo.lsq(2),
    "lsq per channel": lambda: fogzo.lsq(2, granularity="channel"),
    "fixed": lambda: fogzo.fixed(2),
    "quest": lambda: fogzo.quest(2),
}


def final_loss(preset, optimizer, seed, estimator=None):
    """Memorize one batch with a tiny GPT-2; the loss at the end."""
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        tokens = torch.randint(64, (4, 16))
    fogzo.quantize_(model, PRESETS[preset]())
    refine = None
    if estimator is not None:
        refine = estimator(fogzo.quantized_weights(model), seed=seed)
    optimizers = OPTIMIZERS[optimizer](list(model.parameters()))
    for _ in range(STEPS):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        if refine is not None:
            refine.refine_grads_(lambda: model(tokens, labels=tokens).loss, expected_loss=loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


@pytest.mark.filterwarnings("ignore:(no weight rounds|the probes):RuntimeWarning")
@pytest.mark.parametrize(
    ("preset", "optimizer"),
    [
        ("lsq", "sgd"),
        ("lsq per channel", "adamw"),
        ("fixed", "adamw"),
        ("quest", "muon"),
    ],
)
def test_the_default_estimator_is_never_worse_than_ste(preset, optimizer):
    ste = [final_loss(preset, optimizer, seed) for seed in SEEDS]
    refined = [final_loss(preset, optimizer, seed, fogzo.FogzoEstimator) for seed in SEEDS]
    gaps = [b - a for a, b in zip(ste, refined, strict=True)]
    chance = 3 * statistics.stdev(gaps) / len(gaps) ** 0.5
    assert statistics.mean(gaps) < max(chance, 0.05 * statistics.mean(ste), 0.02), (ste, refined)
    assert statistics.mean(ste) < 3.5  # of 4.16 where nothing is learned
