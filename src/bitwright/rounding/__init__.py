"""Rounding: given weights and a range, pick the codes, and keep the outliers that a policy chose apart."""
