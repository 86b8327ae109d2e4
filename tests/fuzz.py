"""Files and texts from outside, damaged at random: `python -m tests.fuzz --inputs 100000 --seed 1` makes many more than the tests do.

Every input ends in success or in a sentence (ValueError) of one line, soon, and nothing outside of its folder is opened. An input is made
from its seed, kind and number alone, so that what fails can be made again: `--kind header --first 4711 --inputs 1`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save, save_file

from flowcache_core.bench.frontier import Kept, prompts_of
from flowcache_core.kv.named import policy_named as kv_named
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.salience import HeadInfo, SalienceHead
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.models.magi_text import ROWS, TRAITS, prompt_text, read_special_tokens
from flowcache_core.models.magi_vae import MagiVAE, MagiVAEConfig
from flowcache_core.models.shards import open_checkpoint, read
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.policies import POLICIES
from flowcache_core.policies.named import policy_named
from flowcache_core.sampling.plan import Plan, read_plan
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.training.loop import load_saved
from flowcache_core.training.salience import _begun, _lines
from flowcache_core.training.salience_clips import read_embeddings
from tests.fuzz_states import HostileStates
from tests.fuzz_values import KEYS, NUMBERS, TEXTS, Random, damaged, text, value

MOST_S, STUCK_S = 2.0, 20
"""Seconds of computing that an input may take, and seconds after which it counts as stuck."""
LONGEST = 1500
"""Characters of a sentence."""
INDEX = "model.safetensors.index.json"


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + data


SHAPES = ([], [0], [2], [2, 2], [1] * 9, [2**31, 2**31], [0, 2**63], [-1], [2**64], [1.5], ["2"], None)
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "I64": 8, "BOOL": 1}
DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F4", "I64", "BOOL", "C64", "f32", "", 3, None)


def tensor(rng: Random) -> Any:
    sound = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    if rng.random() < 0.3:
        return value(rng)
    return {**sound, **{k: v for k, v in (("dtype", rng.choice(DTYPES)), ("shape", rng.choice(SHAPES)),
                                          ("data_offsets", [rng.choice(NUMBERS[:12]), rng.choice(NUMBERS[:12])])) if rng.random() < 0.4}}  # fmt: skip


def small_network() -> bytes:
    torch.manual_seed(0)
    net = SkyReelsV2(SkyReelsConfig(128, 8, 1, 4))
    return save({key: weight.half().contiguous() for key, weight in net.state_dict().items()}, {"architecture": "skyreels-v2-df"})


def small_head(folder: Path) -> bytes:
    path = folder / "sound.head"
    SalienceHead(HeadInfo(1, 8, 4, 3, "model", "sum", "teacher", 1, "licence")).save(path)
    data = path.read_bytes()
    path.unlink()
    return data


def special_tokens(**changed: Any) -> bytes:
    """A file with the learned tokens of MAGI-1, in some of which other values stand."""
    file = io.BytesIO()
    one = np.ones((1, 2), np.float16)
    np.savez_compressed(file, **{"caption_token": one, "logo_token": one, "other_tokens": np.ones((ROWS, 2), np.float16), **changed})
    return file.getvalue()


def array(rng: Random) -> Any:
    """Anything that NumPy keeps without pickle, small."""
    shape = rng.choice(((), (0,), (1,), (1, 2), (2, 1), (ROWS, 2), (ROWS + 9, 2), (ROWS, 0), (1, 1, 1), (ROWS, 3)))
    if rng.random() < 0.1:
        return np.array(rng.choice(TEXTS))
    with np.errstate(all="ignore"):
        return np.full(shape, rng.choice(NUMBERS[:6] + NUMBERS[13:]), np.float64).astype(rng.choice(("f2", "f4", "f8", "i4", "u1", "?", "c8", "S3")))


class Inputs:
    """The kinds of input. Each takes its random numbers and a folder of its own, and yields calls that have to be answered."""

    def __init__(self, base: Path) -> None:
        torch.manual_seed(0)
        self.network, self.head = small_network(), small_head(base)
        self.saved = base / "sound.pt"
        torch.save({"model": {}, "average": {"x": torch.zeros(2)}, "step": 1, "optimisers": []}, self.saved)
        self.state = self.saved.read_bytes()
        self.saved.unlink()
        self.plan = Plan.full(ChunkSchedule(9, 3, 6, 2)).as_dict()
        save_file({"z": torch.zeros(2)}, base / "out.safetensors")
        self.special = special_tokens()
        with torch.device("meta"):
            self.vae = {key: list(weight.shape) for key, weight in MagiVAE(MagiVAEConfig(256, 8, 1, 1, 1)).state_dict().items()}
        self.states = HostileStates(base / "states")

    def header(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """Headers made of odd values."""
        entries = {rng.choice((*KEYS, *TEXTS)): tensor(rng) for _ in range(rng.randrange(4))}
        header = damaged(rng, text(entries)) if rng.random() < 0.5 else text(entries)
        length = rng.choice((None, None, None, *NUMBERS[:12]))
        path = folder / "net.safetensors"
        path.write_bytes(with_header(header, bytes(rng.choice((0, 8, 16))), length))  # type: ignore[arg-type]
        for call in (open_checkpoint, read, load_network_file, SalienceHead.load):
            yield lambda call=call: call(path)  # type: ignore[misc]

    def weights(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """A network that was whole."""
        size = struct.unpack("<Q", self.network[:8])[0] + 8
        path = folder / "net.safetensors"
        path.write_bytes(damaged(rng, self.network[:size]) + self.network[size : rng.choice((None, None, size + 100))])
        yield lambda: load_network_file(path)

    def head_file(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """A salience head that was whole, damaged or with other metadata and tensors."""
        path = folder / "head.safetensors"
        path.write_bytes(damaged(rng, self.head) if rng.random() < 0.5 else self._other_head(rng))
        yield lambda: SalienceHead.load(path)

    def _other_head(self, rng: Random) -> bytes:
        length = struct.unpack("<Q", self.head[:8])[0] + 8
        header, data = json.loads(self.head[8:length]), self.head[length:]
        for _ in range(rng.choice((0, 1, 1, 2))):
            metadata, key = header["__metadata__"], rng.choice(list(header))
            if rng.random() < 0.6:
                metadata[rng.choice(list(metadata))] = str(rng.choice((*NUMBERS, *TEXTS[:8], "1,nan,1", "1,2")))
            elif key != "__metadata__":
                header[key] = {**header[key], **rng.choice(({"shape": rng.choice(SHAPES)}, {"dtype": rng.choice(DTYPES)}))}
        return with_header(text(header), data)

    def vae_file(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """A MAGI-1 VAE of zeros, in which some keys, shapes or types are others."""
        shapes, path = dict(self.vae), folder / "vae.safetensors"
        for _ in range(rng.choice((0, 1, 1, 2))):
            key = rng.choice(list(shapes))
            other = rng.choice((*KEYS, "encoder.blocks.", "encoder.blocks.x.norm1.weight", f"encoder.blocks.{'9' * 900}.norm1.weight", key))
            shapes[other] = rng.choice(([], [0], [1], shapes[key][::-1], [2, 2], [0, 2**40], [2] * 9, shapes[key]))
            if rng.random() < 0.3:
                del shapes[key]
        dtypes, header, end = rng.choice((("F16",), ("F32",), ("F8_E4M3",), ("BF16", "I32"), ("I64",), ("BOOL", "F16"))), {}, 0
        for key, shape in shapes.items():
            dtype = rng.choice(dtypes)
            begin, end = end, end + math.prod(shape) * WIDTHS[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        path.write_bytes(with_header(damaged(rng, text(header)) if rng.random() < 0.2 else text(header), b""))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + end)
        yield lambda: MagiVAE.from_state_dict(read(path)[0])

    def index(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """An index beside files, a link and a set of shards; what it names may lie elsewhere."""
        for name, key in (("a", "x"), ("b", "y")):
            save_file({key: torch.zeros(2)}, folder / f"{name}.safetensors")
        (folder / "link.safetensors").symlink_to(rng.choice(("a.safetensors", "nowhere", "link.safetensors", ".")))
        names = {rng.choice(KEYS): rng.choice(TEXTS) for _ in range(rng.randrange(4))}
        values = rng.choice(({"weight_map": names}, {"weight_map": value(rng)}, value(rng)))
        (folder / INDEX).write_bytes(damaged(rng, text(values)) if rng.random() < 0.3 else text(values))
        yield lambda: open_checkpoint(folder)
        for name in ("a", "link"):
            yield lambda name=name: open_checkpoint(folder / f"{name}.safetensors")  # type: ignore[misc]

    def shards(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """Names that number shards, or nearly do."""
        for _ in range(rng.randrange(1, 4)):
            number, count = (rng.choice(("1", "00001", "00002", "0", "9" * 40, "\u0663", "-1", "")) for _ in range(2))
            save_file({rng.choice(KEYS[:3]): torch.zeros(2)}, folder / f"{rng.choice(('model', 'm-1-of', '..'))}-{number}-of-{count}.safetensors")
        yield lambda: open_checkpoint(folder)
        for path in sorted(folder.iterdir()):
            yield lambda path=path: open_checkpoint(path)  # type: ignore[misc]

    def plans(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """A plan or a report that was whole."""
        values = {**self.plan, **{rng.choice((*self.plan, "partial", "part")): value(rng) for _ in range(rng.randrange(3))}}
        said = rng.choice((values, [values], {"plan": values}, {"plan": value(rng)}, value(rng)))
        whole = json.dumps(said)
        yield lambda: checked(read_plan(damaged(rng, whole.encode()).decode("utf-8", "replace") if rng.random() < 0.4 else whole))

    def prompts(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """Files of prompts, of the benches and of a training."""
        lines = [f"{rng.choice((*NUMBERS, *TEXTS, chr(178)))}{rng.choice((chr(9), ' ', ''))}{rng.choice(TEXTS)}" for _ in range(rng.randrange(4))]
        path = folder / "prompts.tsv"
        path.write_bytes(damaged(rng, "\n".join(lines).encode("utf-8", "surrogatepass")))
        yield lambda: [torch.Generator().manual_seed(seed) for seed, _ in prompts_of(argparse.Namespace(prompts_file=path, seed=None))]
        yield lambda: _lines(path)

    def work(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """What a training or a bench goes on from."""
        (folder / "plan.json").write_bytes(damaged(rng, text(rng.choice(({"model": "m"}, value(rng))))))
        yield lambda: _begun(folder / "plan.json")
        (folder / "films.jsonl").write_bytes(b"\n".join(damaged(rng, text(rng.choice(({"made_by": "x"}, value(rng))))) for _ in range(3)))
        yield lambda: Kept(folder / "films.jsonl", "float32")
        (folder / "dit.pt").write_bytes(damaged(rng, self.state))
        yield lambda: load_saved(folder / "dit.pt")
        save_file({rng.choice(("", "a")): torch.zeros(rng.choice(([2, 4], [4], [2, 0], [1, 2, 4]))) for _ in range(2)}, folder / "text.safetensors")
        yield lambda: read_embeddings(folder / "text.safetensors", ["a"], 4)

    def settings(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """Names and settings of policies, as they are typed."""
        names = [kind.name for kind in (*POLICIES, *KV_POLICIES)]
        fields = ("share", "threshold", "order", "seconds", "partial", "kernel", "rescale", "weight", "", "nobody")
        parts = [f"{rng.choice(fields)}{rng.choice(('=', '', '=='))}{rng.choice((*NUMBERS, *TEXTS[:8]))}" for _ in range(rng.randrange(4))]
        said, name = rng.choice((" ", ",", "\n")).join(parts), rng.choice((*names, *TEXTS))
        yield lambda: policy_named(name, said)
        yield lambda: kv_named(name, said)

    def learned(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """The special tokens of MAGI-1, as a file of NumPy arrays that was whole."""
        changed = {rng.choice(("caption_token", "logo_token", "other_tokens", "x")): array(rng) for _ in range(rng.choice((0, 1, 1, 2)))}
        data = damaged(rng, self.special) if rng.random() < 0.5 else special_tokens(**changed)
        (folder / "special_tokens.npz").write_bytes(data)
        mask = rng.choice((None, torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1, 4), torch.tensor([[0, 1, 1]])))
        traits, words = rng.sample([*TRAITS, "nobody"], rng.randrange(3)), torch.ones(1, 3, rng.choice((1, 2)))
        yield lambda: prompt_text(words, read_special_tokens(folder / "special_tokens.npz"), traits, mask)

    def resumed(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        """The state of a run that was stopped, in place of which anything may lie."""
        return self.states.of(rng, folder)


def checked(plan: Plan | tuple[Plan, ...]) -> object:
    """A plan that could be read meets the run that it is for, and another."""
    return [one.check(ChunkSchedule(9, 3, 6, 2)) for one in (plan if isinstance(plan, tuple) else (plan,))]


KINDS = ("header", "weights", "head_file", "vae_file", "index", "shards", "plans", "prompts", "work", "settings", "learned", "resumed")


class Stuck(Exception):
    """An input took too long."""


class Opened:
    """Which files of a folder were opened while it listened; Python tells of every one."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.paths is not None and isinstance(args[0], str):
            self.paths.append(args[0])

    @contextmanager
    def only(self, folder: Path, base: Path) -> Iterator[None]:
        """Nothing of `base` is opened but what lies in `folder`, by the name under which it lies there."""
        self.paths = []
        try:
            yield
        finally:
            paths, self.paths = self.paths, None
        outside = [path for path in paths if path.startswith(str(base)) and Path(path).parent.resolve() != folder]
        assert not outside, f"opened {outside}"
        assert not [path for path in paths if path.startswith("/etc/passwd")]


OPENED = Opened()


def answer(call: Callable[[], object]) -> bool:
    """Whether it succeeds. AssertionError or Stuck for what is neither a success nor a refusal; any other error as it comes."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stuck(f"more than {STUCK_S} s")

    before, begun = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(STUCK_S)
    try:
        call()
    except ValueError as refused:
        said, kind = str(refused), type(refused)
    else:
        return True
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert time.process_time() - begun < MOST_S, "too slow"
    assert kind is ValueError, kind
    assert said.isprintable(), repr(said)
    assert len(said.split()) > 3, said
    assert len(said) < LONGEST, said
    return False


def one(inputs: Inputs, base: Path, kind: str, seed: int, number: int) -> int:
    """Makes an input and has it answered -> how many of its calls succeed."""
    rng = Random(f"{seed} {kind} {number}")
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder, succeeded = Path(name), 0
        for call in getattr(inputs, kind)(rng, folder):
            with OPENED.only(folder, base):
                succeeded += answer(call)
        return succeeded


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="of every kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these (default: all)")
    args = parser.parse_args()
    found = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        inputs = Inputs(base)
        for kind in args.kind or KINDS:
            begun, succeeded = time.perf_counter(), 0
            for number in range(args.first, args.first + args.inputs):
                try:
                    succeeded += one(inputs, base, kind, args.seed, number)
                except Exception:
                    found += 1
                    print(f"--kind {kind} --seed {args.seed} --first {number} --inputs 1\n{traceback.format_exc()}", flush=True)
            print(f"{kind}: {args.inputs} inputs, {succeeded} calls succeeded, {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"{found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
