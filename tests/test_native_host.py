"""KV Compressor on ComfyUI's own causal model and its own sampler, in a real ComfyUI: random weights, so only equalities mean anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.named import policy_named
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.models.causal_wan import CausalWan
from flowcache_core.run.footprint import readable
from flowcache_core.run.sequential import SequentialFilm
from tests.host import NEEDS_HOST, Graph, Host, error_of, inside, refused, said, with_nodes
from tests.native import (
    FRAMES,
    KIND,
    LAYERS,
    SETTINGS,
    SEVEN,
    SIDE,
    STEPS,
    TESTS,
    TOKENS,
    WIDTH,
    Chain,
    fails,
    film,
    kv,
    seen,
    start,
    watched,
)
from tests.tiny_causal import tiny_causal

pytestmark = NEEDS_HOST
FILE = "causal.safetensors"
"""Weights in bfloat16, which a processor that multiplies it natively computes in."""
SKIPS = "SkipLayerGuidanceDiT"
SKIPPED = {"double_layers": "1", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_file({key: weight.bfloat16() for key, weight in tiny_causal(text_dim=4096).state_dict().items()}, folder / FILE)
    with with_nodes(base, TESTS) as running:
        yield running


@pytest.fixture(scope="module")
def alone(host: Host) -> Tensor:
    """The film that the sampler makes by itself."""
    return host.latents(film())


@pytest.mark.parametrize("policy", ["sink-recent", "even"])
def test_a_budget_for_everything_is_the_sampler_alone_bit_for_bit(host: Host, alone: Tensor, policy: str) -> None:
    assert alone.isfinite().all()
    assert torch.equal(host.latents(film(kv(policy=policy))), alone)


@pytest.mark.parametrize(
    ("chain", "settings"),
    [
        ((), {"block": 1, "frames": 6}),
        ((), {"frames": 11}),
        ((), {"batch": 2, "frames": 6}),
        ((start(),), {"frames": 8}),
        ((start(),), {"frames": 5, "block": 1}),
    ],
    ids=["frame by frame", "short last block", "two films", "start image", "start image, frame by frame"],
)
def test_so_it_is_however_the_film_is_cut(host: Host, chain: tuple[Chain, ...], settings: dict[str, Any]) -> None:
    assert torch.equal(host.latents(film(*chain, kv(), **settings)), host.latents(film(*chain, **settings)))


def gathered(room: int = 1000) -> Chain:
    return "Gathered", {"sink": 1, "latest": 6, "tokens": TOKENS, "room": room}


@pytest.mark.parametrize("block", [3, 1])
def test_a_budget_is_the_same_tokens_gathered_from_a_whole_cache_bit_for_bit(host: Host, alone: Tensor, block: int) -> None:
    kept = host.latents(film(kv(**SEVEN), block=block))
    assert torch.equal(kept, host.latents(film(gathered(), block=block)))
    assert not torch.equal(kept, alone)


def test_beyond_the_trained_length_the_sink_counts_as_just_within_it(host: Host) -> None:
    kept, turned, as_ever = (host.latents(film(one, frames=27)) for one in (kv(**SEVEN), gathered(18), gathered()))
    assert torch.equal(kept[:, :, :21], turned[:, :, :21])
    assert 0 < 50 * (kept - turned).abs().max() < (kept - as_ever).abs().max()


def test_with_positions_as_they_are_it_counts_as_far_as_it_is_and_a_budget_for_everything_is_the_sampler_alone(host: Host) -> None:
    everything, budget = ({**settings, "positions": "as they are"} for settings in ({}, SEVEN))
    assert torch.equal(host.latents(film(kv(**budget), frames=27)), host.latents(film(gathered(), frames=27)))
    assert torch.equal(host.latents(film(kv(**everything), frames=27)), host.latents(film(frames=27)))


@pytest.mark.parametrize("texts", [(8, 12), (8, 8)], ids=["one after the other", "side by side"])
@pytest.mark.parametrize("settings", [{}, SEVEN], ids=["everything", "sink and recent"])
def test_guidance_is_two_runs_combined(host: Host, texts: tuple[int, int], settings: dict[str, Any]) -> None:
    apart: Chain = ("Apart", {"frames": FRAMES, "tokens": TOKENS})
    reference = host.latents(film(apart, *([gathered()] if settings else []), cfg=3.0, texts=texts))
    guided = host.latents(film(kv(**settings), cfg=3.0, texts=texts))
    if texts[0] != texts[1]:
        assert torch.equal(guided, reference)
    torch.testing.assert_close(guided, reference, rtol=1e-3, atol=1e-3)


LONG = 133
"""Latent frames of 33 seconds at 16 frames a second."""


def test_without_the_node_guidance_fails(host: Host) -> None:
    fails(host, film(cfg=3.0, texts=(8, 8)))


@pytest.mark.parametrize("dtype", ["as computed", "int8"])
def test_a_longer_film_needs_no_more_and_the_host_is_told_before(host: Host, dtype: str) -> None:
    taken = {}
    for frames in (21, LONG):
        host.latents(film(watched(f"{dtype}{frames}"), kv(**SEVEN, dtype=dtype), frames=frames))
        taken[frames] = seen(host, f"{dtype}{frames}")
    planned = settled(21, dtype=dtype)
    assert taken[21]["most"] == taken[LONG]["most"] <= planned.kv
    assert taken[21]["estimate"] == taken[LONG]["estimate"] > planned.held
    assert taken[LONG]["behind"] == 0
    if dtype == "as computed":
        assert taken[21]["most"] == planned.budget.cache_bytes(planned.sizes, 1, 4)
        assert f"the KV cache took {readable(taken[21]['most'])} at its peak" in host.log.read_text()
        assert "KV Compressor: attention by ComfyUI's attention_sub_quad" in host.log.read_text()
        host.latents(film(watched("without"), frames=21))
        assert seen(host, "without")["most"] == planned.kv_unbounded > 2 * taken[21]["most"]


def settled(frames: int, dtype: str) -> SequentialFilm:
    compressor = Compressor(policy_named("sink-recent"), 7 / 4, "seconds", dtype=dtype)  # type: ignore[arg-type]
    network = CausalWan(LAYERS, WIDTH, WIDTH // 128)
    return SequentialFilm.settled(network, compressor, frames, 3, STEPS, (SIDE, SIDE), itemsize=4, text_tokens=8)


@pytest.mark.parametrize("policy", sorted({kind.name for kind in KV_POLICIES} - {"salience"}))
def test_every_policy_keeps_another_history(host: Host, alone: Tensor, policy: str) -> None:
    kept = host.latents(film(kv(**SEVEN, policy=policy)))
    assert kept.isfinite().all()
    assert torch.equal(kept[:, :, :9], alone[:, :, :9]), "nothing goes before there are more than seven frames of history"
    assert not torch.equal(kept[:, :, 9:], alone[:, :, 9:])


@pytest.mark.parametrize(
    ("settings", "near"),
    [({"dtype": "int8"}, 0.05), ({"dtype": "fp8"}, 0.2), ({"dtype": "int4"}, 1.0), ({"offload": True}, 0.0), ({**SEVEN, "soft": 0.2}, None),
     ({**SEVEN, "granularity": "frame"}, None)],
    ids=["int8", "fp8", "int4", "offload", "soft", "frames"],
)  # fmt: skip
def test_history_is_stored_and_chosen_as_under_our_sampler(host: Host, alone: Tensor, settings: dict[str, Any], near: float | None) -> None:
    kept = host.latents(film(kv(**settings)))
    assert kept.isfinite().all()
    if near is not None:
        assert (kept - alone).abs().mean() <= near * alone.abs().mean()


@pytest.mark.parametrize("given", [False, True], ids=["text", "start image"])
def test_the_clean_pass_that_nothing_looks_back_on_is_left_out(host: Host, alone: Tensor, given: bool) -> None:
    """The film is the sampler's own, as `test_a_budget_for_everything_is_the_sampler_alone_bit_for_bit` has it."""
    chain, frames = ([start()], FRAMES + 1) if given else ([], FRAMES)
    for name, settings, left_out in (("alone", None, 0), ("kv", {}, 1), ("none", {"clean_pass": "none"}, FRAMES // 3)):
        made = host.latents(film(watched(name), *chain, *([] if settings is None else [kv(**settings)]), frames=frames))
        assert seen(host, name)["forwards"] == given + FRAMES // 3 * (STEPS + 1) - left_out
    assert made.isfinite().all()
    if not given:
        assert torch.equal(made[:, :, :3], alone[:, :, :3])
        assert not torch.equal(made[:, :, 3:], alone[:, :, 3:])


def test_without_clean_passes_history_is_that_of_the_last_noisy_step(host: Host) -> None:
    """Against the sampler alone, whose caches are left as that step has written them."""
    noisy = host.latents(film(kv(clean_pass="none")))
    assert torch.equal(noisy, host.latents(film(("LeavesOut", {"clean": True, "steps": STEPS}))))


def test_a_step_that_reuses_the_last_prediction_is_the_schedule_without_that_step(host: Host) -> None:
    """Why caches of steps have nothing to save here: fewer steps are the same film."""
    reused = host.latents(film(("LeavesOut", {"clean": False, "steps": STEPS})))
    assert torch.equal(reused, host.latents(film(steps=STEPS - 1)))


@pytest.mark.parametrize("kind", ["FlowCacheChunkwise", "FlowCacheMotion", "FlowCachePolicy"])
def test_caches_of_steps_give_the_reason_why_they_are_not_for_this_model(host: Host, kind: str) -> None:
    inputs = host.ask(f"/object_info/{kind}")[kind]["input"]["required"]
    settings = {name: rule.get("default", kinds[0] if isinstance(kinds, list) else None) for name, (kinds, rule) in inputs.items()}
    del settings["model"]
    refused(host, film((kind, settings)), "has nothing to save on this model: .* is the schedule without that step")


def test_salience_asks_for_a_head_of_this_size(host: Host) -> None:
    refused(host, film(kv(policy="salience")), "this head is for .* layers of .* channels .*, the model has 2 layers of 256")


def test_weights_in_fp8_are_their_rounded_values(host: Host) -> None:
    assert torch.equal(host.latents(film(kv(), weights="fp8")), host.latents(film(weights="rounded")))
    assert torch.equal(host.latents(film(start(), kv(), weights="fp8", frames=4)), host.latents(film(start(), weights="rounded", frames=4)))
    fails(host, film(weights="fp8"))


def test_a_file_of_ours_in_bfloat16_is_sampled_by_both_samplers(host: Host) -> None:
    """The host's network hands its patch embedding float32 in any case."""
    loaded = {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": FILE, "family": "self-forcing"}}
    own = {"class_type": "FlowCacheSampler", "inputs": {"solver": "auto", "ar_step": -1, "chunk_frames": 0, "window": 0, "fps": "auto"}}
    graph = {**film(kv(), steps=4, frames=6), "model": loaded}
    theirs, ours = host.latents(graph), host.latents({**graph, "sampler": own})
    assert theirs.isfinite().all()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.1 * theirs.abs().mean()


@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_a_run_that_is_ended_leaves_nothing_and_the_next_is_right(host: Host, alone: Tensor, kind: str) -> None:
    for fault in (1, 8):
        done = host.run(film(watched(kind, fault, kind), kv(**SEVEN)))
        assert done["status"]["status_str"] == "error"
        left = seen(host, kind)
        assert (left["behind"], left["patched"], left["calls"]) == (0, False, fault)
    assert torch.equal(host.latents(film()), alone)
    assert torch.equal(host.latents(film(kv(policy="even"))), alone)


def test_runs_change_each_other_in_no_way(host: Host, alone: Tensor) -> None:
    """The same model without the node, in another size, another model and the first again."""
    kept = host.latents(film(kv(**SEVEN)))
    assert torch.equal(host.latents(film()), alone)
    assert host.latents(film(kv(**SEVEN), side=12, frames=6)).shape[-1] == 12
    assert not torch.equal(host.latents(film(kv(**SEVEN), seed=1)), kept)
    again = film(kv(**SEVEN))
    again["noise"]["inputs"]["noise_seed"] = 6
    assert not torch.equal(host.latents(again), kept)
    assert torch.equal(host.latents(film(watched("again"), kv(**SEVEN))), kept)


def test_a_second_node_takes_the_place_of_the_first(host: Host) -> None:
    assert torch.equal(host.latents(film(kv(), kv(**SEVEN))), host.latents(film(kv(**SEVEN))))


EULER = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
EASY: Chain = ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False})


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (film(kv(budget=0.75)), r"a budget of 0\.75 seconds is 3\.0 latent frames, but history needs 4: .* use 1 seconds or more"),
        (film(kv(), side=9), "multiples of 16 pixels"),
        (film(kv(), EASY), "easycache skips steps without knowing of chunks"),
        (film(("LazyCache", EASY[1]), kv()), "lazycache skips steps without knowing of chunks"),
        (film(("TorchCompileModel", {"backend": "inductor"}), kv()), "the model goes through torch.compile"),
        (film(kv(), causal=False), "KV Compressor cannot serve a WAN21 model: .* causal model of ComfyUI's own"),
        (film((SKIPS, SKIPPED), kv()), f"{SKIPS} would change nothing: under Sampler AR Video no block"),
        (film(kv(), (SKIPS, SKIPPED)), f"{SKIPS} would change nothing: under Sampler AR Video no block"),
        (film(("Skipping", {}), kv()), "an evaluation was left out by a node that skips steps"),
        (film(kv(), ("OtherAttention", {})), r"diffusion_model\.blocks\.1\.self_attn\.forward of the network was replaced by OtherAttention"),
        (film(start(), kv(), batch=2), "one film at a time from a start image, not 2: set batch_size to 1"),
        (film(kv(**SEVEN), block=9), "is 7.0 latent frames, but history needs 10"),
        (
            {**film(kv()), "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}},
            "works with Sampler AR Video on this model",
        ),
        (
            {
                **film(kv()),
                "latent": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["empty", 0], "mask": ["mask", 0]}},
                "empty": film()["latent"],
                "mask": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
            },
            "Sampler AR Video cannot keep a part of the latent",
        ),
        (
            {
                **film(kv()),
                "sigmas": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["all", 0], "step": 1}},
                "all": film()["sigmas"],
            },
            r"needs noise levels that end in 0, these end in 0\.[0-9]+: do not split",
        ),
    ],
    ids=[
        "budget",
        "odd",
        "easycache",
        "lazycache",
        "compile",
        "not causal",
        "blocks",
        "blocks behind",
        "skipping",
        "attention",
        "batch",
        "block",
        "sampler",
        "mask",
        "sigmas",
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(host: Host, graph: Graph, sentence: str) -> None:
    refused(host, graph, sentence)


def test_a_text_that_does_not_count_at_the_end_of_a_block_is_told(host: Host) -> None:
    graph = film(kv(), cfg=3.0)
    graph["early"] = {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": ["negative", 0], "start": 0.0, "end": 0.5}}
    graph["guider"]["inputs"]["negative"] = ["early", 0]
    refused(host, graph, "with every text of guidance")


def test_the_node_says_what_is_planned(host: Host) -> None:
    text = said(host, film(kv(budget=2.0, policy="even")), KIND)
    assert "history is kept to 2 seconds" in text
    assert re.search(r"under Sampler AR Video with 3 frames per block, at 832 x 480 in 16 bits: a KV cache of at most [0-9.]+ MiB", text)
    for frames in (21, 241):
        assert readable(frames * 30 * 52 * 2 * LAYERS * WIDTH * 2) in text
    assert "with 1 frame per block" in text


def test_another_sampler_on_the_model_without_the_node_runs_as_ever(host: Host) -> None:
    """The node's functions are gone from the network."""
    host.latents(film(kv(**SEVEN), frames=6))
    done = host.run({**film(frames=6), "sampler": EULER})
    assert done["status"]["status_str"] == "success", error_of(done)


TWO_NETWORKS = """
import comfy.samplers

tests = {}
exec(TESTS, tests)
make = lambda: tests["RandomModel"]().run(0, "float32", True)[0]

def film(model):
    guider, (text,) = comfy.samplers.CFGGuider(model), tests["RandomText"]().run(1, 8)
    guider.set_conds(text, text)
    noise = torch.randn(1, 16, 6, 8, 8, generator=torch.Generator().manual_seed(5))
    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
    return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.8, 0.0]), disable_pbar=True, seed=5)

model = make()
model.cached_patcher_init = make, ()
alone = film(model)
kept = node("kv").KVCompressor.execute(model=model, **SETTINGS).result[0]
clone = kept.deepclone_multigpu()
for block in model.model.diffusion_model.blocks:
    block.self_attn.o.weight.zero_()
print(json.dumps({"own": clone.model is not model.model, "same": torch.equal(film(clone), alone), "other": torch.equal(film(kept), alone)}))
"""


def test_a_clone_with_a_network_of_its_own_attends_by_that(tmp_path: Path) -> None:
    """As the host clones a MODEL for another device, and for texts that change weights under dynamic VRAM."""
    assert inside(tmp_path, f"TESTS, SETTINGS = {TESTS!r}, {SETTINGS!r}\n{TWO_NETWORKS}") == {"own": True, "same": True, "other": False}
