"""What several Triton kernels share; import lines and scale only where triton is installed."""
