"""Options of the tests."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the library's own tests run on another device."""
    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made, such as cuda; for estimators/test_contract.py and "
        "probing/test_giving_back.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make that device the default one."""
    device = config.getoption("--device")
    if device != "cpu":
        torch.set_default_device(device)
