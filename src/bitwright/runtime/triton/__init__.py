"""Kernels for NVIDIA GPUs in Triton, imported when a quantized weight first meets an input on a CUDA device.

`layout` repacks a weight, `configs` chooses blocks by shape, `gemv`, `gemm` and `dequantize` compute, and `kernel`
chooses between them. Nothing here imports without the package `triton`; `runtime.ops` looks for it.
"""
