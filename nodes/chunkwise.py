"""Chunkwise Cache. Its widgets are read from the policy's own fields, so a default lives in one place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..flowcache_core.models.adapter import TimeSignature
from ..flowcache_core.policies.chunkwise import Chunkwise
from ..flowcache_core.policies.forecast import on_rescaling
from ..flowcache_core.policies.planned import Planned
from ..flowcache_core.policies.presets import CUSTOM, MAGI_RULES, PLANS, PRESETS, describe, on_signature, preset
from ..flowcache_core.policies.target import Target
from ..flowcache_core.sampling.plan import read_plan
from ..flowcache_core.settings import described
from .fit import require_ours
from .host_model import HostModel
from .native_kv import require_headroom
from .settings_on_model import CHUNKWISE_NODE, MOTION_NODE, policy_node, with_policy
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = CHUNKWISE_NODE
DEFAULT = "balanced"
"""Of a new node. A saved workflow that names no preset was made before there were any, and means custom."""
NEWER = ("rescale", "positions")
"""Fields that workflows saved before they existed do without."""
OFF, SHARE, SPEED_UP, SECONDS = "off", "computed share", "speed-up", "seconds"


def widgets(policy: type) -> list[Any]:
    """One widget per field of a policy that describes itself, with its range, help and place."""
    out: list[Any] = []
    for name, rule in described(policy).items():
        default = policy.__dataclass_fields__[name].default
        common = {"default": default, "tooltip": rule.help, "advanced": rule.advanced, "optional": name in NEWER}
        if isinstance(default, bool):
            out.append(io.Boolean.Input(name, **common))
        elif rule.options:
            out.append(io.Combo.Input(name, options=list(rule.options), **common))
        elif isinstance(default, int):
            out.append(io.Int.Input(name, min=int(rule.low or 0), max=int(rule.high or 1), **common))
        else:
            out.append(io.Float.Input(name, min=rule.low, max=rule.high, step=rule.step, round=False, **common))
    return out


class ChunkwiseCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheChunkwise",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Computes a part of every chunk's steps: by a plan that spends a budget before the run and integrates over what it skips, "
            "or by a threshold below which a chunk reuses its last prediction. Goes between the model loader and the guider.",
            search_aliases=["flowcache", "teacache", "speed up", "cache"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load AR Video Model; Motion Cache, which refines this node, goes behind it."),
                *widgets(Chunkwise),
                io.Combo.Input("preset", options=[CUSTOM, *PRESETS, *MAGI_RULES], default=DEFAULT, optional=True,
                               tooltip=f"{_listed()} of all tokens are computed, by a plan, at any number of steps and with either attention. "
                                       "flowcache-...: the published rules, for SkyReels-V2 and for MAGI-1. "
                                       "These leave the threshold rule unused; custom shows its widgets."),
                io.Combo.Input("target", options=[OFF, SHARE, SPEED_UP, SECONDS], default=OFF, optional=True,
                               tooltip="A budget of your own. With a preset that plans, the plan spends it; with custom or flowcache-... the "
                                       "threshold is found for it: exactly before sampling under signature time, during the run under latent."),
                io.Float.Input("target_share", default=0.5, min=0.01, max=1.0, step=0.01, optional=True,
                               tooltip="For target computed share: the share that the network computes, of all tokens by a plan, of chunk-steps by "
                                       "a threshold."),
                io.Float.Input("target_speedup", default=2.0, min=1.0, max=20.0, step=0.05, optional=True,
                               tooltip="For target speed-up: one in so many tokens is computed, clean passes counted; by a threshold one in so many "
                                       "chunk-steps. Text and decoding come on top."),
                io.Float.Input("target_seconds", default=60.0, min=0.1, max=1e6, step=1.0, round=False, optional=True,
                               tooltip="For target seconds: what the network may take in all on this machine. It is timed when the run begins. "
                                       "Text, decoding and loading come on top."),
                io.String.Input("plan", default="", multiline=True, optional=True, advanced=True,
                                tooltip="A plan to follow as it is, in place of preset and target: the json of Cache Report, whole or its part "
                                        "\"plan\". It belongs to a length, a number of steps, ar_step and attention. Empty: none."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with these settings: for the guider and the scheduler.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model: Any, preset: str = CUSTOM, target: str = OFF, target_share: float = 0.5, target_speedup: float = 2.0,
                target_seconds: float = 60.0, plan: str = "", **settings: Any) -> io.NodeOutput:  # fmt: skip
        require_headroom(model, NODE)
        inner = require_ours(model, NODE)
        if (other := policy_node(model.model_options)) not in ("", NODE):
            way_out = f"put it before {MOTION_NODE}, which then refines it" if other == MOTION_NODE else "bypass one of the two"
            raise ValueError(f"{NODE} after {other} would take its place: {way_out}")
        if plan.strip():
            if target != OFF:
                raise ValueError(f"{NODE} was given a plan and target {target}, which contradict each other: empty plan, or set target to {OFF}")
            policy: Planned | Chunkwise = Planned(exact=read_plan(plan))
        else:
            _require_own_rule(preset, inner)
            policy = rule(preset, settings)
            if target != OFF:
                policy = budgeted(policy, preset, target, {SHARE: target_share, SPEED_UP: 1 / target_speedup, SECONDS: target_seconds}[target])
        lines = [f"{'plan' if plan.strip() else preset}: {describe(policy)}"]
        if other == NODE:
            lines.append(f"the {NODE} in front is not used")
        if isinstance(policy, Chunkwise):
            adapter = inner.adapter()
            polynomial = adapter.polynomial if isinstance(adapter, TimeSignature) else ()
            lines += [*on_signature(policy), *on_rescaling(policy, polynomial)]
        return io.NodeOutput(with_policy(model, policy, NODE), ui=ui.PreviewText("\n".join(lines)))


def _require_own_rule(name: str, host: HostModel) -> None:
    """Raises ValueError for thresholds that were published for another kind of model; those of the time signature say so themselves."""
    if name in MAGI_RULES and isinstance(host.adapter(), TimeSignature):
        plans, title = ", ".join(PLANS), host.family.title
        raise ValueError(f"{NODE}: preset {name} has thresholds for MAGI-1, and the model is {title}: use {plans}, flowcache-slow or flowcache-fast")


def rule(name: str, settings: dict[str, Any]) -> Planned | Chunkwise:
    return Chunkwise(**settings) if name == CUSTOM else preset(name)


def budgeted(policy: Planned | Chunkwise, name: str, target: str, amount: float) -> Planned | Chunkwise:
    """The policy with another budget. Raises ValueError for seconds under a threshold."""
    if isinstance(policy, Planned):
        return replace(policy, seconds=amount) if target == SECONDS else replace(policy, share=amount)
    if target == SECONDS:
        raise ValueError(
            f"{NODE}: a budget in seconds is spent by a plan, but preset {name} decides by threshold: set preset to one of {', '.join(PLANS)}, "
            f"or target to {SHARE} or {SPEED_UP}"
        )
    return Target.of(policy, amount)


def _listed() -> str:
    *others, final = [f"{name} {plan.share:.0%}" for name, plan in PLANS.items()]
    return f"{', '.join(others)} and {final}"
