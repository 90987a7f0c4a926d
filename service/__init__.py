"""The service: gateway, broker, worker. Knows no torch."""
