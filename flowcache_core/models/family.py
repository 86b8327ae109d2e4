"""All that is particular to one kind of model, as one frozen value. Loader, host, nodes, bundle, demo and benches read it from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..sampling.frames import Frames
from ..sampling.guidance import Guidance
from ..sampling.noise import Noise
from ..sampling.profile import ORDINARY, Profile
from ..sampling.schedule import ChunkSchedule
from ..sampling.solvers import Solver
from .adapter import ModelAdapter

AUTO = "auto"
OUR_RATE = 24
"""Frames per second on which every model of ours was trained."""
Shapes = Mapping[str, tuple[int, ...]]


class NetworkConfig(Protocol):
    """Sizes of a network, read from the shapes of a checkpoint."""

    @property
    def dim(self) -> int:
        """Channels of a token."""
        ...

    @property
    def text_dim(self) -> int:
        """Channels of the text embeddings that it takes."""
        ...


@runtime_checkable
class OpenBlocks(Protocol):
    """A network whose blocks a host may skip or replace, one by one."""

    def through(self, layer: int, block: Any, tokens: Tensor, e0: Any, text: Any, rope: Any, attend: Any) -> Tensor:
        """Tokens [B, T, d] through one block, with what it is given beside them -> the same shape. `stack` calls it for every block."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """How a model was trained: latent frames per chunk, chunks it can look at together, frames per second, attention.

    `causal`: trained with block-causal attention too; without it, only with bidirectional attention. `aligned`: the grid of chunks
    begins with the film, whatever frames are given (`ChunkSchedule`). `profile`: what its steps are worth, for
    plans.
    """

    chunk_frames: int
    window: int
    fps: int = 24
    causal: bool = False
    aligned: bool = False
    profile: Profile = ORDINARY


@dataclass(frozen=True, slots=True)
class Latents:
    """Of what a film is made: `channels` per cell; pixels along the side of a cell, and cells along the side of a token."""

    channels: int
    spatial: int
    patch: int
    host_format: str | None
    """The class of comfy.latent_formats; None where the host has none."""
    preview: Preview | None = None
    """Colours of the latents; None: as the host's class has them."""
    scale: float = 1.0
    """What the VAE makes, times this, is what the network takes; where the host has a class, that knows it."""

    @property
    def multiple(self) -> int:
        """What the sides of a picture divide by."""
        return self.spatial * self.patch


Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a latent cell looks like: channels @ `factors` + `bias`, red, green and blue in -1..1. One row of `factors` per channel."""

    factors: tuple[Colour, ...]
    bias: Colour


@dataclass(frozen=True, slots=True)
class Bundled:
    """A tiny model of the family that comes with the pack: names of its files in `models/weights`, how its parts are made."""

    name: str
    vae: str
    load_vae: Callable[[dict[str, Tensor]], nn.Module]
    encode: Callable[[str, int], Tensor]
    """(prompt, channels) -> [1, words, channels]."""
    preview: Preview | None = None
    """Colours of its VAE's latents; None: those of the family's."""


@dataclass(frozen=True, slots=True)
class Loaders:
    """The host's nodes that load what a checkpoint needs beside it, in words: `clip`, its text encoder, and `vae`."""

    clip: str
    vae: str


def any_schedule(schedule: ChunkSchedule) -> None:
    """Whatever can be made."""


def any_levels(levels: Sequence[float]) -> None:
    """Whatever falls to 0."""


def declares_nothing(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """A file that does not say of which family it is."""
    return False


def shares_nothing(config: Any) -> bool:
    """Whether other models have the shapes of `config`: none."""
    return False


@dataclass(frozen=True, slots=True)
class Published:
    """What a family was published with, where a user leaves it open.

    solver: its name; stagger: number of steps -> `ar_step`; given_noise: timestep of the light noise on given first frames;
    scale: of guidance, None where it is trained into the network.
    """

    solver: str = "unipc"
    stagger: Callable[[int], int] = lambda steps: 5
    given_noise: int = 20
    scale: float | None = 6.0


@dataclass(frozen=True, slots=True)
class Usual:
    """What demo and benches make a film with where nobody says otherwise: pixel frames, steps, guidance, frames per second."""

    frames: int = 57
    steps: int = 50
    cfg: float = 3.0
    fps: int = OUR_RATE


@dataclass(frozen=True, slots=True)
class Family:
    """`name` is also what a file's metadata may say under "architecture"; `title` is what people read."""

    name: str
    title: str
    network: Callable[..., nn.Module]
    """A class: (config, operations, device, dtype) -> network, whose parameters have the names of the released checkpoints."""
    adapter: Callable[[Any, torch.dtype | None], ModelAdapter]
    """(network, dtype of computation or None for that of the weights) -> adapter."""
    original_names: Callable[[Iterable[str], Iterable[str]], dict[str, str]]
    """(keys of a file, keys that stand outside every wrapper) -> key to its name in the released checkpoint; other parts left out."""
    claims: Callable[[Shapes], bool]
    """Whether a file with these shapes, under original names, looks like this family at all."""
    config_of: Callable[[Shapes, str], Any]
    """(shapes, name of the file) -> NetworkConfig. Raises ValueError unless every key and shape fits."""
    release: Callable[[Any], str]
    """What was published with these sizes, or the sizes."""
    layout: ChunkLayout
    """Of the released models; a file of ours says its own in the metadata."""
    frames: Frames
    latents: Latents
    noise: Noise
    guidance: Guidance
    rates: Sequence[int]
    """Frames per second that the network takes as an input."""
    takes_rate: Callable[[Any], bool]
    """Whether a network of this config takes the frame rate at all."""
    loaders: Loaders
    known_by_shapes: bool = True
    """Whether shapes can tell the family: otherwise a file has to say it, or the user."""
    declares: Callable[[Iterable[str], Mapping[str, str]], bool] = declares_nothing
    """(keys of a file, its metadata) -> whether it says that it is of this family, or of one like it; then shapes of others do not count."""
    file_names: tuple[str, ...] = ()
    """Words in the names of its published files, in lower case with hyphens. Under such a name a silent file is no other family's."""
    other_names: tuple[str, ...] = ()
    """The same of models that are no family here and have the same shapes. One with a word of `file_names` in it says more than that word."""
    shared: Callable[[Any], bool] = shares_nothing
    """Whether models that are no family here have the shapes of this config: then a silent file has to have a word of `file_names` in its name."""
    bundled: Bundled | None = None
    blocks: str = "blocks."
    """How the names of the parameters of its layers begin: in an fp8 file their matrices stay fp8."""
    check: Callable[[ChunkSchedule], None] = any_schedule
    """Raises ValueError, with the way out, for a schedule that the network was not trained for."""
    check_levels: Callable[[Sequence[float]], None] = any_levels
    """The same for the noise levels of a run."""
    one_length: bool = False
    """Whether it makes chunks of the trained length alone."""
    whole_chunks: bool = False
    """Whether the last chunk of a film has to be full too."""
    clean_pass: bool = True
    """Whether a finished chunk is passed through the network once more; without it later chunks see what its last computed step left."""
    recache: bool = False
    """Whether its finished chunks may be shown to it once more, clean and with another text, as history."""
    published: Published = Published()
    words: int | None = None
    """Rows of text that the network reads at most, every one of them: padding is cut off. None: text is taken as the encoder made it."""
    solving: Callable[[Solver], Solver] = lambda solver: solver
    """A solver -> as the family runs it."""
    usual: Usual = Usual()
    """Films of the bundled model."""

    def require_rate(self, fps: int) -> int:
        """Raises ValueError for a frame rate that the family has not learnt."""
        if fps not in self.rates:
            raise ValueError(
                f"{fps} frames per second were asked for: the network has learnt {' and '.join(map(str, self.rates))}, choose one of them"
            )
        return fps

    def require_frames(self, pixels: int, chunk: int) -> int:
        """Of a film of so many frames in chunks of `chunk` latent frames, the latent frames. Raises ValueError, with the nearest that work, for a
        film that the family does not make."""
        if not self.whole_chunks:
            return self.frames.require(pixels)
        below, above = self.frames.nearest(pixels, chunk)
        if below != pixels:
            raise ValueError(
                f"{self.title} makes whole chunks of {self.frames.pixel(chunk)} frames, and {pixels} do not divide: use {below} or {above}"
            )
        return self.frames.latent(pixels)

    def require_chunk(self, frames: int, layout: ChunkLayout) -> None:
        """Raises ValueError for chunks of so many latent frames where the network was trained with others and can make no others."""
        if self.one_length and frames != layout.chunk_frames:
            raise ValueError(
                f"{self.title} was trained with {layout.chunk_frames} latent frame{'s' * (layout.chunk_frames > 1)} per chunk, and chunk_frames is "
                f"{frames}: set it to 0 or {layout.chunk_frames}; if the file is of another model, choose that in the input family of its loader"
            )

    def layout_of(self, metadata: Mapping[str, str]) -> ChunkLayout:
        """What a file says of its training; where it says nothing, that of the released models."""
        if "chunk_frames" not in metadata:
            return self.layout
        chunk_frames, window = int(metadata["chunk_frames"]), int(metadata["window_chunks"])
        return replace(self.layout, chunk_frames=chunk_frames, window=window, fps=OUR_RATE, causal=True)
