"""From the states that a sampler ends with to pixels."""
