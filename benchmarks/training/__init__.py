"""How fast training is, beside other trainers, on the same rows, in one run: `make bench`. See docs/benchmarks.md."""
