"""These tests need the emulated CUDA library in the process: tests/cpp/test_emulated_kernels.py runs them."""

import os

from tests import emulator

if emulator.LIBRARY in os.environ:
    emulator.load()
else:
    collect_ignore_glob = ["test_*.py"]
