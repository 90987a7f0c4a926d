"""Adversarial purification: noise an image a little, denoise it with our own diffusion model, classify that."""
