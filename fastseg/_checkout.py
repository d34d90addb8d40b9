"""In a checkout built in place, without an installation: imports the folder `kernels` as `fastseg.kernels`."""

import importlib.util
import sys
from pathlib import Path


def _load_kernels() -> None:
    folder = Path(__file__).parent.parent / "kernels"
    spec = importlib.util.spec_from_file_location(
        "fastseg.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastseg.kernels"] = sys.modules["fastseg"].kernels = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("fastseg.kernels") is None:
    _load_kernels()
