"""The benchmark for a machine with an NVIDIA GPU; see README.md."""
