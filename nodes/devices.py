"""Devices."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..flowcache_core.ranks.workers import IDLE
from .fit import require_ours
from .settings_on_model import DEVICES_NODE, with_devices
from .sharing import give_back_with, named, require_reproducible
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = DEVICES_NODE
CARDS, PROCESSES = "graphics cards", "processes on the processor"
MOST = 64
TWO = 2
"""Processes on the processor where none are named."""


class Devices(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheDevices",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Makes each film on several devices at once: they share the texts of guidance, and tokens and heads of every chunk. "
            "Processes beside ComfyUI hold the network on the other devices. Goes between the model loader and the guider.",
            search_aliases=["flowcache", "multi gpu", "multigpu", "distributed", "parallel", "ulysses", "sequence parallel", "xdit", "raylight"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load AR Video Model, before or behind the cache nodes; without a LoRA."),
                io.Int.Input("devices", default=0, min=0, max=MOST,
                             tooltip="How many devices share a film, that of ComfyUI among them. 0: all graphics cards of this machine; two "
                                     "processes on the processor. 1: as if the node were bypassed."),
                io.Combo.Input("where", options=[CARDS, PROCESSES], default=CARDS,
                               tooltip="Graphics cards: a process for each other card. Processes on the processor: where ComfyUI runs on the "
                                       "processor; they share its cores, so this is for trying the node out, and no film is made sooner."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this setting: for the guider and the scheduler, or for a cache node.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model: Any, devices: int = 0, where: str = CARDS) -> io.NodeOutput:
        host = require_ours(model, NODE)
        chosen = (processes if where == PROCESSES else cards)(devices, model.load_device)
        if len(chosen) == 1:
            return io.NodeOutput(model, ui=ui.PreviewText(_alone(devices, model.load_device)))
        require_reproducible(model, host)
        return io.NodeOutput(give_back_with(with_devices(model, chosen)), ui=ui.PreviewText(_summary(chosen)))


def cards(devices: int, mine: torch.device) -> tuple[str, ...]:
    """Graphics cards by rank, that of the model first (`mine`); the model's device alone where there is no other. Raises ValueError for more than
    there are."""
    first = named(mine)
    if mine.type != "cuda":
        if devices > 1:
            raise ValueError(
                f"{NODE}: {devices} graphics cards were asked for, and this MODEL runs on {first}: set devices to 1, or where to {PROCESSES}"
            )
        return (first,)
    every = [first, *(card for card in map("cuda:{}".format, range(torch.cuda.device_count())) if card != first)]
    if devices > len(every):
        raise ValueError(f"{NODE}: {devices} graphics cards were asked for, and ComfyUI sees {len(every)}: set devices to {len(every)} or 0")
    return tuple(every[: devices or len(every)])


def processes(devices: int, mine: torch.device) -> tuple[str, ...]:
    """The processor, once for each process. Raises ValueError where the model is on a card."""
    if mine.type != "cpu":
        raise ValueError(
            f"{NODE}: this MODEL runs on {named(mine)}, a graphics card, which does not share a film with processes on the processor: set where to "
            f"{CARDS}"
        )
    return ("cpu",) * (devices or TWO)


def _alone(devices: int, mine: torch.device) -> str:
    no_other = "ComfyUI sees no second graphics card" if mine.type == "cuda" else f"this MODEL runs on {named(mine)}, not on a graphics card"
    why = "devices is 1" if devices == 1 else no_other
    return f"{why}, so this node changes nothing: the film is made on one device"


def _summary(chosen: tuple[str, ...]) -> str:
    others = len(chosen) - 1
    starts = "a process" if others == 1 else f"{others} processes"
    return "\n".join([
        f"films of this MODEL are made by {len(chosen)} devices: {', '.join(chosen)}",
        f"the first film starts {starts} beside ComfyUI, with the network in {'it' if others == 1 else 'each'}",
        f"{'it ends' if others == 1 else 'they end'} with ComfyUI, when models are unloaded, or after {IDLE / 60:g} minutes without a film",
    ])  # fmt: skip
