"""The functional ops, one line each."""
