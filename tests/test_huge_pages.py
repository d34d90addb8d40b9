"""The C++ kernels request huge pages for large outputs (csrc/fastseg/huge_pages.h)."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from fastseg import ops
logits = torch.zeros(1, 8, 512, 1024, requires_grad=True)  # 16 MB: a mapping of its own under the default allocator
ops.cross_entropy(logits, torch.zeros(1, 512, 1024, dtype=torch.int64)).backward()
middle = logits.grad.data_ptr() + logits.grad.nbytes // 2
inside = False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first:
        begin, end = (int(address, 16) for address in first.split("-"))
        inside = begin <= middle < end
    elif inside and first == "VmFlags:":
        print("advised" if "hg" in line.split() else "plain")
"""


@pytest.mark.parametrize("setting, expected", [(None, "advised"), ("0", "plain")])
def test_a_large_gradient_is_advised_to_use_huge_pages_unless_turned_off(setting, expected, monkeypatch):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    monkeypatch.delenv("FASTSEG_HUGE_PAGES", raising=False)
    if setting is not None:
        monkeypatch.setenv("FASTSEG_HUGE_PAGES", setting)
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected
