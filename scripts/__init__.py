"""Everything beside the package: benchmarks, published results made again, checks, data."""
