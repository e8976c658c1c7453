"""The averaged weights: the recursion, what a quantized model makes of it, and giving back."""

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fogzo
from fogzo_lab.data.config import ImagesConfig
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.ema import Ema
from fogzo_lab.training.model_config import MlpConfig
from fogzo_lab.training.optimizers import build_optimizer
from fogzo_lab.training.parallel import leave_ranks
from forked import Python, finish
from toolbox import cpu_mesh

SGD = TrainConfig(
    recipe="test", model=MlpConfig(), data=ImagesConfig(), optimizer="sgd", learning_rate=0.1
)
QUANTIZERS = {"lsq": fogzo.lsq(2), "fixed": fogzo.fixed(2), "quest": fogzo.quest(2)}
RANKS = 2


def network(quantizer=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv1d(4, 8, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(16, 16), nn.Linear(16, 5))
    return model if quantizer is None else fogzo.quantize_(model, quantizer)


def train(model, ema, steps, seed=0):
    """The averages after these steps by the definition, in double precision."""
    stream = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = {}
    for t in range(ema.updates, ema.updates + steps):
        model(torch.randn(16, 4, 4, generator=stream)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        decay = min(ema.decay, (1 + t) / (10 + t)) if t else 0.0
        for name, value in model.state_dict().items():
            old = averages.get(name, value.double())
            averages[name] = decay * old + (1 - decay) * value.double()
    return averages


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_recursion_of_parameters_and_statistics(decay):
    model = network()
    ema = Ema(model, decay)
    expected = train(model, ema, 12)
    before = snapshot(model)
    with ema.applied():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert value == 12
            else:
                torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)
                assert not torch.equal(value, before[name])
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_are_those_of_the_averaged_latent_weights(name):
    quantizer = QUANTIZERS[name]
    model = network(quantizer)
    ema = Ema(model, 0.9)
    averages = train(model, ema, 10)
    codes = model[4].codes().clone()
    before = snapshot(model)
    with ema.applied():
        average = averages["4.weight"].float()
        step = averages["4.weight_step"].float() if name != "quest" else None
        assert torch.equal(model[4].codes(), quantizer.codes(average, step, 0))
        torch.testing.assert_close(model[4].weight, average, check_dtype=False, rtol=1e-5, atol=0)
        if name == "fixed":
            assert torch.equal(model[4].weight_step, before["4.weight_step"])
        if name == "lsq":
            assert not torch.equal(model[4].weight_step, before["4.weight_step"])
        model.eval()
        assert torch.isfinite(model(torch.ones(2, 4, 4))).all()
        model.train()
    assert torch.equal(model[4].codes(), codes)
    assert same(before, snapshot(model))


def test_integer_buffers_and_the_random_start_are_left_out():
    model = network()
    model.register_buffer("input_state", torch.tensor([0], dtype=torch.int8))
    model.register_buffer("input_step", torch.tensor([torch.nan]))
    ema = Ema(model, 0.9)
    model.input_state += 1
    model.input_step.fill_(0.5)
    ema.update()
    ema.update()
    with ema.applied():
        assert model.input_state == 1
        assert model.input_step == 0.5
    assert not any("input_state" in name for name in ema.state_dict()["average"])


def test_the_model_is_itself_after_an_exception_or_a_forward_in_training_mode():
    model = network(fogzo.lsq(2))
    ema = Ema(model, 0.9)
    train(model, ema, 3)
    before, parameters = snapshot(model), list(model.parameters())
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert not same(before, snapshot(model))
        raise KeyboardInterrupt
    assert same(before, snapshot(model))
    with ema.applied(), ema.applied():
        model(torch.randn(16, 4, 4))
    counts = {"1.num_batches_tracked"}
    after = snapshot(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == counts
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_before_the_first_update_it_is_the_model():
    model = network()
    with Ema(model, 0.9).applied():
        assert same(snapshot(model), snapshot(network()))


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    ema = Ema(model, 0.9)
    assert len(ema.state_dict()["average"]) == 1
    for value in (1.0, 2.0):
        nn.init.constant_(model[0].weight, value)
        ema.update()
    with ema.applied():
        assert model[1].weight[0, 0].item() == pytest.approx(20 / 11)


def test_a_saved_average_goes_on_as_if_nothing_had_happened(tmp_path):
    model = network(fogzo.lsq(2))
    ema = Ema(model, 0.9)
    train(model, ema, 4)
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    copy = network(fogzo.lsq(2))
    copy.load_state_dict(saved["model"])
    resumed = Ema(copy, 0.9)
    resumed.load_state_dict(saved["ema"])
    train(model, ema, 4, seed=1)
    train(copy, resumed, 4, seed=1)
    with ema.applied(), resumed.applied():
        assert same(snapshot(model), snapshot(copy))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="--ema-decay"):
        Ema(network(), 1.0)
    state = Ema(network(), 0.9).state_dict()
    with pytest.raises(ValueError, match=r"another model, which differs in 0\.weight_step"):
        Ema(network(fogzo.lsq(2)), 0.9).load_state_dict(state)


def test_sharded_by_fsdp_it_is_the_same_average(tmp_path):
    """Two real processes, each of which holds and averages its own rows."""
    finish(*[Python(__file__, tmp_path, rank) for rank in range(RANKS)])


def one_rank(folder, rank):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    average_shards()
    dist.barrier()
    leave_ranks()


def average_shards():
    from torch.distributed.fsdp import fully_shard

    def linear():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
        return fogzo.quantize_(model, fogzo.lsq(2, granularity="channel"))

    def sharded():
        model = linear()
        mesh = cpu_mesh()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        outputs(model)  # after which the outermost module shows gathered weights
        return model

    def outputs(model):
        with torch.no_grad():
            return model(inputs)

    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    plain, parts = linear(), sharded()
    emas = []
    for model in (plain, parts):
        optimizer, ema = build_optimizer(SGD, model), Ema(model, 0.9)
        emas.append(ema)
        for _ in range(3):
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()

    last = outputs(plain)
    # The outermost module keeps what it gathers, which must not outlive the swap, in or out.
    torch.testing.assert_close(outputs(parts), last)
    with emas[0].applied(), emas[1].applied():
        averaged = outputs(plain)
        torch.testing.assert_close(outputs(parts), averaged)
    assert not torch.equal(averaged, last)
    torch.testing.assert_close(outputs(parts), last)

    for state in (emas[0].state_dict(), emas[1].state_dict()):  # whole, and in parts
        fresh = sharded()
        ema = Ema(fresh, 0.9)
        ema.load_state_dict(state)
        with ema.applied():
            torch.testing.assert_close(outputs(fresh), averaged)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    one_rank(sys.argv[1], int(sys.argv[2]))
