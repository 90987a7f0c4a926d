from __future__ import annotations

import pytest

from service.errors import NotAcceptable
from service.gateway.negotiation import choose

OFFERS = ("application/json", "image/png", "image/webp")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("image/png", "image/png"),
        ("IMAGE/WEBP", "image/webp"),
        ("image/*", "image/png"),
        ("image/*, image/png;q=0", "image/webp"),
        ("image/webp;q=0.5, image/png;q=0.4", "image/webp"),
        ("text/html, image/webp, */*;q=0.8", "image/webp"),
        ("image/png, application/json", "image/png"),
        ("*/*, application/json;q=0.1", "image/png"),
        ("application/json;charset=utf-8", "application/json"),
        ("image/png;q=nan, image/webp;q=2, */*;q=0.1", "application/json"),
    ],
)
def test_the_best_liked_offer_wins(accept: str | None, chosen: str) -> None:
    assert choose(accept, OFFERS) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "image/gif, text/*", "*/*;q=0", "image/png;q=x"])
def test_nothing_acceptable_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="image/webp"):
        choose(accept, OFFERS)
