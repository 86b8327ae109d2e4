"""As much of a host as the front end needs to show its page: real node schemas, a recorded run, and nothing that computes.

    python tests/web/backend.py RECORDED.json

Needs aiohttp and comfyui-frontend-package. Prints its URL, and runs until its input ends. A prompt is answered with the recorded run, under the
prompt's and the workflow's own ids. `POST /test/next` tells how the next one goes, `POST /test/send` sends any message to every page.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import types
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


def pack_modules() -> tuple[Any, Any]:
    """`latest_films` and `latest_runs` of the pack's nodes: they need no host."""
    nodes = types.ModuleType("flowcache_nodes")
    nodes.__path__ = [str(PACK / "nodes")]
    sys.modules[nodes.__name__] = nodes
    films, runs = (importlib.import_module(f"{nodes.__name__}.{name}") for name in ("latest_films", "latest_runs"))
    return films, runs


class Backend:
    """`recorded`: `object_info`, and of one run its `events` [type, data] and the `outputs` that the history has of it.

    Every replay is a run of its own: it has a name that no other has.
    """

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded
        self.run = next(data["run"] for kind, data in recorded["events"] if kind == "flowcache.steps")
        self.pages: dict[str, web.WebSocketResponse] = {}
        self.history: dict[str, Any] = {}
        self.next: dict[str, Any] = {}
        self.replays: set[asyncio.Task[None]] = set()
        self.films, self.runs = pack_modules()

    def app(self) -> web.Application:
        inner = web.RouteTableDef()
        inner.get("/object_info")(self._object_info)
        inner.get("/history")(self._history)
        inner.post("/prompt")(self._prompt)
        inner.post("/test/next")(self._next)
        inner.post("/test/send")(self._send_any)
        for path, answer in EMPTY.items():
            inner.get(path)(lambda request, answer=answer: _answer(answer))
        self.runs.open_routes(type("Server", (), {"routes": inner}))
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
        """`events`: how many of the recorded ones are sent; `end`: what is sent in place of the rest, [type, data] or None; `kept`: nothing runs."""
        self.next = await request.json()
        return web.json_response({})

    async def _send_any(self, request: web.Request) -> web.Response:
        for kind, data in await request.json():
            await self._send(list(self.pages), kind, data)
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
        if not how.get("kept"):
            self._rename(uuid4().hex)
        events = self._kept() if how.get("kept") else self.recorded["events"][: how.get("events")]
        for kind, data in [*events, *([how["end"]] if how.get("end") else [])]:
            mine = {**data, **({"prompt_id": name} if "prompt_id" in data else {}), **({"workflow": workflow} if "workflow" in data else {})}
            await self._send([asked["client_id"]], kind, mine)
            await asyncio.sleep(0.005)
        if not how:
            status = {"status_str": "success", "completed": True, "messages": []}
            prompt = [len(self.history), name, asked["prompt"], extra, []]
            self.history[name] = {"prompt": prompt, "outputs": self.recorded["outputs"], "status": status, "meta": {}}

    def _rename(self, run: str) -> None:
        self.recorded = json.loads(json.dumps(self.recorded).replace(self.run, run))
        self.run = run

    def _kept(self) -> list[Any]:
        """What a host sends that has kept every result."""
        outputs, of_prompt = self.recorded["outputs"], {"prompt_id": "", "timestamp": 0}
        nodes = [str(node["id"]) for node in self.recorded["workflow"]["nodes"]]
        shown = [["executed", {**of_prompt, "node": node, "display_node": node, "output": output}] for node, output in outputs.items()]
        ends = [["execution_success", of_prompt], ["executing", {**of_prompt, "node": None}]]
        return [["execution_start", of_prompt], ["execution_cached", {**of_prompt, "nodes": nodes}], *shown, *ends]

    async def _send(self, pages: list[str], kind: str, data: Any) -> None:
        if kind == "flowcache.steps" and isinstance(data, dict) and "workflow" in data:
            self.runs.LATEST.put(data)
        if kind == "flowcache.film" and isinstance(data, dict) and "picture" in data:
            self.films.FILMS.put(data)
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
