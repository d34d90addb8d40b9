"""Options and fixtures of the whole suite."""

import pytest
import torch

import fastseg.ops  # noqa: F401  fills REGISTRY
from fastseg._op import REGISTRY


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
    for op in REGISTRY.values():
        for kind in op.stock.below if op.stock else ():
            monkeypatch.setitem(op.stock.below, kind, 0)
