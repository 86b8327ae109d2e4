"""The settings that travel on a MODEL, and the names of the nodes that put them there; what they decide is not known here."""

from __future__ import annotations

from typing import Any

from ..flowcache_core.kv.compressor import Compressor
from ..flowcache_core.policies.protocol import CachePolicy

KV_NODE, CHUNKWISE_NODE, MOTION_NODE, POLICY_NODE = "KV Compressor", "Chunkwise Cache", "Motion Cache", "Cache Policy"
PROMPTS_NODE, DEVICES_NODE = "Prompt Schedule", "Devices"
OPTIONS = "flowcache"
"""Key in transformer_options under which our settings travel on a MODEL, all frozen: {"policy": CachePolicy, "node": whose, "kv": Compressor,
"clean_pass": bool, "devices": their names by rank}."""


def with_policy(model: Any, policy: CachePolicy, node: str) -> Any:
    """A clone of a ModelPatcher that carries the policy, and whose it is; what an earlier cache node had put there is replaced."""
    return _with(model, policy=policy, node=node)


def with_compressor(model: Any, compressor: Compressor, clean_pass: bool = True) -> Any:
    """A clone of a ModelPatcher that carries the settings of history, in place of earlier ones. `clean_pass`: whether the host's own causal
    models pass finished chunks through the network once more."""
    return _with(model, kv=compressor, clean_pass=clean_pass)


def with_devices(model: Any, devices: tuple[str, ...]) -> Any:
    """A clone of a ModelPatcher whose films are made on these devices, that of the host first."""
    return _with(model, devices=devices)


def policy_of(model_options: dict[str, Any]) -> CachePolicy | None:
    policy: CachePolicy | None = _ours(model_options).get("policy")
    return policy


def compressor_of(model_options: dict[str, Any]) -> Compressor | None:
    compressor: Compressor | None = _ours(model_options).get("kv")
    return compressor


def clean_pass_of(model_options: dict[str, Any]) -> bool:
    clean_pass: bool = _ours(model_options).get("clean_pass", True)
    return clean_pass


def devices_of(model_options: dict[str, Any]) -> tuple[str, ...]:
    """() where a film is made on the host's device alone."""
    devices: tuple[str, ...] = _ours(model_options).get("devices", ())
    return tuple(devices)


def _with(model: Any, **settings: Any) -> Any:
    """A clone with some of our settings; those of other nodes stay."""
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    patched.model_options["transformer_options"] = {**options, OPTIONS: {**_ours(patched.model_options), **settings}}
    return patched


def _ours(model_options: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = model_options.get("transformer_options", {}).get(OPTIONS, {})
    return settings


def policy_node(model_options: dict[str, Any]) -> str:
    """The node that put a policy on a MODEL; "" where there is none."""
    node: str = _ours(model_options).get("node", "")
    return node


def nodes_of(model_options: dict[str, Any]) -> str:
    """The nodes whose settings a MODEL carries, in words; "" where it carries none."""
    settings = {KV_NODE: compressor_of(model_options), DEVICES_NODE: devices_of(model_options)}
    return " and ".join(filter(None, [policy_node(model_options), *(node for node, setting in settings.items() if setting)]))


def wrong_sampler(nodes: str) -> str:
    works = "work" if " and " in nodes else "works"
    return f"{nodes} {works} with the AR Chunk Sampler: connect that node to the sampler input, or bypass {nodes}"
