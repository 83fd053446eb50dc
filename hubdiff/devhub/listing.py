"""How lists and dates are written: pages linked by a header, times to the millisecond in UTC."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from .endpoint import Call


def page(call: Call, values: list[Any], size: int) -> Response:
    """One page of ``values``, with a link to the next: clients follow links, not numbers."""
    start = int(call.query("cursor") or 0)
    headers = {}
    if start + size < len(values):
        pairs = [p for p in call.request.query_params.multi_items() if p[0] != "cursor"]
        query = urlencode([*pairs, ("cursor", str(start + size))])
        headers["Link"] = f'<{call.hub.url}{call.record.path}?{query}>; rel="next"'
    return JSONResponse(values[start : start + size], headers=headers)


def iso(timestamp: float) -> str:
    moment = datetime.fromtimestamp(timestamp, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")
