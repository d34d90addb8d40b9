"""Every CUDA kernel, run on the CPU under AddressSanitizer with UBSan, and under ThreadSanitizer."""

import re
import shutil

import pytest

from tests import emulator


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in emulator.SANITIZERS if variant != "plain"])
def test_kernels_in_the_emulator(variant):
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("no g++ or no cmake")
    result = emulator.run_tests(variant)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 0, result.stdout
