"""Learning: gradient descent on one block's output error, for whatever parameters a recipe declares learnable."""
