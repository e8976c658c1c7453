"""A device by its name, or a refusal that says what there is."""

from dataclasses import replace

import pytest
import torch

from fogzo_lab.bench.config import BenchConfig
from fogzo_lab.bench.networks import mlp
from fogzo_lab.bench.sections import probes
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.devices import available_devices, drawing_gpus, find_device
from fogzo_lab.training.loop import train
from fogzo_lab.training.model_config import QuantizerConfig


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def old_driver(monkeypatch):
    """Two GPUs that torch counts and cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_without_an_accelerator_there_is_the_cpu(no_gpu):
    assert available_devices() == ["cpu"]
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "xpu", "hpu", "cpu:1"])
def test_what_is_not_here_is_refused(no_gpu, name):
    with pytest.raises(ValueError, match=r"cannot compute on '.*here is cpu: --device cpu"):
        find_device(name)


def test_a_torch_without_cuda_is_the_reason(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match=r"'cuda:0' \(this torch is built without CUDA\)"):
        find_device("cuda")


def test_a_gpu_without_float64_is_neither_taken_nor_offered(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert available_devices() == ["cpu"]
    assert find_device("auto") == torch.device("cpu")
    says = r"'mps' \(it has no float64, .*\), here is cpu: --device cpu"
    with pytest.raises(ValueError, match=says):
        find_device("mps")
    with pytest.raises(ValueError, match=r"float64.*'mps:0': --device cpu"):
        BenchConfig(device="mps:0")


def test_gpus_by_name_number_and_rank(two_gpus, monkeypatch):
    assert available_devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name in ("auto", "cuda", "cuda:0"):
        assert find_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == find_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda", "cuda:7", "mps"):
        with pytest.raises(ValueError, match=r"here is cpu, cuda, cuda:0, cuda:1"):
            find_device(name)


def test_the_cpu_computes_where_the_driver_of_the_gpus_is_too_old(old_driver, tmp_path):
    assert drawing_gpus() == []
    recipe = replace(
        RECIPES["digits-mlp"](),
        device="cpu",
        activations=QuantizerConfig(preset="lsq", bits=4),
        max_steps=1,
        output_dir=tmp_path / "run",
    )
    assert train(recipe)["steps"] == 1


def test_the_benchmark_of_probes_does_too(old_driver):
    cpu = torch.device("cpu")
    config = BenchConfig(suite="tiny", device="cpu")
    assert list(probes.in_place(mlp((8, 4, 2), 4, cpu), 1, config, cpu))


def test_the_streams_of_usable_gpus_are_kept(old_driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert drawing_gpus() == [torch.device("cuda", 0), torch.device("cuda", 1)]
