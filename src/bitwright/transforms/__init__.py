"""Transforms: rewritings of a block that leave its float output unchanged and make it easier to quantize.

`equivalence` applies one; `smooth` and `awq` choose one in closed form and by search.
"""
