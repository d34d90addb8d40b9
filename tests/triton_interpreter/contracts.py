"""Runs contract cases (tests/contract.py) on Triton in the interpreter: every dtype, layout and kind of gradient."""

import pytest

from fastseg._dtypes import FLOATING_GPU
from tests.contract import LAYOUTS, Make
from tests.test_contract import _compare


def check_contracts(contracts):
    """A module's test: each small case in each dtype, and in each layout with a stride-0 gradient; others in fp32."""

    @pytest.mark.parametrize(
        "contract, case",
        [
            pytest.param(contract, case, id=f"{contract.name}-{case.name}")
            for contract in contracts
            for case in contract.cases
        ],
    )
    def check(contract, case):
        for dtype in FLOATING_GPU if case.small else FLOATING_GPU[:1]:
            _compare(contract, case, Make(dtype), backend="triton")
        for layout in LAYOUTS[1:] if case.small else ["channels_last"]:
            _compare(contract, case, Make(FLOATING_GPU[0], layout=layout), "stride0", backend="triton")

    return check
