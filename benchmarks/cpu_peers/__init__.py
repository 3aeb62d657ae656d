"""Other CPU kernels, measured in the process of ours, turn by turn: one file per library.

`contract` is what they share, `timing` how turns are timed and compared. Only `torch_ops` needs nothing but torch;
the others import their library when they are asked for, and say how to get it where it is missing.
"""
