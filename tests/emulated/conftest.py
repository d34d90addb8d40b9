"""These tests need the emulated CUDA library in the process: tests/cpp/test_emulated_kernels.py runs them."""

import os

import torch

from tests import emulator

# Where threads meet does not depend on the dtype: ThreadSanitizer, which is slow, sees one of them.
LEFT_OUT = {"thread": (torch.bfloat16, torch.float16, torch.float64)}

if emulator.LIBRARY in os.environ:
    emulator.load()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(config, items):
    dtypes = LEFT_OUT.get(os.environ.get(emulator.VARIANT), ())
    left_out = [
        item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("dtype") in dtypes
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
