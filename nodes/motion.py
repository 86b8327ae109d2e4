"""Motion Cache, and Refresh Overlay, which lays over the film how often each of its places was computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..flowcache_core.policies.chunkwise import Chunkwise
from ..flowcache_core.policies.motion import PRESETS, Motion, Released
from ..flowcache_core.policies.multirate import COMPARISON, Multirate
from ..flowcache_core.policies.planned import Planned
from ..flowcache_core.policies.protocol import CachePolicy
from ..flowcache_core.policies.target import Target
from ..flowcache_core.show.overlay import overlay
from .chunkwise import widgets
from .fit import require_network, require_ours
from .mailbox import Mailbox
from .native_kv import require_headroom
from .sampler import Report
from .settings_on_model import MOTION_NODE, policy_of, with_policy
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = MOTION_NODE
CUSTOM, PLAN = "custom", "turbo"
REFINES = {
    PLAN: "it spends by token what a plan may spend; set the node in front to a plan with a budget, such as preset balanced",
    CUSTOM: "it refines a threshold, or the share of a plan; set the node in front to one of these",
    **dict.fromkeys(PRESETS, "its published settings take the place of Chunkwise Cache alone; put that there instead"),
}
"""What each preset can refine, and the way out where it is something else that is in front."""


class MotionCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheMotion",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Within a chunk, what changes fast is computed more often than what does not: for budgets so small that whole chunks would "
            "have too few steps. Goes between the model loader, or Chunkwise Cache, and the guider.",
            search_aliases=["motioncache", "flowcache", "token cache", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of Load AR Video Model, or of Chunkwise Cache or Cache Policy, which is then refined."),
                io.Combo.Input("preset", options=[CUSTOM, *PRESETS, PLAN], default=PLAN,
                               tooltip=f"{PLAN}: a plan by token, of {Multirate().share:.0%} of all tokens, or of what a Chunkwise Cache with a "
                               "plan in front may spend. custom: MotionCache's rule with the settings below. The others are its published constants "
                               "and take their place, and that of a Chunkwise Cache in front."),
                *widgets(Motion),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with these settings: for the guider and the scheduler.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model: Any, preset: str, **settings: Any) -> io.NodeOutput:
        require_headroom(model, NODE)
        host = require_ours(model, NODE)
        before = policy_of(model.model_options)
        policy = _policy(preset, settings, before)
        require_network(policy, host)
        unused = f"\n{before.title}, in front, is not used" if before and (preset in PRESETS or isinstance(before, Motion)) else ""
        return io.NodeOutput(with_policy(model, policy, NODE), ui=ui.PreviewText(_summary(policy) + unused))


def _policy(preset: str, settings: dict[str, Any], before: CachePolicy | None) -> Motion | Multirate:
    """The settings of the node on top of the policy in front. Raises ValueError for one that they cannot refine."""
    match preset, before:
        case "turbo", None | Multirate():
            return before or Multirate()
        case "turbo", Planned(exact=None):
            return Multirate(share=before.share, seconds=before.seconds)
        case "custom", None | Chunkwise():
            return replace(Motion(**settings), base=before)
        case "custom", Motion():
            return replace(Motion(**settings), base=before.base)
        case "custom", Planned(exact=None, seconds=0):
            return replace(Motion(**settings), base=Target(share=before.share))
        case published, None | Chunkwise() | Planned() | Motion() | Multirate() if published in PRESETS:
            return PRESETS[published]
    raise ValueError(
        f"{NODE} with preset {preset} cannot refine {before.title}, which is in front of it: {REFINES[preset]}, or bypass one of the two"
    )


def _summary(policy: Motion | Multirate) -> str:
    if isinstance(policy, Multirate):
        spent = f"in {policy.seconds:g} s of the network" if policy.seconds else f"within {policy.share:.0%} of all tokens"
        return f"a plan {spent}; every other step of a chunk computes the {policy.partial:.0%} of its tokens that change fastest; {COMPARISON}"
    base = policy.chunkwise
    goal = f"target {base.share:.0%} of chunk-steps" if isinstance(base, Target) else f"threshold {base.threshold:g}"
    counted = policy.coarse_computed if isinstance(policy, Released) else 0
    until = f"until {counted} steps behind the warm-up are computed" if counted else f"first {policy.coarse:.0%} of the steps"
    coarse = f"{until} by chunk: {goal}, warm-up {base.warmup_steps}"
    return f"{coarse}; then by token: threshold {policy.threshold:g}, weights {policy.alpha:g} to 1 by motion in '{policy.measure}'"


class RefreshOverlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheOverlay",
            display_name="Refresh Overlay",
            category="FlowCache",
            description="Tints a film by how often each place was computed: blue often, orange seldom, where it was replayed instead.",
            search_aliases=["reuse mask", "motion mask"],
            inputs=[
                Report.Input("report", tooltip="The report output of the AR Chunk Sampler that made the film."),
                io.Image.Input("images", tooltip="The decoded film."),
                io.Float.Input("opacity", default=0.5, min=0.0, max=1.0, step=0.05, tooltip="How much of the film the tint covers."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The output of the SamplerCustomAdvanced that made the film: by it the run is found "
                    "that the film is of. Without it, the sampler's latest run counts.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="The tinted film."),
                io.Image.Output(display_name="mask", tooltip="White where every step was computed, black where all were replayed."),
            ],
        )

    @classmethod
    @within_schema
    def execute(cls, report: Mailbox, images: torch.Tensor, opacity: float, latent: dict[str, torch.Tensor] | None = None) -> io.NodeOutput:
        run = report.report if latent is None else report.of(latent["samples"]).report
        if run is None or run.visits is None:
            raise ValueError("this sampler has not run yet: connect images to the film decoded from its latents")
        tinted, mask = overlay(images.cpu().numpy(), run.visits, run.map.shape[1], opacity, run.pixels)
        return io.NodeOutput(torch.from_numpy(tinted), torch.from_numpy(mask))
