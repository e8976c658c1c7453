from dataclasses import replace

import pytest
import torch.distributed as dist
from shrunk import shrunk
from torch.testing._internal.distributed.fake_pg import FakeStore

from fogzo_lab.recipes import RECIPES
from fogzo_lab.training.loop import train


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in tensorboard's generated code
def test_tensorboard_gets_every_logged_step(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = shrunk(RECIPES["digits-mlp"](), output_dir=tmp_path, trackers=("tensorboard",))
    result = train(replace(config, max_steps=20, log_every=5))
    (file,) = [path for path in tmp_path.rglob("events.*") if path.parent.name == "digits-mlp"]
    events = loading.EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 5, 10, 15, 20]
    (final,) = events.Scalars("test_accuracy")
    assert final.value == pytest.approx(result["test_accuracy"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_ranks_of_a_tracked_run_end_together(tmp_path):
    pytest.importorskip("tensorboard")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        train(shrunk(RECIPES["digits-mlp"](), output_dir=tmp_path, trackers=("tensorboard",)))
        assert dist.is_initialized()  # the other ranks wait in its barrier
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_tracker_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    config = shrunk(RECIPES["digits-mlp"](), output_dir=tmp_path / "run", trackers=("wandb",))
    with pytest.raises(ValueError, match="pip install wandb"):
        train(config)
    assert not (tmp_path / "run").exists()
