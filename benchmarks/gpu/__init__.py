"""Measurements for a GPU: each script is one call that leaves JSON, and runs at toy size on a CPU."""
