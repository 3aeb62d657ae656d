"""Kernels for NVIDIA GPUs in Triton, imported when a quantized weight first meets an input on a CUDA device.

`layout` repacks a weight, `configs` chooses blocks by shape, `gemv`, `gemm` and `dequantize` compute with float inputs,
`quantize` and `matmul8` with inputs quantized to 8 bits (`w8a8`), and `kernel` chooses between them. All but `layout`
and `configs` need the package `triton`; `runtime.ops` looks for it.
"""
