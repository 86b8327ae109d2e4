"""A real ComfyUI for tests: needs COMFYUI_PATH (its source tree) and COMFYUI_PYTHON (its interpreter).

COMFYUI_LAUNCH may name a launcher that is run as PYTHON LAUNCH COMFYUI_PATH arguments; COMFYUI_ARGS holds more arguments.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from flowcache_core.models.bundle import Bundle
from flowcache_core.run.generate import Job

NEEDS_HOST = [
    pytest.mark.host,
    pytest.mark.skipif(
        not (os.environ.get("COMFYUI_PATH") and os.environ.get("COMFYUI_PYTHON")), reason="set COMFYUI_PATH and COMFYUI_PYTHON to test the nodes"
    ),
]
PACK = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((PACK / "workflows" / "api").glob("*.json"))
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CHUNKWISE, BIDIRECTIONAL = "FlowCacheChunkwise", "bidirectional (as trained)"
THRESHOLD = {"threshold": 0.1, "warmup_steps": 5, "max_reuse": 8, "signature": "time", "replay": "velocity", "order": 1, "start_percent": 0.0,
             "end_percent": 1.0}  # fmt: skip
Graph = dict[str, dict[str, Any]]
INSIDE = """
import importlib, importlib.util, json, sys, types

path, pack, base = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--fp32-unet", "--base-directory", base]
sys.path[:0] = [path]
import comfy.options

comfy.options.enable_args_parsing()
import torch

torch.set_grad_enabled(False)
torch.set_num_threads(1)
for name, held in (("server", {"PromptServer": types.SimpleNamespace(instance=None)}), ("nodes", {"NODE_CLASS_MAPPINGS": {}})):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(held)
spec = importlib.util.spec_from_file_location("flowcache_pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["flowcache_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["flowcache_pack"])
node = lambda name: importlib.import_module("flowcache_pack.nodes." + name)
"""
"""What begins a program in the host's interpreter: the pack under the name `flowcache_pack`, and no server."""


class Host:
    """A ComfyUI process with this pack alone, in a base folder of its own."""

    def __init__(self, base: Path, pack: Path | None = None, options: Sequence[str] = ()) -> None:
        self.base, self.log = base, base / "host.log"
        for folder in ("custom_nodes", "input", "output", "temp", "user"):
            (base / folder).mkdir(exist_ok=True)
        if not (link := base / "custom_nodes" / "flowcache").is_symlink():
            link.symlink_to(pack or PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        tree, launch = Path(os.environ["COMFYUI_PATH"]).absolute(), os.environ.get("COMFYUI_LAUNCH")
        command = [os.environ["COMFYUI_PYTHON"], *([launch, str(tree)] if launch else [str(tree / "main.py")])]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--cpu", *options, *shlex.split(os.environ.get("COMFYUI_ARGS", ""))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=tree,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            )

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with OPENER.open(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refused:
            with refused:
                return json.loads(refused.read())

    def __enter__(self) -> Host:
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop()

    def _wait(self, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.ask("/queue")
            except OSError:
                time.sleep(0.3)
            else:
                return
        pytest.fail(f"the host did not answer in {seconds} s: {self.log.read_text()[-3000:]}")

    def run(self, graph: Graph, seconds: float = 300) -> dict[str, Any]:
        """Queue a graph and wait -> its entry in the history; a refused graph gives the refusal."""
        answer = self.ask("/prompt", {"prompt": graph})
        if "prompt_id" not in answer:
            return {"refused": answer, "status": {"status_str": "error", "messages": []}}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            if done := self.ask(f"/history/{answer['prompt_id']}").get(answer["prompt_id"]):
                return done  # type: ignore[no-any-return]
            time.sleep(0.1)
        self.ask("/interrupt", {})
        pytest.fail(f"not finished after {seconds} s")

    def until_saved(self, graph: Graph, files: int = 1, seconds: float = 240) -> str:
        """Queues a graph: its id, once so many files of states lie on the disk."""
        running: str = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        end = time.monotonic() + seconds
        while len(list((self.base / "output" / "flowcache_states").glob("*.safetensors"))) < files:
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return running

    def interrupt(self, graph: Graph, after: float) -> None:
        """Interrupts a graph that runs longer than `after` seconds, and unloads all models."""
        running = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        time.sleep(after)
        self.ask("/interrupt", {})
        end = time.monotonic() + 120
        while not (done := self.ask(f"/history/{running}")) and time.monotonic() < end:
            time.sleep(0.2)
        assert "execution_interrupted" in [kind for kind, _ in done[running]["status"]["messages"]]
        self.ask("/free", {"unload_models": True, "free_memory": True})
        time.sleep(2)

    def latents(self, graph: Graph) -> Tensor:
        """The sampled latents of a graph that has to succeed."""
        name = f"t{time.monotonic_ns()}"
        sampler = node(graph, "SamplerCustomAdvanced")
        done = self.run({**graph, "save": {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": name}}})
        assert done["status"]["status_str"] == "success", error_of(done)
        (path,) = (self.base / "output").glob(f"{name}*.latent")
        return load_file(path)["latent_tensor"]

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)


def with_nodes(base: Path, code: str, options: Sequence[str] = ()) -> Host:
    """A host, not yet started, with one more custom node package of this code."""
    package = base / "custom_nodes" / "tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    return Host(base, options=options)


def inside(base: Path, code: str) -> Any:
    """The JSON that `code` prints last, in the host's interpreter with the pack loaded and no server."""
    done = subprocess.run(
        [os.environ["COMFYUI_PYTHON"], "-c", INSIDE + code, os.environ["COMFYUI_PATH"], str(PACK), str(base)],
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def error_of(done: dict[str, Any]) -> str:
    said = [data for kind, data in done["status"]["messages"] if kind == "execution_error"]
    return said[0]["exception_message"] if said else json.dumps(done.get("refused", ""))


def node(graph: Graph, kind: str) -> str:
    """The id of the one node of a kind."""
    (found,) = (key for key, one in graph.items() if one["class_type"] == kind)
    return found


def put(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """The graph with other inputs of one node."""
    out = copy.deepcopy(graph)
    out[node(out, kind)]["inputs"].update(inputs)
    return out


def small(graph: Graph, steps: int = 4, length: float = 9) -> Graph:
    return put(put(graph, "BasicScheduler", steps=steps), "FlowCacheLatent", length=length, unit="frames", width=128, height=128)


def quick(graph: Graph) -> Graph:
    """Any workflow with two steps (MAGI-1: four) and as short as it still makes sense: a film longer than the window stays longer."""
    out, magi = copy.deepcopy(graph), "tiny-magi" in graph[node(graph, "FlowCacheLoadModel")]["inputs"]["model_name"]
    for one in out.values():
        inputs = one["inputs"]
        if one["class_type"] == "BasicScheduler":
            inputs["steps"] = 2
        if one["class_type"] == "FlowCacheScheduler":
            inputs["steps"] = 4
        if one["class_type"] == "FlowCacheLatent":
            inputs.update(length=69 if inputs["unit"] == "seconds" else min(inputs["length"], 48 if magi else 33), unit="frames")
    return out


def after_loader(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """The graph with one more model node between the loader and everything that took its MODEL."""
    out, loader = copy.deepcopy(graph), node(graph, "FlowCacheLoadModel")
    for one in out.values():
        one["inputs"] = {k: ["extra", 0] if v == [loader, 0] else v for k, v in one["inputs"].items()}
    return {**out, "extra": {"class_type": kind, "inputs": {"model": [loader, 0], **inputs}}}


def without_cache(graph: Graph, kind: str = "FlowCacheChunkwise") -> Graph:
    """The graph with the cache node taken out."""
    gone = node(graph, kind)
    source = graph[gone]["inputs"]["model"]
    out = {k: v for k, v in copy.deepcopy(graph).items() if k != gone}
    for one in out.values():
        one["inputs"] = {k: source if v == [gone, 0] else v for k, v in one["inputs"].items()}
    return out


def refused(host: Host, graph: Graph, sentence: str) -> None:
    done = host.run(graph)
    assert done["status"]["status_str"] == "error"
    assert re.search(sentence, error_of(done)), error_of(done)


def said(host: Host, graph: Graph, kind: str) -> str:
    """What a node shows in a run that has to succeed."""
    done = host.run(graph)
    assert done["status"]["status_str"] == "success", error_of(done)
    return "\n".join(done["outputs"][node(graph, kind)]["text"])


@dataclass(frozen=True)
class HostJob(Job):
    """A film at the noise levels of the host's scheduler "simple", whose first is 1."""

    def sigmas(self, bundle: Bundle) -> tuple[float, ...]:
        times = [(1000 - int(i * 1000 / self.steps)) / 1000 for i in range(self.steps)]
        return (*(self.shift * t / (1 + (self.shift - 1) * t) for t in times), 0.0)


def report_of(host: Host, graph: Graph) -> dict[str, Any]:
    """What Cache Report writes as json, in a run that has to succeed."""
    shown = {"class_type": "PreviewAny", "inputs": {"source": [node(graph, "FlowCacheReport"), 1]}}
    done = host.run({**graph, "json": shown})
    assert done["status"]["status_str"] == "success", error_of(done)
    return json.loads(done["outputs"]["json"]["text"][0])  # type: ignore[no-any-return]
