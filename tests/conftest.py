"""Options and fixtures of the whole suite."""

import importlib

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu (default) or cuda: where the contract tests run")


@pytest.fixture(scope="session")
def device(request) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: no CUDA device", returncode=3)
    return chosen


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_call_is_left_to_stock(monkeypatch):
    """Tests are small, and on small inputs "auto" would compare stock PyTorch with itself."""
    for module, name in (
        ("cross_entropy", "FEWEST_LOGITS_CPU"),
        ("_cross_entropy_probabilities", "FEWEST_PROBABILITIES_CPU"),
        ("max_pool2d", "FEWEST_CONTIGUOUS_CPU"),
        ("max_pool2d", "FEWEST_CHANNELS_LAST_CPU"),
        ("max_unpool2d", "FEWEST_CONTIGUOUS_CPU"),
        ("max_unpool2d", "FEWEST_CHANNELS_LAST_CPU"),
    ):
        monkeypatch.setattr(importlib.import_module(f"fastseg.ops.{module}"), name, 0)
