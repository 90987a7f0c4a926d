"""The Accept header (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import NotAcceptable


def choose(accept: str | None, offers: Sequence[str]) -> str:
    """The offered media type that the client likes best; NotAcceptable when it takes none.

    Each offer gets the q of the most specific range that matches it. Ties go to the range written
    first, then to the offer listed first. An absent or empty header accepts anything.
    """
    if accept in (None, "", "*/*", offers[0]):
        return offers[0]
    ranges = _parse(accept)
    ranked = []
    for place, offer in enumerate(offers):
        family = offer.split("/")[0] + "/*"
        matches = [
            (specificity, q, order)
            for order, (media, q) in enumerate(ranges)
            for specificity, pattern in enumerate(("*/*", family, offer))
            if media == pattern
        ]
        if matches:
            _, q, order = max(matches, key=lambda m: (m[0], -m[2]))
            if q > 0:
                ranked.append((-q, order, place))
    if not ranked:
        raise NotAcceptable(f"cannot produce {accept!r}; offered: {', '.join(offers)}", field="Accept")
    return offers[min(ranked)[2]]


def _parse(accept: str) -> list[tuple[str, float]]:
    ranges = []
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media:
            ranges.append((media, _quality(parameters)))
    return ranges


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return 0.0
            return quality if 0.0 <= quality <= 1.0 else 0.0
    return 1.0
