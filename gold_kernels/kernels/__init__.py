"""Triton row kernels; import a module of this package only where triton is installed."""
