"""The measurement on a GPU: ``python -m benchmarks.gpu``, see `benchmarks.gpu.kernels`."""
