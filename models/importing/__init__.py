"""Checkpoints that people already have, made into model folders."""
