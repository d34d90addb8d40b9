"""Benchmarks of fastseg's ops; see `benchmarks/README.md` and `python -m benchmarks.run --help`."""
