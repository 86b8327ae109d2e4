"""Checkpoints of causal Wan models, in the forms in which they are published: recognised, read as data alone, and taken for no other family."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core.models.bundle import NETWORK
from flowcache_core.models.causal_wan_family import CAUSAL, CAUSAL_FORCING, CAUSVID, FRAMEWISE, KREA_REALTIME, LONGLIVE, SELF_FORCING
from flowcache_core.models.checkpoint import load_network_file, recognise
from flowcache_core.models.magi_family import MAGI
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.untrusted import OUTLINE_BYTES, torch_file
from tests.tiny_causal import PUBLISHED, SILENT, TO_HOST, tiny_causal
from tests.tiny_magi import tiny_magi

SMALL, LARGE = SkyReelsConfig(1536, 8960, 30), SkyReelsConfig(5120, 13824, 40)
MAPS = Path("/proc/self/maps")
AT_SMALL = "Self-Forcing, Causal-Forcing, Causal-Forcing frame-wise, CausVid or LongLive"


def on_meta(config: SkyReelsConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(SkyReelsV2(config).state_dict())


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(tiny_causal().state_dict())


def holds(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    mine = network.state_dict()
    return mine.keys() == weights.keys() and all(torch.equal(mine[key], weights[key]) for key in weights)


@pytest.mark.parametrize("form", [*PUBLISHED, *SILENT])
def test_a_torch_file_gives_the_network_that_it_holds(form: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**PUBLISHED, **SILENT}[form](weights), tmp_path / "net.pt")
    assert holds(load_network_file(tmp_path / "net.pt", family="self-forcing"), weights)


@pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.name)
def test_of_two_generators_the_one_is_read_that_the_published_settings_read(family: Any, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Averaged or as trained last, as the released inference does; the other where a file has one alone."""
    one, other = ("generator", "generator_ema") if family in (CAUSAL_FORCING, CAUSVID, LONGLIVE) else ("generator_ema", "generator")
    mine, far = ({f"model.{key}": scale * weight for key, weight in weights.items()} for scale in (1, 2))
    for held in ({one: mine, other: far}, {other: far, one: mine}, {other: mine}, {"model": mine}):
        torch.save(held, tmp_path / "net.pt")
        assert holds(load_network_file(tmp_path / "net.pt", family=family.name), weights)


@pytest.mark.parametrize("form", [*PUBLISHED, *SILENT])
def test_a_repack_gives_the_network_that_it_holds(form: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """As safetensors, the dictionaries joined by dots."""
    held = {**PUBLISHED, **SILENT}[form](weights)
    flat = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    flat |= {f"{part}.{key}": value.clone() for part, some in held.items() if isinstance(some, dict) for key, value in some.items()}
    save_file(flat, tmp_path / "net.safetensors", TO_HOST)
    assert holds(load_network_file(tmp_path / "net.safetensors", family="krea-realtime"), weights)
    with pytest.raises(ValueError, match=f"could be {AT_SMALL}|could be .* or Krea Realtime"):
        load_network_file(tmp_path / "net.safetensors")


@pytest.mark.skipif(not MAPS.exists(), reason="Linux says which memory is a mapped file")
def test_tensors_of_a_torch_file_stay_views_of_it(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(PUBLISHED["training state"](weights), tmp_path / "net.pt")
    key = "generator_ema.model._fsdp_wrapped_module.head.head.weight"
    read = dict(open_checkpoint(tmp_path / "net.pt").tensors([key]))
    assert torch.equal(read[key], weights["head.head.weight"])
    mapped = [line.split("-", 1) for line in MAPS.read_text().splitlines() if line.endswith("net.pt")]
    assert any(int(start, 16) <= read[key].data_ptr() < int(rest.split()[0], 16) for start, rest in mapped)


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_training_state_of_a_released_size_is_one_of_the_causal_models(form: str) -> None:
    for config, what in ((SMALL, AT_SMALL), (LARGE, None)):
        held = PUBLISHED[form](on_meta(config))
        keys = {f"{part}.{key}": value for part, some in held.items() if isinstance(some, dict) for key, value in some.items()}
        if what is None:
            found = recognise(keys, "net.pt")
            assert (found.family, found.release) == (KREA_REALTIME, "Krea Realtime 14B")
            continue
        with pytest.raises(ValueError, match=f"net.pt could be {what}, which have the same shapes: choose one in the input family"):
            recognise(keys, "net.pt")
        found = recognise(keys, "net.pt", family="causal-forcing-framewise")
        assert (found.family, found.release) == (FRAMEWISE, "Causal-Forcing frame-wise 1.3B")


def test_metadata_say_what_shapes_cannot() -> None:
    small = on_meta(SMALL)
    assert recognise(small, "net", {"architecture": "self-forcing"}).family is SELF_FORCING
    assert recognise(on_meta(LARGE), "net", TO_HOST).family is KREA_REALTIME
    with pytest.raises(ValueError, match=f"net could be {AT_SMALL}, which"):
        recognise(small, "net", TO_HOST)
    for odd in ('{"transformer": {"causal_ar": false}}', '{"transformer": 3}', "[1]", "no json", '{"transformer": {"causal_ar": "yes"}}'):
        with pytest.raises(ValueError, match=r"frame-rate tensors .* then choose it in the input family"):
            recognise(small, "net", {"config": odd})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_label_in_the_file_counts_more_than_its_name(prefix: str, shape: tuple[int, ...]) -> None:
    large = {prefix + key: tensor for key, tensor in on_meta(LARGE).items()}

    def labelled(label: str) -> dict[str, Tensor]:
        return {**large, f"{prefix}model_type.{label}": torch.empty(shape, device="meta")}

    found = recognise(labelled("SkyReels-V2-DF-14B-720P"), "wan2_renamed.safetensors")
    assert found.family is SKYREELS
    assert not [name for name in found.names.values() if "model_type" in name]
    for label in ("SkyReels-V2-T2V-14B-540P", "Wan2_1-FLF2V-14B-720P"):
        with pytest.raises(ValueError, match=f"it calls itself {label}: choose what it is in the input family"):
            recognise(labelled(label), "skyreels-df.safetensors")


def test_a_generator_without_its_training_is_known_by_its_names() -> None:
    """As Krea Realtime is published."""
    inside = {config: {f"model.{key}": tensor for key, tensor in on_meta(config).items()} for config in (SMALL, LARGE)}
    assert recognise(inside[LARGE], "krea-realtime-video-14b.safetensors").family is KREA_REALTIME
    with pytest.raises(ValueError, match=f"net could be {AT_SMALL}, which have the same shapes: choose one in the input family"):
        recognise(inside[SMALL], "net")


def test_a_bidirectional_checkpoint_is_refused_or_asked_about() -> None:
    with pytest.raises(ValueError, match=r"wan2.1_t2v_1.3B.safetensors has the sizes of SkyReels-V2-DF 1.3B but not its frame-rate tensors"):
        recognise(on_meta(SMALL), "wan2.1_t2v_1.3B.safetensors")
    large = on_meta(LARGE)
    text_to_video = "Skyreels/Wan2_1-SkyReels-V2-T2V-14B-720P_fp16.safetensors"
    words = {"wan2.1_t2v_14B.safetensors": "wan2", "krea-realtime-video-14b.safetensors": "krea-realtime", text_to_video: "skyreels-v2-t2v"}
    for name, word in words.items():
        with pytest.raises(ValueError, match=f"has the shapes of SkyReels-V2 .* its name speaks of '{word}': choose what it is in the input family"):
            recognise(large, name)
        assert recognise(large, name, family="krea-realtime").family is KREA_REALTIME
    assert recognise(large, "Wan2_1-SkyReels-V2-DF-14B-540P.safetensors").family is SKYREELS
    for name in ("Wan14BT2VFusioniX_fp16_.safetensors", "t2v_14b.safetensors", "model-00001-of-00006.safetensors"):
        with pytest.raises(ValueError, match=r"neither the file nor its name says which it is: .* or give it a name with 'skyreels' in it"):
            recognise(large, name)
        assert recognise(large, name, family="skyreels-v2-df").family is SKYREELS
    with pytest.raises(ValueError, match=r"image-to-video or control checkpoint .*: Self-Forcing needs no such weights"):
        recognise({**on_meta(SMALL), "blocks.0.cross_attn.k_img.weight": torch.empty(1)}, "net", family="self-forcing")


@pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.name)
def test_no_family_is_mistaken_for_a_causal_one(family: Any) -> None:
    sky, magi = open_checkpoint(NETWORK).stored, dict(tiny_magi().state_dict())
    with pytest.raises(ValueError, match=r"sky has frame-rate tensors .* and .* takes no frame rate"):
        recognise(sky, "sky", family=family.name)
    with pytest.raises(ValueError, match=r"magi: .* it has no patch_embedding.weight"):
        recognise(magi, "magi", family=family.name)
    assert not family.declares(sky, {})
    assert not family.declares(magi, {})


@pytest.mark.parametrize("other", [SKYREELS, MAGI], ids=lambda family: family.name)
def test_a_training_state_is_mistaken_for_no_other_family(other: Any, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(PUBLISHED["training state"](weights), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt: this is not a .* checkpoint: it has no"):
        load_network_file(tmp_path / "net.pt", family=other.name)


# what else a .pt file may be


class Evil:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "this was run")


def test_a_file_with_code_in_it_is_refused_by_what_it_names(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"generator": {f"model.{key}": weight for key, weight in weights.items()}, "config": Evil(tmp_path / "mark")}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt holds code or objects beside tensors \(.*pathlib.*\), and a file that can run code is not opened"):
        open_checkpoint(tmp_path / "net.pt")
    assert not (tmp_path / "mark").exists()


def nested(depth: int, times: int) -> Any:
    inner: Any = torch.zeros(1)
    for _ in range(depth):
        inner = {str(number): inner for number in range(times)}
    return inner


HOSTILE: dict[str, Any] = {
    "of many rows that are one": lambda: {"generator": {"model.patch_embedding.weight": torch.zeros(2).expand(10**9, 2)}},
    "sparse": lambda: {"generator": {"model.patch_embedding.weight": torch.eye(4).to_sparse()}},
    "of complex numbers": lambda: {"generator": {"model.patch_embedding.weight": torch.zeros(2, dtype=torch.complex64)}},
    "of no memory": lambda: {"generator": {"model.patch_embedding.weight": torch.zeros(2, device="meta")}},
    "many times the same": lambda: nested(4, 300),
    "of a long description": lambda: {"generator": {"x" * (OUTLINE_BYTES + 1): torch.zeros(1)}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused(kind: str, tmp_path: Path) -> None:
    torch.save(HOSTILE[kind](), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt .* is not a whole PyTorch file of tensors: .*; download it again, or use a safetensors file"):
        torch_file(tmp_path / "net.pt")


@pytest.mark.parametrize("damage", ["short", "of an old format", "no archive", "empty"])
def test_a_damaged_file_is_refused(damage: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=damage != "of an old format")
    whole = path.read_bytes()
    path.write_bytes({"short": whole[:-500], "of an old format": whole, "no archive": b"generator" * 99, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"net.pt \({path.stat().st_size} bytes\) is not a whole PyTorch file of tensors: "):
        open_checkpoint(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_file_damaged_anywhere_is_read_or_refused_with_a_sentence(seed: int, tmp_path: Path) -> None:
    path, chance = tmp_path / "net.pt", Random(seed)
    torch.save({"generator": {"model.patch_embedding.weight": torch.zeros(2, 3)}, "step": 5}, path)
    whole = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        with suppress(ValueError):
            assert all(type(tensor) is Tensor for tensor in torch_file(path).values())


def test_what_is_no_network_is_named(tmp_path: Path) -> None:
    torch.save({"optimizer": {"state": {0: {"step": torch.zeros(1)}}}, "epoch": 3, "list": [torch.zeros(1)]}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt: this is not a checkpoint of SkyReels-V2 diffusion forcing, MAGI-1, "):
        load_network_file(tmp_path / "net.pt")
    torch.save({"generator_lora": {"model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora.pt is a LoRA"):
        load_network_file(tmp_path / "lora.pt")
