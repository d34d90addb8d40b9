"""The files of this folder run only in a process that had TRITON_INTERPRET=1 from its start:
tests/test_triton_interpreter.py starts one for each. Keep the grids small: the interpreter takes about 6 ms
per program, whatever its block size.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
