"""The service on a simulated clock: real engines and controllers, without networks, store or torch."""
