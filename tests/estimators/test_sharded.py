"""FSDP2 on two real processes against DDP on the same two: the same training, shard by shard.

This file is also the program that each rank runs: ``python test_sharded.py RANK FOLDER``.
"""

import math
import sys
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import fogzo
from fogzo import collectives
from fogzo.probing.directions import Directions
from fogzo.probing.measure import NO_FLIP
from toolbox import cpu_mesh, draw, everything, fill, joined, run_ranks, told

RANKS = 2
STEPS = 2
WEIGHTS = {
    "stem.weight",
    *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down", "gate")),
}
PRESETS = {
    "lsq": lambda: fogzo.lsq(2),
    "lsq per channel": lambda: fogzo.lsq(2, granularity="channel"),
    "lsq per group": lambda: fogzo.lsq(3, granularity=4),
    "lsq past zero": lambda: fogzo.lsq(2, granularity="channel"),
    "fixed": lambda: fogzo.fixed(2),
    "fixed per channel": lambda: fogzo.fixed(2, granularity="channel"),
    "quest": lambda: fogzo.quest(2),
    "ternary": lambda: fogzo.ternary(),
}
SCENARIOS = {
    "lsq": {"preset": "lsq"},
    "lsq, n=2, one-sided": {"preset": "lsq", "num_samples": 2, "one_sided": True},
    "lsq per channel, isotropic noise": {"preset": "lsq per channel", "noise_shape": "isotropic"},
    "lsq per group, 3 micro-batches": {"preset": "lsq per group", "micro_batches": 3},
    "lsq, 3 recorded micro-batches": {"micro_batches": 3, "recorded": True},
    "lsq per channel, steps that crossed zero": {"preset": "lsq past zero"},
    "fixed per channel, control variate": {
        "preset": "fixed per channel",
        "estimator": "ControlVariateEstimator",
        "num_samples": 2,
    },
    "quest, n=2": {"preset": "quest", "num_samples": 2},
    "quest, cut along another dimension, isotropic noise": {
        "preset": "quest",
        "transposed": True,
        "noise_shape": "isotropic",
    },
    "ternary, placebo": {"preset": "ternary", "estimator": "PlaceboEstimator"},
    "spsa": {"estimator": "SpsaEstimator", "num_samples": 2},
    "2 replicas of 1 shard": {"mesh": (2, 1), "num_samples": 2},
    "1 replica of 2 shards": {"mesh": (1, 2), "estimator": "ControlVariateEstimator"},
}


class Block(nn.Module):
    """15 rows and 1 row, which two ranks cannot share evenly, and 8, which they can."""

    def __init__(self, transposed):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(8, 15), nn.Linear(16, 8), nn.Linear(8, 1)
        self.mix = nn.ConvTranspose1d(2, 2, 4) if transposed else None

    def forward(self, x):
        h = torch.cat([self.up(x).tanh(), torch.ones_like(x[:, :1])], 1)
        if self.mix is not None:
            h = h + self.mix(x.view(-1, 2, 4)).tanh().sum((1, 2))[:, None]
        return x + self.gate(x).tanh() * self.down(h)


class Net(nn.Module):
    """Two blocks to shard one by one; the root has layers of its own."""

    def __init__(self, preset="lsq", transposed=False, dtype=torch.float64):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(transposed) for _ in range(2)])
        self.head = nn.Linear(8, 3)
        self.to(dtype)  # double precision, so that the order of the sums flips no code
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=stream, dtype=torch.float64))
        fogzo.quantize_(self, PRESETS[preset]())
        if preset == "lsq past zero":
            with torch.no_grad():
                for name, p in self.named_parameters():
                    if name.endswith("weight_step"):
                        p.mul_(-0.5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharded(model, mesh=None, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    if mesh is None:
        options["mesh"] = cpu_mesh()
    else:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    mixers = [block.mix.weight for block in model.blocks if block.mix is not None]
    for block in model.blocks:
        fully_shard(
            block,
            shard_placement_fn=lambda p: Shard(1) if any(p is m for m in mixers) else None,
            **options,
        )
    return fully_shard(model, **options)


def batch(step, rank, rows=24, dtype=torch.float64):
    stream = torch.Generator().manual_seed(100 + step)
    x = torch.randn(rows, 8, generator=stream, dtype=torch.float64)
    y = torch.randn(rows, 3, generator=stream, dtype=torch.float64)
    return x[rank::RANKS].to(dtype), y[rank::RANKS].to(dtype)


def train(
    rank,
    fsdp,
    preset="lsq",
    transposed=False,
    mesh=None,
    micro_batches=1,
    recorded=False,
    estimator="FogzoEstimator",
    **options,
):
    """The weights, the probe losses and the statistics of training on this rank's batches."""
    model = Net(preset, transposed)
    parallel = sharded(model, mesh) if fsdp else DistributedDataParallel(model)
    if estimator == "FogzoEstimator":
        options["noise_share"] = 0.02
    refiner = getattr(fogzo, estimator)(fogzo.quantized_weights(model), seed=5, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, stats = [], []

    def loss_of(a, b):
        return refiner.record(compute_loss, a, b) if recorded else compute_loss(a, b)

    def compute_loss(a, b):
        return mse_loss(parallel(a), b)

    for step in range(STEPS):
        x, y = batch(step, rank)
        window = list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True))
        optimizer.zero_grad()
        expected = 0.0
        for i, (a, b) in enumerate(window):
            last = i == len(window) - 1
            if fsdp:
                model.set_requires_gradient_sync(last)
            with nullcontext() if fsdp or last else parallel.no_sync():
                loss = loss_of(a, b) / len(window)
                if refiner.needs_gradient:
                    loss.backward()
            expected += loss.detach()

        def closure(window=window):
            return sum(compute_loss(a, b) for a, b in window) / len(window)

        flips = refiner.flip_rate()
        if recorded:
            result = refiner.refine_grads_()
        else:
            result = refiner.refine_grads_(closure, expected_loss=expected)
        assert result.fallback is None
        losses += result.probe_losses
        agreements = (result.agreement, result.agreement_error, result.applied_agreement)
        stats.append((*agreements, result.gradient_norm, flips))
        optimizer.step()
    weights = {n: collectives.full(p.detach()).clone() for n, p in model.named_parameters()}
    return {"weights": weights, "losses": losses, "stats": stats}


def after_backward(rank, preset="lsq", dtype=torch.float64, **options):
    model = sharded(Net(preset, dtype=dtype), **options)
    x, y = batch(0, rank, dtype=dtype)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.1)
    loss_fn = lambda: mse_loss(model(x), y)  # noqa: E731
    loss = loss_fn()
    loss.backward()
    return model, estimator, loss_fn, loss.detach()


def shards(model):
    # The parameters as FSDP registers them: gathered or not.
    with torch.no_grad():
        return {n: collectives.local(p).clone() for n, p in model.named_parameters()}


def given_back(rank, ending, preset, **options):
    """What is wrong after a step whose closure ends as told."""
    model, estimator, loss_fn, loss = after_backward(rank, preset, **options)
    before, calls, wrong = shards(model), [], []
    grads = {n: p.grad for n, p in model.named_parameters()}
    values = {n: collectives.local(g).clone() for n, g in grads.items()}

    def explode(*_):
        if len(calls) == 3:
            raise OSError("disk gone")

    hook = model.blocks[1].up.register_forward_pre_hook(explode)

    def closure():
        calls.append(0)
        if ending != "raises inside forward":
            hook.remove()
        loss = loss_fn()
        model.zero_grad()
        if ending == "raises" and len(calls) == 3:
            raise OSError("disk gone")
        return loss

    try:
        estimator.refine_grads_(closure, expected_loss=loss)
        wrong += ["no exception"] * (ending != "returns")
    except OSError:
        wrong += ["an exception"] * (ending == "returns")
    hook.remove()
    now = shards(model)
    wrong += [name for name in before if now[name].shape != before[name].shape]
    wrong += [name for name in before if not torch.equal(now[name], before[name])]
    wrong += [f"{n}.grad" for n, p in model.named_parameters() if p.grad is not grads[n]]
    wrong += [
        f"values of {n}.grad"
        for n, p in model.named_parameters()
        if (ending != "returns" or n not in WEIGHTS)
        and not torch.equal(collectives.local(p.grad), values[n])
    ]
    if not torch.equal(loss_fn().detach(), loss):
        wrong.append("the loss")
    return wrong


def broken_on_one_rank(rank, what):
    """Whether the gradients are kept when only the last rank sees something that is not finite."""
    model, estimator, loss_fn, _ = after_backward(rank)
    factor = 1.0
    if rank == RANKS - 1 and what == "a loss":
        factor = math.nan
    elif rank == RANKS - 1:
        collectives.local(model.blocks[0].up.weight.grad)[2, 1] = math.nan
    given = {n: collectives.local(p.grad).clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stats = estimator.refine_grads_(lambda: factor * loss_fn())
    kept = all(
        collectives.local(p.grad).equal(given[n]) or what == "a gradient"
        for n, p in model.named_parameters()
    )
    return {"fallback": stats.fallback, "kept": kept, "losses": stats.probe_losses}


def another_batch_on_one_rank(rank):
    """What each rank is told where only the last one's closure evaluates another batch."""
    model, estimator, _, loss = after_backward(rank)
    x, y = batch(0 if rank < RANKS - 1 else 1, rank)
    return told(lambda: estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss))


class Half(nn.Module):
    """A quantized layer of which the last rank's rows are not used."""

    def __init__(self):
        super().__init__()
        self.own, self.head = nn.Linear(8, 4, bias=False), nn.Linear(2, 3)
        fill(self.double())
        fogzo.quantize_(self, fogzo.lsq(4), lambda module, name: name == "own")

    def forward(self, x):
        return self.head(self.own(x)[:, :2])


def clipped_before(rank, is_sharded):
    """Agreement and probe losses after gradients were clipped, of which this rank may have none."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Half(), mesh=cpu_mesh()) if is_sharded else Half()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.02)
    x, y = batch(0, 0)
    for _ in range(2):  # micro-batches
        estimator.record(lambda x, y: mse_loss(model(x), y), x, y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    stats = estimator.refine_grads_()
    return [stats.agreement, *stats.probe_losses]


def on_its_levels(rank):
    """Why nothing is measured of weights on their levels, of which this rank may hold no row."""
    from torch.distributed.fsdp import fully_shard

    model = fill(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    fogzo.quantize_(model, fogzo.lsq(4), everything)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.quantized_weight())
    fully_shard(model, mesh=cpu_mesh())
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    x, y = batch(0, rank)
    mse_loss(model(x), y[:, :1]).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return estimator.refine_grads_(lambda: mse_loss(model(x), y[:, :1])).fallback


def experts_cut_along(dim):
    """Noise per expert, and the noise that goes into each gradient, where ranks share experts."""
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = draw(2, 4, 8, dtype=torch.float64)
    grad = draw(2, 4, 8, seed=1, dtype=torch.float64) * torch.tensor([1.0, 5.0])[:, None, None]
    step = weight.abs().mean((1, 2), keepdim=True)
    if dim is not None:
        mesh = cpu_mesh()
        weight, grad = (distribute_tensor(t, mesh, [Shard(dim)]) for t in (weight, grad))
    param = nn.Parameter(weight)
    param.grad = grad
    record = fogzo.QuantizedWeight("experts", param, lambda: step, of_experts=True)
    with torch.no_grad():
        directions = Directions([record], seed=0, noise_shape="tensor_rms")
        directions.write_grads_(1.0, [(0, 1.0)])
        return directions.sizes[0].clone(), collectives.full(param.grad)


def whole_tensors_at_once(rank):
    """The most whole weights that were alive in a step, and whether the copies are of shards."""
    from fogzo.layers import quantized_layer
    from fogzo.probing import directions

    _, estimator, loss_fn, _ = after_backward(rank, "quest")
    estimator.num_samples = 2
    alive, seen, most = [], 0, 0

    def watch(tensor):
        nonlocal seen, most
        if tensor.shape[-1] > 1:  # a weight, and not its step sizes
            alive[:] = [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(tensor))
            seen, most = seen + 1, max(most, len(alive))
        return tensor

    cut, gather = directions.shard_like, quantized_layer.full
    directions.shard_like = lambda tensor, like: cut(watch(tensor), like)
    quantized_layer.full = lambda tensor: watch(gather(tensor))
    kept = []

    def closure():
        kept.append([c.shape for c in estimator._lender._saved])
        return loss_fn()

    try:
        estimator.flip_rate()
        estimator.refine_grads_(closure)
    finally:
        directions.shard_like, quantized_layer.full = cut, gather
    own = [collectives.local(w.param.detach()).shape for w in estimator.weights]
    # To count flips: two measurements of the step, codes twice, one sample. To refine: two
    # measurements of the step and two samples, whose shards are kept.
    assert seen == (5 + 4) * len(own)
    return {"most": most, "copies": kept == [own] * 4}


def messages(rank):
    """What mistakes are told."""
    from torch.distributed.fsdp import fully_shard

    model, _, loss_fn, _ = after_backward(rank)
    mesh = cpu_mesh()
    weights = fogzo.quantized_weights(model)
    stem = fogzo.quantized_weights(model.stem)
    early = Net()
    too_early = fogzo.FogzoEstimator(fogzo.quantized_weights(early))
    x, y = batch(0, rank)
    mse_loss(sharded(early)(x), y).backward()
    rotated = fogzo.quantize_(nn.ConvTranspose1d(4, 8, 4), fogzo.quest(2), lambda *_: True)
    mistakes = {
        "quantize": lambda: fogzo.quantize_(
            fully_shard(nn.Linear(4, 4), mesh=mesh), fogzo.lsq(2), lambda *_: True
        ),
        "quantize after a forward": lambda: fogzo.quantize_(
            used(fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)),
            fogzo.lsq(2),
            lambda *_: True,
        ),
        "dequantize": lambda: fogzo.dequantize_(model),
        "rotated": lambda: fogzo.quantized_weights(fully_shard(rotated, mesh=mesh)),
        "no model": lambda: fogzo.FogzoEstimator(
            [("w", weights[0].param, lambda: model.stem.weight_step)]
        ),
        "part of a model": lambda: fogzo.FogzoEstimator(stem).refine_grads_(loss_fn),
        "stacked": lambda: fogzo.FogzoEstimator(weights, evaluate="stacked"),
        "too early": lambda: too_early.refine_grads_(lambda: mse_loss(early(x), y)),
    }
    return {name: told(mistake) for name, mistake in mistakes.items()}


def sharded_by_fsdp1():
    """What is told of FSDP1, when weights are listed and of weights listed before."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Net("lsq")
    weights = fogzo.quantized_weights(model)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), device_mesh=cpu_mesh()
    )
    return [
        told(lambda: fogzo.quantized_weights(wrapped)),
        told(lambda: fogzo.FogzoEstimator(weights)),
    ]


def used(model):
    model(torch.ones(2, 4))
    return model


def hand_written(rank):
    """A fake quantization of one's own, with a step size that FSDP has sharded too."""
    model, estimator, loss_fn, _ = after_backward(rank, "lsq per channel")
    listed = [w for w in estimator.weights if w.name.endswith("up.weight")]
    triples = [(w.name, w.param, lambda w=w: model.get_parameter(f"{w.name}_step")) for w in listed]
    given = [collectives.local(w.param.grad).clone() for w in listed]
    results = []
    for weights in (triples, listed):
        for w, grad in zip(listed, given, strict=True):
            collectives.local(w.param.grad).copy_(grad)
        estimator = fogzo.FogzoEstimator(weights, noise_share=0.1, model=model)
        estimator.weights = [
            fogzo.QuantizedWeight(w.name, w.param, w.step_size) for w in estimator.weights
        ]
        estimator.refine_grads_(loss_fn)
        results.append([collectives.local(w.param.grad).clone() for w in listed])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def steps_of_a_float_checkpoint():
    """Steps and knees after loading a sharded checkpoint without them, a row of it zero."""
    plain = Net("ternary")  # which keeps no steps
    with torch.no_grad():
        plain.stem.weight[3] = 0
    expected = PRESETS["lsq past zero"]().initial_step_size(plain.stem.weight)
    model = sharded(Net("lsq past zero"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(sharded(plain).state_dict())
    layer = model.stem
    return {
        "step": torch.equal(collectives.full(layer.weight_step), expected),
        "knee": torch.equal(layer.weight_step_knee, expected / 2),
        "told": ["'stem' (1 of 8 groups)" in str(warning.message) for warning in caught],
    }


def rank_program(rank, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP, of a transposed layer
    with joined(rank, folder):
        results = {
            name: {"fsdp": train(rank, True, **s), "ddp": train(rank, False, **without_mesh(s))}
            for name, s in SCENARIOS.items()
        }
        results["given back"] = {
            f"{preset}, {ending}": given_back(rank, ending, preset)
            for preset in ("lsq", "quest")
            for ending in ("returns", "raises", "raises inside forward")
        }
        results["given back"]["in bfloat16"] = given_back_in_bfloat16(rank)
        results["broken"] = {w: broken_on_one_rank(rank, w) for w in ("a loss", "a gradient")}
        results["another batch"] = another_batch_on_one_rank(rank)
        results["clipped"] = [clipped_before(rank, is_sharded) for is_sharded in (False, True)]
        results["on its levels"] = on_its_levels(rank)
        results["experts"] = {dim: experts_cut_along(dim) for dim in (0, 1, 2)}
        results["whole"] = whole_tensors_at_once(rank)
        results["messages"] = messages(rank)
        results["FSDP1"] = sharded_by_fsdp1()
        results["hand-written"] = hand_written(rank)
        results["float checkpoint"] = steps_of_a_float_checkpoint()
        torch.save(results, folder / f"{rank}.pt")


def without_mesh(scenario):
    return {key: value for key, value in scenario.items() if key != "mesh"}


def given_back_in_bfloat16(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return given_back(rank, "returns", "quest", dtype=torch.float32, mp_policy=policy)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


def numbers(stats):
    return [math.nan if number is None else number for step in stats for number in step]


@pytest.mark.parametrize("name", SCENARIOS)
def test_shards_train_as_whole_weights_do(ranks, name):
    for result in ranks:
        fsdp, ddp = result[name]["fsdp"], result[name]["ddp"]
        assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-10)
        assert numbers(fsdp["stats"]) == pytest.approx(numbers(ddp["stats"]), rel=1e-6, nan_ok=True)
        assert fsdp["weights"].keys() == ddp["weights"].keys()
        for key, weight in ddp["weights"].items():
            torch.testing.assert_close(fsdp["weights"][key], weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ranks_agree_bit_for_bit(ranks, name):
    first, second = (result[name]["fsdp"] for result in ranks)
    assert first["losses"] == second["losses"]
    assert str(first["stats"]) == str(second["stats"])
    for key, weight in first["weights"].items():
        assert torch.equal(second["weights"][key], weight)


def test_shards_and_gradients_come_back_and_no_gathered_weight_stays_perturbed(ranks):
    for result in ranks:
        assert result["given back"]
        assert not {name: wrong for name, wrong in result["given back"].items() if wrong}


def test_a_float_checkpoint_in_shards_sets_steps_and_knees(ranks):
    for result in ranks:
        assert result["float checkpoint"] == {"step": True, "knee": True, "told": [True]}


def test_what_is_not_finite_on_one_rank_makes_all_fall_back(ranks):
    for result in ranks:
        assert "a probe loss is not finite" in result["broken"]["a loss"]["fallback"]
        assert "gradient is not finite" in result["broken"]["a gradient"]["fallback"]
        assert all(broken["kept"] for broken in result["broken"].values())


def test_a_mistake_on_one_rank_is_told_on_all_and_none_waits(ranks):
    assert ranks[0]["another batch"].startswith("on another rank the closure does not return")
    assert "rebound to the next batch" in ranks[-1]["another batch"]


def test_clipped_gradients_are_recognised_by_ranks_that_hold_none_of_them(ranks):
    for result in ranks:
        alone, together = result["clipped"]
        assert together == pytest.approx(alone, rel=1e-6)


def test_a_rank_without_rows_takes_part_in_looking_for_a_mistake(ranks):
    assert [result["on its levels"] for result in ranks] == [NO_FLIP] * RANKS


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_take_the_same_noise_however_they_are_cut(ranks, dim):
    sizes, expected = experts_cut_along(None)
    for rank, result in enumerate(ranks):
        own, grad = result["experts"][dim]
        torch.testing.assert_close(own, sizes if dim else sizes[rank : rank + 1])
        torch.testing.assert_close(grad, expected)


def test_no_rank_holds_more_than_one_whole_weight_or_copies_more_than_its_shards(ranks):
    for result in ranks:
        assert result["whole"] == {"most": 1, "copies": True}


@pytest.mark.parametrize(
    ("mistake", "fix"),
    [
        ("quantize", "fogzo.quantize_(model, quantizer) first"),
        ("quantize after a forward", "fogzo.quantize_(model, quantizer) first"),
        ("dequantize", "full state_dict"),
        ("rotated", "shard_placement_fn=lambda p: Shard(1) if p is model.weight else None"),
        ("no model", "model=model"),
        ("part of a model", "model=model, the module that fully_shard was called on last"),
        ("stacked", 'evaluate="in_place" copies one shard only'),
        ("too early", "Call fully_shard first"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(ranks, mistake, fix):
    for result in ranks:
        assert fix in result["messages"][mistake]


def test_fsdp1_is_told_to_be_replaced_by_fsdp2(ranks):
    for result in ranks:
        assert ["use FSDP2, fully_shard(model)" in told for told in result["FSDP1"]] == [True, True]


def test_a_quantizer_of_ones_own_may_have_a_sharded_step_size(ranks):
    assert ranks[0]["hand-written"]
    assert ranks[1]["hand-written"]


def test_a_plain_tensor_passes_through_untouched():
    tensor = torch.ones(3, 2)
    assert not collectives.is_sharded(tensor)
    assert collectives.local(tensor) is tensor
    assert collectives.full(tensor) is tensor
    assert collectives.shard_like(tensor, tensor) is tensor
    assert collectives.sharded_dims(tensor) == set()
    assert collectives.sum_over_shards([0.5, tensor.sum()], [tensor, tensor]) == [0.5, 6.0]


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), Path(sys.argv[2]))
