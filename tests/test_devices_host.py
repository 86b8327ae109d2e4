"""Devices in a real ComfyUI: two processes on the processor make the film of one, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host import (
    BIDIRECTIONAL,
    NEEDS_HOST,
    PACK,
    Graph,
    Host,
    after_loader,
    error_of,
    inside,
    node,
    put,
    quick,
    refused,
    report_of,
    said,
    small,
    with_nodes,
    without_cache,
)

pytestmark = NEEDS_HOST
PROCESSES, OPTIONS = "processes on the processor", ("--fp32-unet",)
NEAR = 1e-5
SHARING = "2 devices share this film"
NODE = "FlowCacheDevices"
ALONE = "this MODEL runs on cpu, not on a graphics card, so this node changes nothing: the film is made on one device"
LORA = """
import comfy.weight_adapter, torch

class PatchOneWeight:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "tests"

    def patch(self, model):
        patched = model.clone()
        patched.add_patches({"diffusion_model.head.head.bias": ("diff", (torch.ones(64),))})
        return (patched,)

NODE_CLASS_MAPPINGS = {"PatchOneWeight": PatchOneWeight}
"""


CARDS = """
import comfy.model_management as host, comfy.samplers
from comfy_extras.nodes_multigpu import SelectModelDeviceNode

torch.cuda.device_count, torch.cuda.current_device = lambda: 3, lambda: 0
host.get_all_torch_devices = lambda exclude_current=False: [torch.device("cuda", k) for k in range(3)]
host.get_torch_device, host.should_use_bf16, host.should_use_fp16 = lambda: torch.device("cuda", 0), lambda *a, **k: True, lambda *a, **k: True
host.unload_model_and_clones = lambda *of: None
devices, settings, sharing = node("devices").Devices, node("settings_on_model"), node("sharing")
bare, text, _ = node("load_model").LoadARVideoModel.execute(model_name="tiny-skyreels (bundled)").result

def shown(model, **inputs):
    try:
        out = devices.execute(model=model, **inputs)
    except ValueError as error:
        return str(error)
    return list(settings.devices_of(out.result[0].model_options)) or out.ui["text"][0]

def refusal(model):
    guider = comfy.samplers.CFGGuider(model)
    try:
        with sharing.shared(None, guider, model.model, None):
            pass
    except ValueError as error:
        return str(error)

select = lambda model, device: SelectModelDeviceNode.execute(model, device).result[0]
second, processor = select(bare, "gpu:1"), bare.clone()
processor.load_device = torch.device("cpu")
print(json.dumps({
    "where": [str(one.load_device) for one in (bare, second)],
    "first card": shown(bare, devices=2), "second card": shown(second, devices=2), "every card": shown(second), "too many": shown(second, devices=4),
    "processor": shown(processor, devices=2), "processor alone": shown(processor),
    "processes": shown(processor, where="processes on the processor"), "not of a card": shown(second, where="processes on the processor"),
    "moved": refusal(select(devices.execute(model=bare, devices=2).result[0], "gpu:1")),
}))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with with_nodes(tmp_path_factory.mktemp("comfy"), LORA, OPTIONS) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    """Two chunks of the bundled model, with the preset balanced."""
    whole = small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), steps=6, length=21)
    return put(put(whole, "FlowCacheLatent", width=64, height=64), "RandomNoise", noise_seed=7)


def on_two(graph: Graph, **inputs: Any) -> Graph:
    return after_loader(graph, NODE, **{"devices": 2, "where": PROCESSES, **inputs})


def deviation(mine: Tensor, reference: Tensor) -> float:
    return float((mine - reference).abs().max() / reference.abs().max())


def of(host: Host) -> list[int]:
    """Processes that the host has started, zombies too."""
    parent, found = f"\nPPid:\t{host.process.pid}\n", []
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if parent in path.read_text():
                found.append(int(path.parent.name))
    return found


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


def begun(host: Host, graph: Graph, lines: int) -> str:
    """A graph that runs for long: its id, once its film goes on."""
    running: str = host.ask("/prompt", {"prompt": graph})["prompt_id"]
    end = time.monotonic() + 120
    while host.log.read_text().count(SHARING) <= lines and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(2)
    return running


def ended(host: Host, running: str) -> tuple[dict[str, Any], float]:
    """What became of it, and after how many seconds."""
    began = time.monotonic()
    while not (done := host.ask(f"/history/{running}")) and time.monotonic() < began + 60:
        time.sleep(0.1)
    return done[running], time.monotonic() - began


def long(graph: Graph) -> Graph:
    return on_two(put(put(graph, "BasicScheduler", steps=400), "FlowCacheLatent", length=57))


def test_two_devices_make_the_film_of_one_in_the_same_process(host: Host, graph: Graph) -> None:
    """The same film twice, another size, another guider, other settings."""
    resized = put(put(graph, "FlowCacheLatent", width=96, length=33), "RandomNoise", noise_seed=8)
    two_films = put(graph, "FlowCacheLatent", batch_size=2)
    one_text = put(graph, "CFGGuider", cfg=1.0)
    settings = {"policy": "importance-redundancy", "budget": 2.0, "unit": "chunks", "dtype": "as computed"}
    settings |= {"sink": 1, "recent": 0, "granularity": "token", "offload": False, "soft": 0.0}
    bounded = json.loads(json.dumps(after_loader(graph, "FlowCacheKVCompressor", **settings)).replace('"extra"', '"kv"'))
    known: list[int] = []
    for name, each in {"first": graph, "resized": resized, "one text": one_text, "bounded": bounded, "two films": two_films}.items():
        assert deviation(host.latents(on_two(each)), host.latents(each)) <= NEAR, name
        assert known in ([], of(host)), name
        known = of(host)
        assert len(known) == 1
    again = host.latents(put(on_two(graph), "RandomNoise", noise_seed=9))
    assert deviation(again, host.latents(put(graph, "RandomNoise", noise_seed=9))) <= NEAR
    assert of(host) == known


def test_a_causal_film_whose_prompt_changes_is_that_of_one_device(host: Host) -> None:
    """ComfyUI's own class of network on this side, ours on the other; history is evaluated anew with the new prompt."""
    whole = json.loads((PACK / "workflows" / "api" / "causal_prompt_switch.json").read_text())
    ours = {"solver": "auto", "ar_step": -1, "chunk_frames": 0, "window": 0, "fps": "auto"}
    whole[node(whole, "SamplerARVideo")] = {"class_type": "FlowCacheSampler", "inputs": ours}
    graph = put(quick(whole), "FlowCacheLatent", width=64, height=64)
    assert deviation(host.latents(on_two(graph)), host.latents(graph)) <= NEAR


def test_a_film_of_magi_is_that_of_one_device(host: Host) -> None:
    """Its devices share the branches that the run makes itself."""
    whole = json.loads((PACK / "workflows" / "api" / "magi_text_to_video.json").read_text())
    graph = put(quick(whole), "FlowCacheLatent", width=64, height=64)
    assert deviation(host.latents(on_two(graph)), host.latents(graph)) <= NEAR


def test_the_report_names_the_mesh_and_what_came(host: Host, graph: Graph) -> None:
    mine = put(on_two(graph), "RandomNoise", noise_seed=10)
    devices = report_of(host, mine)["devices"]
    assert devices["branches"] * devices["heads"] == 2
    assert devices["bytes"] > 0
    assert devices["expected_ratio"] > 0
    text = said(host, put(mine, "RandomNoise", noise_seed=11), "FlowCacheReport")
    assert re.search(r"2 devices, \d for the branches of guidance x \d for heads: an evaluation .* as fast as one device", text)
    assert re.search(r"this device of 2 sent \S+ MiB in \d+ collectives", text)
    shown = said(host, on_two(graph, devices=0), NODE)
    assert shown.startswith("films of this MODEL are made by 2 devices: cpu, cpu\n")


def test_an_interrupt_ends_the_film_on_all_devices_and_the_next_one_is_right(host: Host, graph: Graph) -> None:
    reference, mine = host.latents(graph), on_two(graph)
    host.latents(mine)
    before = of(host)
    running = begun(host, long(graph), host.log.read_text().count(SHARING))
    host.ask("/interrupt", {})
    done, seconds = ended(host, running)
    assert "execution_interrupted" in [kind for kind, _ in done["status"]["messages"]]
    assert seconds < 15
    assert deviation(host.latents(put(mine, "RandomNoise", noise_seed=7)), reference) <= NEAR
    assert of(host) == before


def test_a_killed_process_is_a_sentence_and_the_next_film_is_right(host: Host, graph: Graph) -> None:
    host.latents(on_two(graph))
    running = begun(host, long(put(graph, "RandomNoise", noise_seed=13)), host.log.read_text().count(SHARING))
    (pid,) = of(host)
    os.kill(pid, signal.SIGKILL)
    done, seconds = ended(host, running)
    assert re.search(r"the process of device 2 of 2 has ended \(status -9\): all devices .* the next film starts new processes", error_of(done))
    assert seconds < 15
    assert gone(pid)
    other = put(graph, "RandomNoise", noise_seed=14)
    assert deviation(host.latents(on_two(other)), host.latents(other)) <= NEAR


def saved(graph: Graph, seed: int) -> tuple[Graph, Graph]:
    """A longer film on two devices, and the same with a state after every chunk."""
    whole = on_two(put(put(graph, "RandomNoise", noise_seed=seed), "FlowCacheLatent", length=57))
    return whole, put(whole, "FlowCacheSampler", save_every=1)


def goes_on(host: Host, graph: Graph, whole: Tensor) -> None:
    """A film that was stopped, bit for bit; it leaves nothing behind."""
    assert torch.equal(host.latents(graph), whole)
    assert [note for note in report_of(host, graph)["notes"] if re.match(r"goes on from a saved state: \d of 5 chunks were finished", note)]
    assert not (host.base / "output" / "flowcache_states").exists()


def test_an_interrupted_film_goes_on_when_it_is_queued_again(host: Host, graph: Graph) -> None:
    plain, mine = saved(graph, 18)
    whole = host.latents(plain)
    before, running = of(host), host.until_saved(mine, 2)
    host.ask("/interrupt", {})
    done, _ = ended(host, running)
    assert "execution_interrupted" in [kind for kind, _ in done["status"]["messages"]]
    names = sorted(path.name for path in (host.base / "output" / "flowcache_states").iterdir())
    assert [name.split(".", 1)[1] for name in names] == ["0.safetensors", "1.safetensors"]
    goes_on(host, mine, whole)
    assert of(host) == before


def test_a_film_whose_process_was_killed_goes_on_when_it_is_queued_again(host: Host, graph: Graph) -> None:
    plain, mine = saved(graph, 19)
    whole, running = host.latents(plain), host.until_saved(mine, 2)
    os.kill(of(host)[0], signal.SIGKILL)
    assert "the process of device 2 of 2 has ended" in error_of(ended(host, running)[0])
    goes_on(host, mine, whole)


def test_models_that_are_unloaded_give_back_what_the_processes_hold(host: Host, graph: Graph) -> None:
    host.latents(put(on_two(graph), "RandomNoise", noise_seed=15))
    (pid,) = of(host)
    host.ask("/free", {"unload_models": True})
    assert gone(pid)
    other = put(graph, "RandomNoise", noise_seed=16)
    assert deviation(host.latents(on_two(other)), host.latents(other)) <= NEAR


def test_without_a_second_device_nothing_changes(host: Host, graph: Graph) -> None:
    alone = on_two(graph, devices=0, where="graphics cards")
    assert said(host, alone, NODE) == ALONE
    assert torch.equal(host.latents(alone), host.latents(graph))
    assert "devices is 1, so this node changes nothing" in said(host, on_two(graph, devices=1), NODE)


def test_the_first_device_is_that_of_the_model(tmp_path: Path) -> None:
    """Whichever the host runs on: Select Model Device moves one MODEL to another card. The cards are not there: nothing is computed."""
    found = inside(tmp_path, CARDS)
    assert found["where"] == ["cuda:0", "cuda:1"]
    assert found["first card"] == ["cuda:0", "cuda:1"]
    assert found["second card"] == ["cuda:1", "cuda:0"]
    assert found["every card"] == ["cuda:1", "cuda:0", "cuda:2"]
    assert "4 graphics cards were asked for, and ComfyUI sees 3" in found["too many"]
    assert "2 graphics cards were asked for, and this MODEL runs on cpu" in found["processor"]
    assert found["processor alone"] == ALONE
    assert found["processes"] == ["cpu", "cpu"]
    assert "this MODEL runs on cuda:1, a graphics card" in found["not of a card"]
    assert "Devices was given this MODEL on cuda:0, and it was moved to cuda:1 behind it: put the node " in found["moved"]


def test_what_cannot_be_shared_is_refused_before_anything_is_started(host: Host, graph: Graph) -> None:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    patched = {"patched": {"class_type": "PatchOneWeight", "inputs": {"model": [node(graph, "FlowCacheLoadModel"), 0]}}}
    behind_patch = on_two(graph)
    behind_patch["extra"]["inputs"]["model"] = ["patched", 0]
    cases = {
        "2 graphics cards were asked for, and this MODEL runs on cpu": on_two(graph, where="graphics cards"),
        "64 devices cannot share this film: its network has": on_two(graph, devices=64),
        "load the network from its file, and this MODEL has a LoRA or another patch of weights: bypass Devices": {**behind_patch, **patched},
        "every frame of a section sees every other": put(on_two(graph), "FlowCacheSampler", attention=BIDIRECTIONAL),
        "Devices works with the AR Chunk Sampler": {
            **put(on_two(without_cache(graph)), "SamplerCustomAdvanced", sampler=["stock", 0]),
            "stock": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        },
    }
    for sentence, each in cases.items():
        refused(host, each, sentence)
    assert of(host) == []


def test_no_process_is_left_after_the_host_was_killed_and_the_film_goes_on_in_the_next(host: Host, graph: Graph) -> None:
    """The last test of this file: that host is gone after it."""
    plain, mine = saved(graph, 17)
    whole = host.latents(plain)
    host.until_saved(mine, 2)
    (pid,) = of(host)
    host.process.kill()
    host.process.wait()
    assert gone(pid, 10)
    with Host(host.base, options=OPTIONS) as other:
        goes_on(other, mine, whole)
