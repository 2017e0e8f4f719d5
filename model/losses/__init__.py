"""One file a loss, its formula in the docstring."""
