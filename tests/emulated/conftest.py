"""These tests need the emulated CUDA library in the process: tests/cpp/test_emulated_kernels.py runs them."""

import os

import torch

from tests import emulator

# bfloat16 reads and writes the bytes that float16 does. Where threads meet does not depend on the dtype.
REPEATED_DTYPES = {"plain": (), "address": (torch.bfloat16,), "thread": (torch.bfloat16, torch.float16, torch.float64)}

if emulator.LIBRARY in os.environ:
    emulator.load()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(config, items):
    """Under a sanitizer, which is slow, without the dtypes that show it nothing new."""
    repeated = REPEATED_DTYPES[os.environ.get(emulator.VARIANT, "plain")]
    left_out = [
        item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("dtype") in repeated
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
