"""Calibration: where text and tokens come from, and what is measured on them."""
