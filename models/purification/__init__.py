"""Adversarial purification: an image noised a little and denoised by our own diffusion model before it is classified."""
