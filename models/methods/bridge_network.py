"""Method bridge_network: networks that estimate members on low-loss curves from the source, averaged with it."""

from __future__ import annotations

from models.methods.bridge import Bridge


class CurveBridges(Bridge):
    """Yun et al., "Traversing Between Modes in Function Space for Fast Ensembling" (ICML 2023)."""

    name = "bridge_network"
