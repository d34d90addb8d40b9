"""Options and fixtures of the whole suite."""

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
