"""Solvers: each fills float64 coefficient rows at admission; one fused kernel serves them all."""
