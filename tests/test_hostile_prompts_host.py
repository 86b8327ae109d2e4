"""Random prompts for every node of this pack, and small films of random settings: each ends in success or in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowcache_core.models.bundle import files_of
from flowcache_core.models.magi_family import MAGI
from tests.host import NEEDS_HOST, Host, with_nodes
from tests.hostile_prompts import ODD, Node, Prompt, answers, fault_of, film_of, graph_of, own_nodes, prompt_of

pytestmark = [*NEEDS_HOST, pytest.mark.slow]
PROMPTS, FILMS, SEED = (int(os.environ.get(name, default)) for name, default in (("PROMPTS", 200), ("FILMS", 30), ("SEED", 1)))
"""Of every node; in all."""
CACHED = 60
"""Results of nodes that the host keeps, so that model, film and frames are not made anew for every prompt."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("vae", "text_encoders"):
        (base / "models" / folder).mkdir(parents=True)
    shutil.copy(files_of(MAGI)[1], base / "models" / "vae" / "magi.safetensors")
    rows = np.random.default_rng(0).standard_normal((100, 256))
    np.savez(base / "models" / "text_encoders" / "special_tokens.npz", caption_token=rows[:1], logo_token=rows[1:2], other_tokens=rows)
    with with_nodes(base, ODD, ("--cache-lru", str(CACHED))) as running:
        yield running


def test_any_inputs_of_a_node_end_in_success_or_in_a_sentence(host: Host) -> None:
    found = [fault for node in own_nodes(host) for fault in faults(host, node)]
    assert not found, f"{len(found)} findings\n" + "\n\n".join(found)


TOKENS = {"file": "special_tokens.npz", "quality": True, "duration": False, "motion": "none", "style": "2d", "border": False}
SAVED = {"fps": 24.0, "crf": 19, "images_out": False, "images": ["image", 0]}
FOUND = (
    ("FlowCacheMagiTokens", {"conditioning": 1e308, **TOKENS}),
    ("FlowCacheSaveVideo", {"filename_prefix": "\0", **SAVED}),
    ("FlowCacheSaveVideo", {"filename_prefix": "x" * 300, **SAVED}),
    ("FlowCacheSaveVideo", {"filename_prefix": "/", **SAVED}),
)
"""Prompts that ended in an error once."""


@pytest.mark.parametrize(("name", "inputs"), FOUND, ids=lambda one: str(one)[:20])
def test_what_was_found_ends_in_a_sentence(name: str, inputs: dict[str, Any], host: Host) -> None:
    done = host.run(graph_of(Prompt(), name, inputs, name == "FlowCacheSaveVideo"))
    assert done["status"]["status_str"] == "error"
    assert not fault_of(done), fault_of(done)


def faults(host: Host, node: Node) -> Iterator[str]:
    """Prompts of the node that end otherwise, with their errors."""
    ends = {"refused": 0, "success": 0, "error": 0}
    for graph, done in answers(host, (prompt_of(SEED, node, number) for number in range(PROMPTS))):
        ends["refused" if done is None else done["status"]["status_str"]] += 1
        if done is not None and (fault := fault_of(done)):
            yield f"{json.dumps(graph['node'])}\n{fault}"
    print(node.name, ends)
    assert ends["success"], "some prompts are valid, so that execution is tested too"


def test_small_films_of_any_settings_end_in_success_or_in_a_sentence(host: Host) -> None:
    nodes, found, succeeded = own_nodes(host), [], 0
    for graph, done in answers(host, (film_of(SEED, nodes, number) for number in range(FILMS))):
        assert done is not None, json.dumps(graph)
        succeeded += done["status"]["status_str"] == "success"
        if fault := fault_of(done):
            found.append(f"{json.dumps(graph)}\n{fault}")
    assert not found, f"{len(found)} findings\n" + "\n\n".join(found)
    assert succeeded
