"""Uncertainty: arrays in, numbers out; numpy only."""
