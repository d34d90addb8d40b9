"""The interpreter itself: it is on, reads and writes every dtype, and respects masks."""

import pytest
import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def halve_kernel(source, target, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(target + offsets, (values * 0.5).to(target.dtype.element_ty), mask=offsets < size)


@pytest.mark.parametrize("read", DTYPES)
@pytest.mark.parametrize("written", DTYPES)
def test_half_types_are_read_and_written(read, written):
    source = torch.randn(100).to(read)
    target = torch.full((128,), 7.0, dtype=written)
    halve_kernel[(1,)](source, target, 100, BLOCK=128)
    halved = source.float() * 0.5
    if written == torch.bfloat16:  # the interpreter truncates to bf16 where a GPU rounds to nearest
        assert ((target[:100].float() - halved).abs() <= torch.finfo(written).eps * halved.abs()).all()
    else:
        assert torch.equal(target[:100], halved.to(written))
    assert (target[100:] == 7.0).all()
