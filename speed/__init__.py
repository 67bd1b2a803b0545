from speed import batch, delta, linear, parallel, parallel_delta, ranks  # noqa: F401
