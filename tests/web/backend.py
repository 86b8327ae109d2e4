"""As much of a host as the front end needs to show its page: real node schemas, a recorded run, and nothing that computes.

    python tests/web/backend.py RECORDED.json

Needs aiohttp and comfyui-frontend-package. Prints its URL, and runs until its input ends. A prompt is answered with the recorded run, under the
prompt's and the workflow's own ids. `POST /test/next` tells how the next one goes, `POST /test/send` sends any message to every page.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import comfyui_frontend_package
from aiohttp import WSMsgType, web

PACK = Path(__file__).resolve().parent.parent.parent
STATIC = Path(comfyui_frontend_package.__file__).parent / "static"
EMPTY: dict[str, Any] = {
    "/embeddings": [], "/extensions": [f"/extensions/flowcache/{path.name}" for path in sorted((PACK / "web").glob("*.js"))],
    "/features": {}, "/global_subgraphs": {}, "/i18n": {}, "/models": [], "/experiment/models": [], "/node_replacements": {}, "/settings": {},
    "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 0, "total": 0, "has_more": False}}, "/userdata": [], "/v2/userdata": [],
    "/users": {"storage": "server", "migrated": True}, "/workflow_templates": {}, "/queue": {"queue_running": [], "queue_pending": []},
    "/system_stats": {"system": {"os": "linux", "comfyui_version": "0.27.0", "python_version": "3", "argv": []}, "devices": []},
}  # fmt: skip
"""What the host would answer that has nothing installed and nothing queued."""


def latest_runs() -> Any:
    """The module of the pack: it needs no host."""
    spec = importlib.util.spec_from_file_location("latest_runs", PACK / "nodes" / "latest_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Backend:
    """`recorded`: `object_info`, and of one run its `events` [type, data] and the `outputs` that the history has of it."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded
        self.pages: dict[str, web.WebSocketResponse] = {}
        self.history: dict[str, Any] = {}
        self.next: dict[str, Any] = {}
        self.replays: set[asyncio.Task[None]] = set()
        self.runs = latest_runs()

    def app(self) -> web.Application:
        inner = web.RouteTableDef()
        inner.get("/object_info")(self._object_info)
        inner.get("/history")(self._history)
        inner.post("/prompt")(self._prompt)
        inner.post("/test/next")(self._next)
        inner.post("/test/send")(self._send_any)
        for path, answer in EMPTY.items():
            inner.get(path)(lambda request, answer=answer: _answer(answer))
        self.runs.open_route(type("Server", (), {"routes": inner}))
        app, api = web.Application(client_max_size=2**26), web.Application(client_max_size=2**26)
        api.add_routes(inner)
        app.router.add_get("/ws", self._socket)
        app.add_routes(inner)
        app.add_subapp("/api", api)
        app.router.add_get("/", lambda request: _file(STATIC / "index.html"))
        app.router.add_static("/extensions/flowcache", PACK / "web")
        app.router.add_static("/", STATIC)
        return app

    async def _object_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.recorded["object_info"])

    async def _history(self, request: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket, name = web.WebSocketResponse(), request.query.get("clientId") or uuid4().hex
        await socket.prepare(request)
        self.pages[name] = socket
        await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": name}})
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        if self.pages.get(name) is socket:
            del self.pages[name]
        return socket

    async def _next(self, request: web.Request) -> web.Response:
        """`events`: how many of the recorded ones are sent; `end`: what is sent in place of the rest, [type, data] or None."""
        self.next = await request.json()
        return web.json_response({})

    async def _send_any(self, request: web.Request) -> web.Response:
        for kind, data in await request.json():
            await self._tell(list(self.pages), kind, data)
        return web.json_response({})

    async def _prompt(self, request: web.Request) -> web.Response:
        asked, name = await request.json(), str(uuid4())
        how, self.next = self.next, {}
        replay = asyncio.create_task(self._replay(name, asked, how))
        self.replays.add(replay)
        replay.add_done_callback(self.replays.discard)
        return web.json_response({"prompt_id": name, "number": len(self.history), "node_errors": {}})

    async def _replay(self, name: str, asked: dict[str, Any], how: dict[str, Any]) -> None:
        extra = asked.get("extra_data", {})
        workflow = extra.get("extra_pnginfo", {}).get("workflow", {}).get("id")
        events = self.recorded["events"][: how.get("events")]
        for kind, data in [*events, *([how["end"]] if how.get("end") else [])]:
            mine = {**data, **({"prompt_id": name} if "prompt_id" in data else {}), **({"workflow": workflow} if "workflow" in data else {})}
            await self._tell([asked["client_id"]], kind, mine)
            await asyncio.sleep(0.005)
        if not how:
            status = {"status_str": "success", "completed": True, "messages": []}
            prompt = [len(self.history), name, asked["prompt"], extra, []]
            self.history[name] = {"prompt": prompt, "outputs": self.recorded["outputs"], "status": status, "meta": {}}

    async def _tell(self, pages: list[str], kind: str, data: Any) -> None:
        if kind == "flowcache.steps" and isinstance(data, dict) and "workflow" in data:
            self.runs.LATEST.put(data)
        for page in pages:
            if page in self.pages:
                await self.pages[page].send_json({"type": kind, "data": data})


async def _answer(value: Any) -> web.Response:
    return web.json_response(value)


async def _file(path: Path) -> web.FileResponse:
    return web.FileResponse(path)


async def main(recorded: Path) -> None:
    runner = web.AppRunner(Backend(json.loads(recorded.read_text())).app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
