"""Which texts a guider evaluates, and how it guides a model whose guidance is inside: with one text, whatever else it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ..flowcache_core.models.family import Family
from .other_nodes import blocks_of, changes_guidance
from .texts import FROM

PROMPT, OTHER = "positive", "negative"
"""Names of a guider's texts."""
TIMED = ("timestep_start", "timestep_end", "start_percent", "end_percent")
"""Keys of a conditioning that counts at some steps alone."""
PLACED = ("hooks", "area", "mask", "control", "gligen", "strength")
"""Keys of one that changes the model, counts in a part of the picture, or by a part."""
CALC = "sampler_calc_cond_batch_function"
"""Key in model_options of what evaluates the texts of a guider."""


def conds_of(guider: Any, family: Family | None = None) -> list[dict[str, Any]]:
    """The texts of the branches that the guider evaluates, as far as that can be seen before a run; with guidance inside, the prompt's.

    Raises ValueError for a guider with more texts than a model of that kind can be guided by.
    """
    if family is not None and family.guidance.inside:
        return _prompts(guider, family)
    options = guider.model_options
    changes = options.get("disable_cfg1_optimization") or comfy.patcher_extension.get_all_wrappers(
        comfy.patcher_extension.WrappersMP.PREDICT_NOISE, options, is_model_options=True
    )
    alone = getattr(guider, "cfg", None) == 1 and "middle" not in guider.conds and not changes
    return [one for name, many in guider.conds.items() if not (alone and name == OTHER) for one in many]


def _prompts(guider: Any, family: Family) -> list[dict[str, Any]]:
    if more := [name for name in guider.conds if name not in (PROMPT, OTHER)]:
        raise ValueError(
            f"{family.title} is guided inside the run, by the prompt alone, and {type(guider).__name__} has a text {more[0]!r} too: use CFGGuider or "
            "BasicGuider"
        )
    return list(guider.conds.get(PROMPT, ()))


def evaluates_alike(guider: Any) -> bool:
    """Whether it does the same at every step with whatever latents it is given, and with one text a branch: then chunks can be evaluated together."""
    patcher, options = guider.model_patcher, guider.model_options
    usual = type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise and not changes_guidance(patcher, options)
    texts = [one for many in guider.conds.values() for one in many]
    plain = not any(one.get(key) is not None for one in texts for key in (*TIMED, *PLACED, FROM))
    return usual and plain and not blocks_of(options.get("transformer_options", {}))


def evaluates_every_text(guider: Any) -> bool:
    """Whether its texts are evaluated all at every step, so that devices may have texts of their own."""
    plain = type(guider) is comfy.samplers.CFGGuider and not changes_guidance(guider.model_patcher, guider.model_options)
    texts = [one for many in guider.conds.values() for one in many]
    return plain and not any(one.get(key) is not None for one in texts for key in (*TIMED, "hooks"))


def scale_of(guider: Any, family: Family) -> float:
    """CFG. Raises ValueError for one that would change nothing."""
    scale = float(getattr(guider, "cfg", 1.0))
    if family.guidance.inside and family.published.scale is None and scale != 1:
        raise ValueError(f"guidance is trained into {family.title}, and cfg {scale:g} would change nothing: set cfg to 1, or use BasicGuider")
    return scale


def unread(guider: Any, family: Family) -> Iterator[str]:
    """What of a guider's settings has no effect on a model that is guided inside, in sentences for the log."""
    if not family.guidance.inside:
        return
    if guider.conds.get(OTHER):
        yield f"{family.title} is guided inside the run by its prompt alone: the negative prompt is not read"
    if family.published.scale is not None and scale_of(guider, family) == 1:
        yield f"cfg 1 leaves the prompt with little weight: {family.title} was published with {family.published.scale:g}, which CFGGuider sets"


def alone(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """What a guider is called with, so that it evaluates the prompt alone: whatever its cfg, what comes out is what the model has guided."""
    return {**extra_args, "model_options": {**extra_args["model_options"], CALC: _prompt_alone}}


def _prompt_alone(args: Mapping[str, Any]) -> list[torch.Tensor]:
    (out,) = comfy.samplers.calc_cond_batch(args["model"], args["conds"][:1], args["input"], args["sigma"], args["model_options"])
    return [out] * len(args["conds"])
