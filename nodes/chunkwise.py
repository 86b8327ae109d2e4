"""Chunkwise Cache. Its widgets are read from the policy's own fields, so a default lives in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io, ui

from ..flowcache_core.decision import Setting
from ..flowcache_core.models.published import time_polynomial
from ..flowcache_core.policies.chunkwise import Chunkwise
from ..flowcache_core.policies.foresight import on_rescaling
from ..flowcache_core.policies.motion import Motion
from ..flowcache_core.policies.presets import CUSTOM, PRESETS, describe, preset
from ..flowcache_core.policies.target import Target
from .host_model import policy_of, require_ours, with_policy

NODE = "Chunkwise Cache"
NEWER = ("rescale",)
"""Fields that workflows saved before they existed do without."""
OFF, SHARE, SPEED_UP = "off", "computed share", "speed-up"


def widgets(policy: type) -> list[Any]:
    """One widget per field of a policy that describes itself, with its range, help and place."""
    out: list[Any] = []
    for field in fields(policy):
        rule: Setting | None = field.metadata.get("setting")
        if rule is None:
            continue
        common = {"default": field.default, "tooltip": rule.help, "advanced": rule.advanced, "optional": field.name in NEWER}
        if isinstance(field.default, bool):
            out.append(io.Boolean.Input(field.name, **common))
        elif rule.options:
            out.append(io.Combo.Input(field.name, options=list(rule.options), **common))
        elif isinstance(field.default, int):
            out.append(io.Int.Input(field.name, min=int(rule.low or 0), max=int(rule.high or 1), **common))
        else:
            out.append(io.Float.Input(field.name, min=rule.low, max=rule.high, step=rule.step, round=False, **common))
    return out


class ChunkwiseCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheChunkwise",
            display_name=NODE,
            category="FlowCache",
            description="Every chunk reuses its last prediction while its input has drifted little. Goes between the model loader and the guider.",
            search_aliases=["flowcache", "teacache", "speed up", "cache"],
            inputs=[
                io.Model.Input("model"),
                *widgets(Chunkwise),
                io.Combo.Input("preset", options=[CUSTOM, *PRESETS], default=CUSTOM, optional=True,
                               tooltip="custom uses the widgets above; any other name replaces all of them, and the node says by what."),
                io.Combo.Input("target", options=[OFF, SHARE, SPEED_UP], default=OFF, optional=True,
                               tooltip="Finds the threshold for you: exactly before sampling under signature time, during the run under latent."),
                io.Float.Input("target_share", default=0.5, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
                               tooltip="For target computed share: the share of chunk-steps that the network computes."),
                io.Float.Input("target_speedup", default=2.0, min=1.0, max=20.0, step=0.05, optional=True, advanced=True,
                               tooltip="For target speed-up: one in so many chunk-steps is computed. What every run pays comes on top: "
                                       "commit passes, text, decoding."),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, preset: str = CUSTOM, target: str = OFF, target_share: float = 0.5, target_speedup: float = 2.0,
                **settings: Any) -> io.NodeOutput:  # fmt: skip
        inner = require_ours(model, NODE)
        if isinstance(policy_of(model.model_options), Motion):
            raise ValueError(f"{NODE} after Motion Cache would take its place: put it before Motion Cache, which then refines it")
        policy = rule(preset, settings)
        if target != OFF:
            policy = Target.of(policy, target_share if target == SHARE else 1 / target_speedup)
        said = "\n".join([f"{preset}: {describe(policy)}", *on_rescaling(policy, time_polynomial(inner.adapter()))])
        return io.NodeOutput(with_policy(model, policy), ui=ui.PreviewText(said))


def rule(name: str, settings: dict[str, Any]) -> Chunkwise:
    return Chunkwise(**settings) if name == CUSTOM else preset(name)
