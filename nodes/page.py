"""The tab of a browser that queued a run. There may be none, and it may go away: that ends no run."""

from __future__ import annotations

import logging
from typing import Any

from server import PromptServer


class Page:
    """Of the prompt that the host is running. `node`: the sampler's id in it; `workflow`: the id of the workflow that was queued.

    Both are None where there is none to send to.
    """

    def __init__(self, node: str | None) -> None:
        self.node = node
        self.server: Any = getattr(PromptServer, "instance", None) if node is not None else None
        self.workflow = running_workflow(self.server)

    @property
    def there(self) -> bool:
        """Whether it can be reached now, and shows pictures: a script that waits for its prompt tells the host of no abilities."""
        client = getattr(self.server, "client_id", None)
        if client is None or client not in getattr(self.server, "sockets", ()):
            return False
        return bool(getattr(self.server, "sockets_metadata", {}).get(client, {}).get("feature_flags"))

    def send(self, event: str, message: dict[str, Any]) -> None:
        if self.server is None:
            return
        try:
            self.server.send_sync(event, message, self.server.client_id)
        except Exception as gone:  # a page that cannot be reached ends no run
            logging.debug(f"FlowCache: {event} was not sent: {gone}")


def running_workflow(server: Any) -> str | None:
    """The id of the workflow whose prompt the host is running; None for one that was queued without a page."""
    queue = getattr(server, "prompt_queue", None)
    for _, _, _, extra, *_ in [] if queue is None else queue.get_current_queue_volatile()[0]:  # the other method copies all that waits
        found: Any = extra
        for key in ("extra_pnginfo", "workflow", "id"):  # a script may send anything there
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None
    return None
