"""The names that a released checkpoint gives its tensors, whatever layout or wrapper a file was saved from."""

from __future__ import annotations

from collections.abc import Iterable

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
ANCHOR = "patch_embedding.weight"
"""A key that every layout has, under whatever prefix."""
DIFFUSERS = "condition_embedder.time_proj.weight"
"""A key that only the Diffusers layout has."""

_PARTS = {
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "fps_projection.net.0.proj.": "fps_projection.0.",
    "fps_projection.net.2.": "fps_projection.2.",
    "scale_shift_table": "head.modulation",
    "proj_out.": "head.head.",
}
_IN_BLOCK = {
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "o.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "norm2.": "norm3.",  # the two layouts count the norms differently: the affine one stands before cross-attention
    "norm3.": "norm2.",
    "scale_shift_table": "modulation",
}


def original_names(keys: Iterable[str], keep: Iterable[str] = ()) -> dict[str, str]:
    """Key in the file -> name in the released checkpoint. Keys of other parts of a whole checkpoint are left out.

    `keep`: keys that stand outside every wrapper and stay.
    """
    names = unwrapped(keys, keep, ANCHOR)
    return {key: from_diffusers(name) for key, name in names.items()} if DIFFUSERS in names.values() else names


def unwrapped(keys: Iterable[str], keep: Iterable[str], anchor: str) -> dict[str, str]:
    """The same for a layout that has no other names: `anchor` is a key that tells under which prefix a file has it."""
    names = {key: key for key in keys}
    for prefix in PREFIXES:
        if prefix + anchor in names:
            return {key: key.removeprefix(prefix) for key in names if key.startswith(prefix) or key in keep}
    return names


def from_diffusers(name: str) -> str:
    """A name of the Diffusers layout, of a tensor or of what is for one -> that of the released checkpoint."""
    if name.startswith("blocks.") and name.count(".") > 1:
        _, number, rest = name.split(".", 2)
        return f"blocks.{number}.{_renamed_block(rest)}"
    for theirs, ours in _PARTS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _renamed_block(rest: str) -> str:
    """`attn1.to_out.0.bias` -> `self_attn.o.bias`: part by part from the left, each once."""
    done = ""
    while rest:
        for theirs, ours in _IN_BLOCK.items():
            if rest.startswith(theirs):
                done, rest = done + ours, rest.removeprefix(theirs)
                break
        else:
            head, dot, rest = rest.partition(".")
            done += head + dot
    return done
