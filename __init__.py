"""FlowCache for ComfyUI: chunkwise caching for autoregressive video models. Importable without ComfyUI; the nodes load on demand."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    """The host's entry point (ComfyUI V3 extension API)."""
    from comfy_api.latest import ComfyExtension
    from server import PromptServer

    from .nodes.chunkwise import ChunkwiseCache
    from .nodes.compare import CompareRuns
    from .nodes.devices import Devices
    from .nodes.frames_in import ARVideoFramesIn
    from .nodes.kv import KVCompressor
    from .nodes.latent import EmptyARVideoLatent
    from .nodes.latest_runs import open_routes
    from .nodes.load_magi_vae import LoadMagiVAE
    from .nodes.load_model import LoadARVideoModel
    from .nodes.magi_tokens import MagiSpecialTokens
    from .nodes.motion import MotionCache, RefreshOverlay
    from .nodes.policy import CachePolicyByName
    from .nodes.prompt_schedule import PromptSchedule
    from .nodes.report import CacheReport
    from .nodes.sampler import ARChunkSampler
    from .nodes.save_video import SaveARVideo
    from .nodes.scheduler import ARVideoScheduler

    class FlowCache(ComfyExtension):
        async def on_load(self):  # type: ignore[no-untyped-def]
            if (server := getattr(PromptServer, "instance", None)) is not None:
                open_routes(server)

        async def get_node_list(self):  # type: ignore[no-untyped-def]
            inputs = [LoadARVideoModel, LoadMagiVAE, MagiSpecialTokens, PromptSchedule, EmptyARVideoLatent, ARVideoFramesIn]
            caches = [ChunkwiseCache, MotionCache, CachePolicyByName, KVCompressor, Devices]
            shown = [CacheReport, RefreshOverlay, CompareRuns, SaveARVideo]
            return [*inputs, *caches, ARVideoScheduler, ARChunkSampler, *shown]

    return FlowCache()
