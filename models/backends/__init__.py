"""Ways to execute a diffusion backbone: same contract, same numbers within 1e-4, other speed."""
