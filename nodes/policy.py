"""Cache Policy: any cache policy by its name, the settings written out. A policy needs nothing here to be among them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flowcache_core.policies import POLICIES
from ..flowcache_core.policies.always import Always
from ..flowcache_core.policies.named import in_words, policy_named
from ..flowcache_core.policies.planned import Planned
from .fit import require_network, require_ours
from .native_kv import require_headroom
from .settings_on_model import POLICY_NODE, policy_node, with_policy
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = POLICY_NODE


class CachePolicyByName(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCachePolicy",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Any cache policy by its name, also one without a node of its own, with its settings written out. Goes between the model "
            "loader and the guider, in place of Chunkwise Cache, or in front of Motion Cache where that can refine it.",
            search_aliases=["flowcache", "cache", "custom policy", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load AR Video Model; Motion Cache, which may refine this node, goes behind it."),
                io.Combo.Input("policy", options=[kind.name for kind in POLICIES], default=Planned.name,
                               tooltip=f"{Always.name}: every step is computed, as without the node. Of the others the node says, when it has run, "
                                       "what they are called and what settings they have."),
                io.String.Input("settings", default="",
                                tooltip="Settings of the policy as name=value, e.g. share=0.3 for planned. Empty: its own."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this policy: for the guider and the scheduler.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model: Any, policy: str, settings: str) -> io.NodeOutput:
        require_headroom(model, NODE)
        host = require_ours(model, NODE)
        if other := policy_node(model.model_options):
            raise ValueError(f"{NODE} after {other} would take its place: bypass one of the two")
        chosen = policy_named(policy, settings)
        require_network(chosen, host)
        text = ui.PreviewText("\n".join(in_words(chosen)))
        return io.NodeOutput(model if chosen == Always() else with_policy(model, chosen, NODE), ui=text)
