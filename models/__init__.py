"""Models: everything that computes. Knows no HTTP, no Redis, no Prometheus."""
