"""One small app per peer. Each runs in the peer's own virtual environment and knows nothing but work.py."""
