"""What is known of a budget before a run begins: how much of the film's history it keeps, and whether it saves anything."""

from __future__ import annotations

from ..sampling.schedule import ChunkSchedule
from .compressor import Budget
from .layout import Reach, capacity


def forecast_history(budget: Budget, schedule: ChunkSchedule, frame_tokens: int, reach: Reach | None = None) -> str:
    """One sentence. `frame_tokens`: tokens of a latent frame; `reach`: how far the network looks back by itself."""
    together = schedule.ar_step == 0
    longest = schedule.span(schedule.given if together else schedule.chunks - 1)[0]
    frames, plain = budget.slots / frame_tokens, budget.dtype == "as computed" and not budget.offload
    if frames < longest:
        kept = f"history is kept to {budget.slots} tokens per layer: {frames:.4g} latent frames of up to {longest}"
        without = capacity(schedule, frame_tokens, reach=reach).total
        if not plain or capacity(schedule, frame_tokens, budget.slots).total < without:
            return kept
        return (
            f"{kept}; it is chosen from the whole film, but the KV cache is no smaller than the {without // frame_tokens} latent frames that the "
            "window holds without a budget: a smaller budget is"
        )
    if together:
        return (
            "the budget saves nothing here: ar_step 0 denoises all chunks together, so none becomes history before the film is finished; "
            "use ar_step 1 or more"
        )
    if not plain:
        return f"all of history is kept: the budget has room for {frames:.4g} latent frames, and it is never longer than {longest}"
    return (
        f"the budget saves nothing here: it has room for {frames:.4g} latent frames, and the history of this film is never longer than {longest}, "
        "so all of it is kept; use a smaller budget"
    )
