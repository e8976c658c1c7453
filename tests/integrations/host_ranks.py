"""One of two processes that train under accelerate, transformers' Trainer and Lightning."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import llama, sequences, transformers
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import fogzo
from fogzo.collectives import full
from toolbox import joined


def by_accelerate(accumulation):
    """Parameters and agreements after three steps of rows that the ranks share."""
    import accelerate

    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = accelerator.prepare(llama(dropout=0.0))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    estimator = fogzo.integrations.accelerate.refine(accelerator, model)

    def compute_loss(**batch):
        return model(**batch)

    rank, size = accelerator.process_index, 4 // accumulation // accelerator.num_processes
    agreements = []
    for step in range(3):
        for part in range(accumulation):
            start = 4 * step + 2 * part + rank * size
            rows = sequences(12, unequal=False)[start : start + size]
            inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            with accelerator.accumulate(model):
                accelerator.backward(estimator.record(compute_loss, **inputs).loss)
                if accelerator.sync_gradients:
                    agreements.append(estimator.stats.agreement)
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], agreements


def by_trainer(accumulation, folder):
    """The same, by a Trainer."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // accumulation // ranks,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",  # Adam makes whole steps of gradients that are rounding errors
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=llama(dropout=0.0), args=arguments, train_dataset=sequences(12)
    )
    fogzo.integrations.transformers.refine(trainer)
    trainer.train()
    agreements = [e["agreement"] for e in trainer.state.log_history if "agreement" in e]
    return [p.detach().clone() for p in trainer.model.parameters()], agreements


def by_lightning(accumulation, sharded=False):
    """The same, by Lightning, whose FSDP2 shards the model of two ranks."""
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from fogzo.integrations.lightning import FogzoCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama(dropout=0.0)

        def configure_model(self):
            if sharded and self.device_mesh is not None:
                mesh = self.device_mesh["data_parallel"]
                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Callback(FogzoCallback):
        agreements = ()

        def on_train_batch_end(self, *args):
            self.agreements = [*self.agreements, self.stats and self.stats.agreement]

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    data = sequences(12, unequal=False)
    # Lightning's own would shuffle.
    sampler = DistributedSampler(data, shuffle=False) if ranks > 1 else None
    rows = DataLoader(data, batch_size=4 // accumulation // ranks, sampler=sampler)
    module, callback = Module(), Callback()
    strategy = ModelParallelStrategy(ranks, tensor_parallel_size=1) if sharded else "ddp"
    lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulation,
        callbacks=[callback],
        accelerator="cpu",
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, rows)
    agreements = callback.agreements[accumulation - 1 :: accumulation]
    return [full(p.detach()).clone() for p in module.model.parameters()], agreements


def results(folder):
    """All of it, by host and accumulation."""
    return {
        (host, accumulation): run(accumulation)
        for host, run in (
            ("accelerate", by_accelerate),
            ("trainer", lambda accumulation: by_trainer(accumulation, folder)),
            ("lightning", by_lightning),
            ("lightning, FSDP2", lambda accumulation: by_lightning(accumulation, sharded=True)),
        )
        for accumulation in (1, 2)
    }


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29511",
    }
    with joined(rank, folder):
        torch.save(results(folder), folder / f"{rank}.pt")
