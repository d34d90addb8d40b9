"""The tuner of the Triton convolutions: the parts that need no GPU."""

import ast
import importlib

import pytest
import torch

from benchmarks import tune_convolution as tuner

pytest.importorskip("triton", reason="triton is not installed")


def _table(text, name, module):
    """The table `name` in the source `text`."""
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return eval(compile(ast.Expression(values[name]), name, "eval"), {"Config": module.Config})


@pytest.mark.parametrize("table", tuner.TABLES)
def test_every_row_has_candidates_and_can_be_rewritten(table):
    name, rows = tuner.TABLES[table]
    module = importlib.import_module(f"fastseg.kernels.convolution.{name}")
    text = (tuner.KERNELS / f"{name}.py").read_text()
    for key, config in getattr(module, rows).items():
        assert tuner.shapes(table, key)
        others = list(tuner.candidates(table, key, module.Config))
        assert others and all(isinstance(other, module.Config) for other in others)
        assert tuner.rewritten(text, table, key, config) == text
        changed = config._replace(warps=16)
        written = _table(tuner.rewritten(text, table, key, changed), rows, module)
        assert written == getattr(module, rows) | {key: changed}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert tuner.main(["dense"]) == 2
    assert "GPU" in capsys.readouterr().err


def test_unknown_tables_are_refused(capsys):
    with pytest.raises(SystemExit):
        tuner.main(["sparse"])
    assert "allowed: dense, weight" in capsys.readouterr().err
