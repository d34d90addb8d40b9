"""Everything that computes, one folder per op; imported as `fastseg.kernels`."""
