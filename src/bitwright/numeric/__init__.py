"""Quantization arithmetic: grids, quantized tensors, outliers and how errors are measured.

The bottom of the house: it imports nothing of bitwright but the errors, and everything else imports it.
"""
