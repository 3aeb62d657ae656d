"""Running quantized models: the operators, their kernels, the modules that hold packed weights, and loading.

Imports only `numeric`, `formats` and the errors.
"""
