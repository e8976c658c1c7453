"""FOGZO in a loop of your own: everything a real one has, in one file, with no fogzo_lab.

    python examples/plain_loop.py

Gradient accumulation, autocast, a GradScaler, clipping, dropout and batch norm, a checkpoint.
"""

import argparse
import io

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo


def main() -> None:
    """Train a small quantized network on noisy stripes and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--accumulate", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 4),
    ).to(device)
    fogzo.quantize_(model, fogzo.lsq(bits=2, granularity="channel"))
    weights = fogzo.quantized_weights(model)

    groups = fogzo.parameter_groups(model, weight_decay=0.01)  # step sizes do not decay
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    estimator = fogzo.FogzoEstimator(
        weights,
        noise_share=fogzo.linear_noise_share(total_steps=options.steps, kappa=0.1, start=0.3),
    )

    def compute_loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return cross_entropy(model(images), labels)

    for step in range(options.steps):
        for _ in range(options.accumulate):
            images, labels = batch(32, generator, device)
            # As compute_loss(images, labels), and remembered for the probes.
            loss = estimator.record(compute_loss, images, labels)
            scaler.scale(loss / options.accumulate).backward()
        stats = estimator.refine_grads_()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            agreement = "-" if stats.agreement is None else f"{stats.agreement:.2f}"
            print(f"step {step + 1}: loss {loss:.3f}, agreement {agreement}")

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    parts["estimator"] = estimator  # each has load_state_dict, to resume by
    torch.save({name: part.state_dict() for name, part in parts.items()}, io.BytesIO())

    fogzo.dequantize_(model).eval()  # a plain model again, with its quantized weights baked in
    images, labels = batch(500, generator, device)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"accuracy {accuracy:.3f}")


def batch(size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noisy 12 x 12 images of stripes in one of four directions."""
    labels = torch.randint(4, (size,), generator=generator)
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    stripes = torch.stack([x, y, x + y, x - y]).mul(1.5).sin()
    noise = torch.randn(size, 12, 12, generator=generator)
    return (stripes[labels] + noise).unsqueeze(1).to(device), labels.to(device)


if __name__ == "__main__":
    main()
