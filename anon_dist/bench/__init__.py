"""Benchmarks: what the package costs, measured and predicted. `anon-dist bench --help` lists them."""
