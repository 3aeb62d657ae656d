"""Other quantizers, measured on the same model, tokens and scheme: one file per peer, named as users type it.

`environments` makes a virtual environment for each and runs it there; `contract` is what they share inside it.
Nothing here imports bitwright: a peer's environment does not have it.
"""
