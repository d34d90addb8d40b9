"""One module per op, each exporting `CASES`."""
