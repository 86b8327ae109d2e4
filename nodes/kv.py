"""KV Compressor. Its widgets are read from the fields of the settings, its policies from their tuple."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..flowcache_core.kv.compressor import Compressor
from ..flowcache_core.kv.named import policy_named
from ..flowcache_core.kv.policy import SamplingKVPolicy, fitted
from ..flowcache_core.kv.scores import KV_POLICIES
from ..flowcache_core.kv.scores.even import Even
from .chunkwise import widgets
from .fit import require_ours
from .native_kv import NATIVE, is_native, network_of, planned, with_native
from .settings_on_model import KV_NODE, compressor_of, with_compressor
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = KV_NODE
DEFAULT = Even.name
HEADS = "salience"
"""Folder of models/ for salience heads."""
BUNDLED = "of the bundled model"
folder_paths.add_model_folder_path(HEADS, str(Path(folder_paths.models_dir, HEADS)))
EVERY, NO_PASS = "every chunk", "none"
NOISY = "clean passes are left out: later chunks look back on keys and values of the last noisy step, on which these models were not trained"
WHOLE = {"token": "token by token", "frame": "whole latent frames at a time", "chunk": "whole chunks at a time"}


def _inputs() -> list[Any]:
    """Budget, unit, policy and dtype in sight; then what is folded away, the newest last."""
    shown, (*folded, positions) = ([one for one in widgets(Compressor) if bool(one.advanced) is away] for away in (False, True))
    policy = io.Combo.Input("policy", options=[kind.name for kind in KV_POLICIES], default=DEFAULT,
                            tooltip="By which score history is kept once the budget is full. The node's help says what each looks at.")  # fmt: skip
    heads = [name for name in folder_paths.get_filename_list(HEADS) if name.endswith(".safetensors")]
    more = [
        io.String.Input("policy_settings", default="", optional=True, advanced=True,
                        tooltip="Settings of the policy as name=value, e.g. lam=0.5 queries=chunk for importance-redundancy. Empty: its own. "
                                "The node's help lists them."),
        io.Combo.Input("salience_head", options=[BUNDLED, *heads], default=BUNDLED, optional=True, advanced=True,
                       tooltip="For policy salience: the head that was trained for the model, a safetensors file in models/salience."),
        io.Combo.Input("clean_pass", options=[EVERY, NO_PASS], default=EVERY, optional=True, advanced=True,
                       tooltip="For ComfyUI's own causal models. every chunk: a finished chunk is evaluated once more, clean, for later ones to look "
                               "back on; the last one is spared it, which changes nothing. none: all are, which makes another film: at 4 steps one "
                               "evaluation in 5 is saved, and later chunks look back on the last noisy step. The help page has what that "
                               "cost tiny-causal."),
    ]  # fmt: skip
    return [*shown[:2], policy, *shown[2:], *folded, *more, positions]


class KVCompressor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheKVCompressor",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Keeps the history of a film, its cached keys and values, within a budget, whatever the film's length. Goes between the "
            "model loader and the guider, before or behind the cache nodes. Works with ComfyUI's own causal models and Sampler AR Video too.",
            search_aliases=["kv cache", "flowcache", "long video", "memory", "eviction", "self-forcing", "causal-forcing"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL of Load AR Video Model, before or behind the cache nodes; or of any loader, where "
                    "it is a causal one of ComfyUI's own (Self-Forcing, Causal-Forcing).",
                ),
                *_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with this budget: for the guider and the scheduler, or for a cache node.")],
        )

    @classmethod
    @within_schema
    def execute(cls, model: Any, policy: str, policy_settings: str = "", salience_head: str = BUNDLED, clean_pass: str = EVERY,
                **settings: Any) -> io.NodeOutput:  # fmt: skip
        native = is_native(model)
        adapter = network_of(model) if native else require_ours(model, NODE, NATIVE).adapter()
        head = "" if salience_head == BUNDLED else folder_paths.get_full_path_or_raise(HEADS, salience_head)
        score = policy_named(policy, policy_settings, head)
        fitted(score, adapter)
        compressor = Compressor(score, **settings)
        text = _summary(compressor, policy_settings.strip())
        if compressor_of(model.model_options):
            text += f"\nthe {NODE} in front is not used"
        if native:
            lines = [text, *([] if clean_pass == EVERY else [NOISY]), *planned(model, compressor)]
            return io.NodeOutput(with_native(model, compressor, clean_pass == EVERY), ui=ui.PreviewText("\n".join(lines)))
        if clean_pass != EVERY:
            raise ValueError(f"{NODE}: clean_pass {clean_pass} is for ComfyUI's own causal models under Sampler AR Video: set it to {EVERY}")
        return io.NodeOutput(with_compressor(model, compressor), ui=ui.PreviewText(text))


def _summary(compressor: Compressor, settings: str) -> str:
    budget, sink, recent = compressor.budget, compressor.sink, compressor.recent
    unit = "chunk" if compressor.unit == "chunks" and budget == 1 else compressor.unit
    first = f"the film's first {_frames(sink)} and " if sink else ""
    latest = f"the latest {_frames(recent)} of history" if recent else "the latest chunk of history"
    where = "in the computer's memory, a layer at a time on the GPU" if compressor.offload else "where the model runs"
    by = f"{compressor.policy.name} ({settings})" if settings else compressor.policy.name
    return "\n".join([
        f"history is kept to {budget:g} {unit}; what goes is chosen by {by}, {WHOLE[compressor.granularity]}",
        *([f"what is kept of the rest counts for what went, each for up to {compressor.policy.stands_for:g}"]
          if isinstance(compressor.policy, SamplingKVPolicy) and compressor.policy.stands_for > 1 else []),
        f"{first}{latest} always {'stay' if sink or recent > 1 else 'stays'}; chunks that are being denoised come on top",
        *(["what is older than the trained window counts as lying as far back as it does"] if compressor.positions == "as they are" else []),
        *([f"{compressor.soft:.0%} of the budget holds means of what is given up"] if compressor.soft else []),
        f"keys and values are stored {'as computed' if compressor.dtype == 'as computed' else f'in {compressor.dtype}'}, {where}",
    ])  # fmt: skip


def _frames(count: int) -> str:
    return "latent frame" if count == 1 else f"{count} latent frames"
