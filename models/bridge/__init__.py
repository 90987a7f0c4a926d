"""Schroedinger-bridge maths from a source's logits to the ensemble's."""
