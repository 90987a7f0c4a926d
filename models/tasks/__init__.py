"""Tasks: admit, step, collect over a pool of slots."""
