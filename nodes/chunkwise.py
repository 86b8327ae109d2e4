"""Chunkwise Cache. Its widgets are read from the policy's own fields, so a default lives in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..flowcache_core.decision import Setting
from ..flowcache_core.policies.chunkwise import Chunkwise
from ..flowcache_core.policies.motion import Motion
from .host_model import OPTIONS, policy_of, require_ours


def widgets(policy: type) -> list[Any]:
    """One widget per field of a policy that describes itself, with its range, help and place."""
    out: list[Any] = []
    for field in fields(policy):
        rule: Setting | None = field.metadata.get("setting")
        if rule is None:
            continue
        common = {"default": field.default, "tooltip": rule.help, "advanced": rule.advanced}
        if rule.options:
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
            display_name="Chunkwise Cache",
            category="FlowCache",
            description="Every chunk reuses its last prediction while its input has drifted little. Goes between the model loader and the guider.",
            search_aliases=["flowcache", "teacache", "speed up", "cache"],
            inputs=[io.Model.Input("model"), *widgets(Chunkwise)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        require_ours(model, "Chunkwise Cache")
        if isinstance(policy_of(model.model_options), Motion):
            raise ValueError("Chunkwise Cache after Motion Cache would take its place: put it before Motion Cache, which then refines it")
        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        patched.model_options["transformer_options"] = {**options, OPTIONS: {"policy": Chunkwise(**settings)}}
        return io.NodeOutput(patched)
