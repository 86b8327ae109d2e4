"""A line of a jobs file that a ComfyUI server makes: a workflow in the API format, with other values in some inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..run.identity import key_of, plain
from ..untrusted import json_file, short
from .film_line import SEEDS
from .jobs_file import require_known, typed
from .tasks import Asked, GraphTask

WORKFLOWS = Path(__file__).parents[2] / "workflows" / "api"
KNOWN = ("workflow", "prompt", "seed", "set", "name")
TEXTS = ("positive", "conditioning")
"""Inputs by which a guider or a sampler takes the text of the prompt."""
PROMPT_INPUTS = ("text", "schedule")
"""Of text encoders, and of Prompt Schedule, where a text without numbers counts from the first chunk on."""
SEED_INPUTS = ("noise_seed", "seed")
Graph = dict[str, dict[str, Any]]


class GraphLines:
    """`folder`: of the jobs file; other workflows than those of the pack are looked for there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = lru_cache(self._graph)

    def task(self, line: int, asked: Asked) -> GraphTask:
        """Raises ValueError, with the way out, for a workflow or an input that there is not."""
        if "workflow" not in asked:
            raise ValueError('it names no workflow, and with --host ComfyUI makes the films: add "workflow": "text_to_video", or leave --host out')
        require_known(asked, KNOWN, "a film of a workflow")
        name = typed(asked, "workflow", "")
        graph = copy.deepcopy(self._read(name))
        for (node, key), value in _changes(graph, asked).items():
            graph[node]["inputs"][key] = value
        bare = {node: {"class_type": one["class_type"], "inputs": one["inputs"]} for node, one in graph.items()}
        title = typed(asked, "name", "") or typed(asked, "prompt", "") or Path(name).stem
        return GraphTask(line, key_of({"graph": str(plain(bare))}), title, asked, graph)

    def _graph(self, name: str) -> Graph:
        """Of the pack by its name, or any by its file."""
        path = self.folder / name if name.endswith(".json") else WORKFLOWS / f"{Path(name).name}.json"
        if not path.is_file():
            names = ", ".join(sorted(one.stem for one in WORKFLOWS.glob("*.json")))
            raise ValueError(f"there is no workflow {short(name)}: name a .json file in the API format, or one of {names or 'none here'}")
        try:
            graph = json_file(path)
        except ValueError as error:
            raise ValueError(f"{short(path.name)} is no workflow ({error})") from None
        if not isinstance(graph, dict) or not graph or not all(map(_is_node, graph.values())):
            raise ValueError(f"{short(path.name)} is no workflow in the API format: in ComfyUI use Export (API)")
        return graph


def _is_node(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("class_type"), str) and isinstance(one.get("inputs"), dict)


def _changes(graph: Graph, asked: Asked) -> dict[tuple[str, str], Any]:
    """Values by node and input."""
    changes: dict[tuple[str, str], Any] = {}
    if "prompt" in asked:
        changes[_only(set(_prompts(graph)), "prompt", "text")] = typed(asked, "prompt", "")
    if "seed" in asked:
        if not 0 <= typed(asked, "seed", 0) < SEEDS:
            raise ValueError(f"seed is {asked['seed']}: it must lie between 0 and {SEEDS - 1}")
        changes[_only(set(_seeds(graph)), "seed", "noise_seed")] = asked["seed"]
    others = asked.get("set", {})
    if not isinstance(others, Mapping):
        raise ValueError(f"set is {short(others)}: it must be an object, such as " + '{"Empty AR Video Latent.length": 57}')
    for name, value in others.items():
        changes[_place(graph, name)] = value
    return changes


def _prompts(graph: Graph) -> Iterator[tuple[str, str]]:
    """The texts that guiders and samplers take as the prompt, through whatever stands between."""
    for one in graph.values():
        for name in TEXTS:
            if name in one["inputs"] and ("CLIP" not in one["class_type"]) and (name == "positive" or "Guider" in one["class_type"]):
                yield from _text_behind(graph, one["inputs"][name])


def _text_behind(graph: Graph, link: object) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    links = [link]
    while links:
        match links.pop():
            case [str(node), int()] if node in graph and node not in seen:
                seen.add(node)
                inputs = graph[node]["inputs"]
                if written := [name for name in PROMPT_INPUTS if isinstance(inputs.get(name), str)]:
                    yield node, written[0]
                else:
                    links += [value for name, value in inputs.items() if name in (*TEXTS, "conditioning_1", "conditioning_2")]


def _seeds(graph: Graph) -> Iterator[tuple[str, str]]:
    for node, one in graph.items():
        yield from ((node, name) for name in SEED_INPUTS if type(one["inputs"].get(name)) is int)


def _only(places: set[tuple[str, str]], what: str, example: str) -> tuple[str, str]:
    if len(places) == 1:
        return next(iter(places))
    found = f"{len(places)} inputs could take it" if places else "no input takes it"
    raise ValueError(f'its workflow does not say where the {what} goes, {found}: write "set": ' + f'{{"NODE.{example}": ...}}')


def _place(graph: Graph, name: str) -> tuple[str, str]:
    """`NODE.INPUT`: the node by its id, title or class."""
    node, _, key = name.partition(".")
    found = [one for one in graph if one == node] or [
        one for one, values in graph.items() if node in (values["class_type"], (values.get("_meta") or {}).get("title"))
    ]
    if len(found) != 1:
        raise ValueError(f"set names {short(name)}, and {len(found)} nodes of the workflow have that id, title or class: write ID.INPUT")
    if key not in graph[found[0]]["inputs"]:
        raise ValueError(f"set names {short(name)}, and that node has no such input: it has {', '.join(graph[found[0]]['inputs'])}")
    return found[0], key
