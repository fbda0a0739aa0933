"""A conversation that the model has summed up: the user's messages, and one item that stands for all the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.responses.answers import CompactedResponse, response_usage
from mlx_overlay_server.api.responses.items import compaction_item, new_id
from mlx_overlay_server.chat.events import Done, Event, Text
from mlx_overlay_server.errors import Failed


def compacted(items: Iterable[Json], events: Sequence[Event]) -> CompactedResponse:
    """Return what is left of a conversation; `events` are those of the summary. Raises Failed for an empty one."""
    summary = "".join(event.text for event in events if isinstance(event, Text)).strip()
    if not summary:
        raise Failed("the model wrote no summary; compact the conversation with another model")
    done = events[-1]
    assert isinstance(done, Done)  # noqa: S101 - for the type checker
    users = [item for item in items if item.get("role") == "user"]
    return {
        "id": new_id("resp"),
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*users, compaction_item(summary)],
        "usage": response_usage(done.usage),
    }
