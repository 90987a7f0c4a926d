"""Method bridges: several bridges of different teachers from one source, the source's surplus weight taken out."""

from __future__ import annotations

from models.methods.bridge import Bridge


class Bridges(Bridge):
    """Kim et al. (ICLR 2024), with more than one bridge."""

    name = "bridges"
