"""Options of the tests, and the order of their files."""

import gc
import logging
import signal

import pytest
import torch

gc.set_threshold(10_000, 20, 20)  # by default, collecting garbage takes 5 to 10% of the time

LONGEST = (
    "test_gpu.py",
    "test_executors.py",
    "test_bench.py",
    "test_compare_signals.py",
    "test_train_ranks.py",
    "test_compare.py",
    "test_experiments.py",
    "test_train.py",
    "test_onnx.py",
    "test_cli.py",
    "test_resume.py",
)
"""Files that take longest, most of them waiting for processes of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the library's own tests run on another device."""
    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made, such as cuda; for estimators/test_contract.py and "
        "probing/test_giving_back.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make that device the default one, and let signals mean what tests of them expect."""
    defaults = {signal.SIGINT: signal.default_int_handler}
    defaults |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    for number, handler in defaults.items():
        if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    device = config.getoption("--device")
    if device != "cpu":
        torch.set_default_device(device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that at the end no worker is left alone with one."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Spare tests what collecting them has left: objects that stay, and loggers."""
    gc.collect()
    gc.freeze()
    # pytest adds its handlers to each logger that does not propagate, six times per test, which
    # takes longer than many tests.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True
