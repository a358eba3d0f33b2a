"""Every page of a list, as one iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lathe.client.transport import Transport


def pages(transport: Transport, method: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
    """The items of `field` of every page. `request` is changed: its page_token moves on."""
    while True:
        answer = transport.call(method, request)
        yield from getattr(answer, field)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
