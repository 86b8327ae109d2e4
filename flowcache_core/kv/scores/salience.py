"""Salience (PaFu-KV, arXiv 2601.21896): a small head per layer predicts how much attention a token will draw.

When a chunk becomes history, nothing it has seen tells which of its tokens later chunks will need. A bidirectional model
does see that, so the head is taught by one (`training/salience.py`): from what the layer's self-attention is given in the
clean pass, and from the token's place in its chunk, it predicts the attention from later chunks, from its own and from earlier ones. A token is
scored once, when its chunk becomes history; from then on its score is carried along.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...files import whole
from ...network import NetworkSizes
from ...settings import check, setting
from ...untrusted import entries, open_tensors, short
from ..policy import KVView

if TYPE_CHECKING:
    from ..cache import KVSizes

FORMAT = "pafu-salience/1"
OUT = ("low", "same", "up")
"""Who attends to the token, in the order of the head's outputs: later chunks (below the diagonal), its own, earlier ones (above)."""
LOW, SAME, UP = range(3)
FIXED = {"format": FORMAT, "out": ",".join(OUT), "act": "gelu", "tap": "self_attn_input_t0", "place": "chunk-dct8", "target_stat": "max"}
"""What every file of this format says of itself."""
LARGEST = {"layers": 256, "in_dim": 1 << 16, "hidden": 1 << 16, "block_frames": 1 << 16}
"""Beyond what any model has: a file that says more would only keep the machine busy."""
WAVES = 8
"""Cosines that tell a head the frame of a token in its chunk; as many for its place along the height, and along the width."""
NARROWING = 8
"""A head is as many times narrower inside than the layer."""
EPS = 1e-6
COMMAND = "python -m flowcache_core.training.salience"
WEIGHTS = Path(__file__).parents[2] / "models" / "weights"
BUNDLED = WEIGHTS / "salience.safetensors"
BUNDLED_FOR = {"causal-wan": WEIGHTS / "tiny-causal-salience.safetensors"}
"""Heads of bundled models by the kind of their network; of all others there is the first."""


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a head was made for and from. `clips`: training clips; `weights`: of the outputs in the order of OUT, as recommended."""

    layers: int
    in_dim: int
    hidden: int
    block_frames: int
    base_model: str
    base_sha256: str
    teacher: str
    train_clips: int
    licence: str
    weights: tuple[float, float, float] = (1.0, 0.1, 0.5)

    def metadata(self) -> dict[str, str]:
        """As strings, for the head of a safetensors file."""
        mine = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**FIXED, **{name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in mine.items()}}

    @classmethod
    def read(cls, metadata: Mapping[str, str], name: str) -> HeadInfo:
        """The same back. Raises ValueError for a file of another kind, with entries missing, or with numbers that are none."""
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{name} is no salience head: its format is {short(metadata.get('format', 'not said'))}, not {FORMAT}; train one with {COMMAND}"
            )
        if missing := [key for key in (*FIXED, *cls.__dataclass_fields__) if key not in metadata]:
            raise ValueError(f"{name} is not a whole salience head: its metadata lack {', '.join(missing)}; train one with {COMMAND}")
        for key, value in FIXED.items():
            if metadata[key] != value:
                raise ValueError(f"{name} is a salience head of another make: its {key} is {short(metadata[key])}, and only {value} is known here")
        try:
            layers, in_dim, hidden, block_frames, clips = (int(metadata[k]) for k in ("layers", "in_dim", "hidden", "block_frames", "train_clips"))
            low, same, up = (float(part) for part in metadata["weights"].split(","))
        except ValueError as error:
            raise ValueError(f"{name} is not a whole salience head: a number in its metadata cannot be read ({short(error)})") from error
        numbers = {"layers": layers, "in_dim": in_dim, "hidden": hidden, "block_frames": block_frames}
        for key, number in numbers.items():
            if not 1 <= number <= LARGEST[key]:
                raise ValueError(f"{name} is no salience head of a model: its {key} must lie between 1 and {LARGEST[key]}, and is {short(number)}")
        if clips < 0 or not all(map(math.isfinite, (low, same, up))):
            raise ValueError(f"{name} is not a whole salience head: train_clips must be 0 or more, and weights three finite numbers")
        base, sha, teacher, licence = (metadata[key] for key in ("base_model", "base_sha256", "teacher", "licence"))
        return cls(layers, in_dim, hidden, block_frames, base, sha, teacher, clips, licence, (low, same, up))


class LayerHead(nn.Module):
    """RMSNorm(C) -> Linear(C + 3 WAVES, hidden) -> GELU -> Linear(hidden, 3), for one layer; 3 WAVES say where in its chunk a token is.

    `target_mean`, `target_std` [3]: of the log attention that the training clips' tokens received.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(in_dim, eps=EPS)
        self.fc1, self.fc2 = nn.Linear(in_dim + 3 * WAVES, hidden), nn.Linear(hidden, len(OUT))
        self.register_buffer("target_mean", torch.zeros(len(OUT)))
        self.register_buffer("target_std", torch.ones(len(OUT)))

    def forward(self, hidden: Tensor, place: Tensor) -> Tensor:
        """[..., T, C] and `places` of the tokens [..., T, 3 WAVES] -> float32 [..., T, 3] in the order of OUT: standardised log attention."""
        features = torch.cat([self.norm(hidden.float()), place.expand(*hidden.shape[:-1], -1)], -1)
        out: Tensor = self.fc2(F.gelu(self.fc1(features)))
        return out

    def target(self, received: Tensor) -> Tensor:
        """Attention received, [..., 3] -> the target of `forward`."""
        return (log_attention(received) - self.target_mean) / self.target_std


def places(tokens: Tensor, frames: Tensor | int, grid: tuple[int, int]) -> Tensor:
    """Cosines of where tokens lie in time, height and width, float32 [T, 3 WAVES].

    tokens: int64 [T], each counted from the start of its chunk of `frames` latent frames (one number, or one per token) of
    `grid`, height and width in tokens.
    """
    height, width = grid
    frame, place = tokens // (height * width), tokens % (height * width)
    along = torch.stack([(frame + 0.5) / frames, (place // width + 0.5) / height, (place % width + 0.5) / width], -1)
    wave = torch.arange(1, WAVES + 1, device=tokens.device) * math.pi
    return (along[..., None] * wave).cos().flatten(1)


def log_attention(received: Tensor) -> Tensor:
    return (received + EPS).log()


class SalienceHead(nn.Module):
    """The heads of all layers, and what they were made for."""

    def __init__(self, info: HeadInfo) -> None:
        super().__init__()
        self.info = info
        self.layers = nn.ModuleList(LayerHead(info.in_dim, info.hidden) for _ in range(info.layers))

    def layer(self, index: int) -> LayerHead:
        return cast(LayerHead, self.layers[index])

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def on(self, device: torch.device) -> SalienceHead:
        """Itself where it is, a copy elsewhere."""
        return self if self.layer(0).target_mean.device == device else copy.deepcopy(self).to(device, non_blocking=True)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, in float32."""
        with whole(path) as partial:
            save_file({k: v.detach().float().cpu().contiguous() for k, v in self.state_dict().items()}, partial, self.info.metadata())

    @classmethod
    def load(cls, path: Path) -> SalienceHead:
        """In evaluation mode, in float32, on the processor.

        Raises ValueError for a missing, foreign or damaged file, and for missing, unknown or misshapen tensors.
        """
        if not path.is_file():
            raise ValueError(f"there is no salience head {short(path.name)}: train one with {COMMAND}")
        with open_tensors(path) as file:
            info = HeadInfo.read(dict(file.metadata() or {}), path.name)
            with torch.device("meta"):
                head = cls(info)
            found = {key: shape for key, (shape, _) in entries(file, path.name).items()}
            _refuse_misfits({k: tuple(v.shape) for k, v in head.state_dict().items()}, found, path.name)
            head.load_state_dict({key: file.get_tensor(key).float() for key in found}, assign=True)
        if damaged := [key for key, tensor in head.state_dict().items() if not tensor.isfinite().all()]:
            raise ValueError(f"{path.name} is damaged: {damaged[0]} holds NaN or infinity; train one with {COMMAND}")
        return head.eval().requires_grad_(False)


def _refuse_misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], name: str) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(keys)} {what} ({short(keys[0])}, ...)" for keys, what in ((missing, "missing"), (extra, "unknown")) if keys]
        raise ValueError(f"{name} is not a whole salience head: {' and '.join(parts)} of {len(wanted)} tensors; train one with {COMMAND}")
    if wrong := [key for key in wanted if wanted[key] != found[key]]:
        key = wrong[0]
        raise ValueError(f"{name} contradicts itself: {key} has shape {found[key]}, but its metadata ask for {wanted[key]}; train one with {COMMAND}")


def head_at(path: str) -> SalienceHead:
    """The head in a file ("": that of the bundled model), read once as long as the file does not change. Raises ValueError."""
    file = Path(path) if path else BUNDLED
    return _read(file, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=2)
def _read(file: Path, changed: int) -> SalienceHead:
    return SalienceHead.load(file)


@dataclass(frozen=True)
class Salience:
    """Settings of the salience policy. Raises ValueError for a value outside its range."""

    name: ClassVar[str] = "salience"
    shared: ClassVar[bool] = True

    path: str = setting("", "The file of a head that was trained for the model. Empty: that of the bundled model of its kind.")
    low: float = setting(1.0, "Weight of the attention that later chunks are expected to pay to a token.", low=0.0, high=10.0, step=0.05)
    up: float = setting(
        0.5, "Weight of the attention that earlier chunks would pay to it, if they could see it.", low=0.0, high=10.0, step=0.05, advanced=True
    )
    same: float = setting(0.1, "Weight of the attention that its own chunk pays to it.", low=0.0, high=10.0, step=0.05, advanced=True)

    def __post_init__(self) -> None:
        check(self)
        if self.low == self.up == self.same == 0:
            raise ValueError("low, up and same are all 0, so every token would score the same: give one of them a weight")

    def for_network(self, network: NetworkSizes) -> Salience:
        """With the head of the bundled model of its kind, where no file was named.

        Raises ValueError, before a run, where there is no whole head or it is for a network of another size.
        """
        path, layers, width = self.path or str(BUNDLED_FOR.get(network.name, BUNDLED)), network.layers, network.width
        info = head_at(path).info
        if (info.layers, info.in_dim) != (layers, width):
            raise ValueError(
                f"this head is for {info.layers} layers of {info.in_dim} channels ({info.base_model}), the model has {layers} layers of {width}: "
                f"train one for it with {COMMAND}"
            )
        return replace(self, path=path)

    def holds(self, sizes: KVSizes, branches: int) -> int:
        return head_at(self.path).bytes

    def score(self, view: KVView) -> Tensor:
        """-> float32 [B, 1, N]: what older tokens were scored when they were new, and the head's word on the new ones."""
        head = view.shared.of(SalienceHead, lambda: head_at(self.path).on(view.hidden.device)).layer(view.layer)
        place = places(torch.arange(view.new, device=view.hidden.device), view.new // view.frame_tokens, view.grid)
        low, same, up = head(view.hidden, place).unbind(-1)
        fresh = self.low * low + self.same * same + self.up * up
        old = view.carried[:, : view.carried.shape[1] - view.new]
        return torch.cat([old, fresh], 1).unsqueeze(1)
