"""The command that trains a salience head: for any checkpoint, for the bundled models, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core import models
from flowcache_core.kv.scores.salience import BUNDLED, Salience, SalienceHead
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.training import salience as training
from flowcache_core.training.salience_clips import Clip
from tests.test_salience import network_of
from tests.toy_family import TOY, toy_network


def checkpoint_of(net: SkyReelsV2, folder: Path, prompts: tuple[str, ...] = ("red circle", "blue star", "green square")) -> list[str]:
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    return ["--model", str(folder / "model.safetensors"), "--prompts", str(folder / "prompts.txt"), "--work", str(folder / "work"),
            "--out", str(folder / "head.safetensors"), "--clips", "3", "--steps", "2", "--sample-steps", "2", "--frames", "13", "--size", "32",
            "--chunk-frames", "2", "--window", "2", "--tokens", "10"]  # fmt: skip


def run(arguments: list[str]) -> None:
    training.run(training.arguments().parse_args(arguments))


def test_the_command_trains_a_head_for_any_checkpoint(net: SkyReelsV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = checkpoint_of(net, tmp_path)
    run(arguments)
    Salience(path=str(tmp_path / "head.safetensors")).for_network(network_of())
    head = SalienceHead.load(tmp_path / "head.safetensors")
    assert head.info.base_sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert head.info.block_frames == 2
    assert head.info.train_clips == 3
    assert "top_quarter" in capsys.readouterr().out

    clip = tmp_path / "work" / "clips" / "train-00001.safetensors"
    made = {k: v.clone() for k, v in load_file(clip).items()}
    clip.unlink()
    (tmp_path / "work" / "salience.pt").unlink()
    run(arguments)
    assert all(torch.equal(v, made[k]) for k, v in load_file(clip).items())
    again = SalienceHead.load(tmp_path / "head.safetensors").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in head.state_dict().items())


def test_embeddings_of_another_encoder_are_read_by_prompt(net: SkyReelsV2, tmp_path: Path) -> None:
    arguments = [*checkpoint_of(net, tmp_path), "--embeddings", str(tmp_path / "text.safetensors")]
    texts = {p: torch.randn(6, net.config.text_dim) for p in ("", "red circle", "blue star", "green square")}
    save_file({k: v for k, v in texts.items() if k != "blue star"}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"lacks the embeddings of 1 of 4 prompts \(the first: 'blue star'\)"):
        run(arguments)
    save_file({**texts, "red circle": torch.ones(6, 3)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"the embedding of 'red circle' has shape \(6, 3\), but the model reads \[tokens, 64\]"):
        run(arguments)
    save_file(texts, tmp_path / "text.safetensors")
    run(arguments)
    run([*checkpoint_of(net, tmp_path), "--work", str(tmp_path / "words")])
    clips = [Clip.load(tmp_path / work / "clips" / "train-00000.safetensors") for work in ("work", "words")]
    assert not torch.allclose(clips[0].hidden, clips[1].hidden)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--clips", "0"], "0 clips, 2 steps, 10 tokens"),
        (["--sample-steps", "0"], "0 sampling steps"),
        (["--frames", "5"], "clips of 5 frames are one chunk of at most 2 latent frames.*use at least 9 frames"),
        (["--frames", "17"], "clips of 17 frames are longer than the 13"),
        (["--frames", "12"], r"12 frames are not 4n \+ 1"),
        (["--size", "40"], "a picture of 40 pixels"),
        (["--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--model", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
    ],
)
def test_the_command_refuses_before_it_computes(net: SkyReelsV2, tmp_path: Path, change: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run([*checkpoint_of(net, tmp_path), *change])
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_needs_prompts_an_output_and_the_text_it_reads(net: SkyReelsV2, tmp_path: Path) -> None:
    arguments = checkpoint_of(net, tmp_path)
    with pytest.raises(ValueError, match="give a file with one prompt a line"):
        run([a for i, a in enumerate(arguments) if not i or "--prompts" not in arguments[i - 1 : i + 1]])
    with pytest.raises(ValueError, match="Name a file with --out"):
        run([a for i, a in enumerate(arguments) if not i or "--out" not in arguments[i - 1 : i + 1]])
    (tmp_path / "prompts.txt").write_text("only one\n")
    with pytest.raises(ValueError, match="1 prompts are too few"):
        run(arguments)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_embedding.0.weight"] = torch.zeros(128, 4096)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"reads the 4096 channels of umT5.*--embeddings"):
        run(arguments)


def test_a_family_without_bidirectional_attention_has_no_teacher(net: SkyReelsV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, TOY))
    arguments = checkpoint_of(net, tmp_path)
    save_file(toy_network().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is of Toy, which only looks back: a salience head is taught by the same model, bidirectional"):
        run(arguments)
    assert not (tmp_path / "work").exists()


def test_a_work_folder_serves_one_training(net: SkyReelsV2, tmp_path: Path) -> None:
    arguments = checkpoint_of(net, tmp_path)
    run(arguments)
    with pytest.raises(ValueError, match=r"was begun for another training \(steps was 2 and is now 3\): name another with --work"):
        run([*arguments, "--steps", "3"])


def test_the_few_step_model_is_taught_by_the_model_that_it_was_distilled_from() -> None:
    args = training.arguments().parse_args(["--model", "tiny-causal"])
    found = training.subject(args, torch.device("cpu"))
    assert found.taught_by is not None
    assert (found.name, found.taught_by.name) == ("tiny-causal", "tiny-skyreels")
    assert (found.job.steps, found.job.cfg, found.job.ar_step) == (4, 1.0, 4)
    assert (args.sample_steps, training.subject(training.arguments().parse_args([]), torch.device("cpu")).job.steps) == (None, 20)


def test_another_head_is_judged_on_the_same_clips(net: SkyReelsV2, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = checkpoint_of(net, tmp_path)
    with pytest.raises(ValueError, match=r"this head is for 6 layers of 256 channels .tiny-skyreels., the model has 2 layers of 128"):
        run([*arguments, "--beside", str(BUNDLED)])
    run(arguments)
    once = capsys.readouterr().out
    run([*arguments, "--beside", str(tmp_path / "head.safetensors")])
    tables = capsys.readouterr().out.split("head.safetensors on the same clips\n")
    assert tables[0].splitlines()[:5] == once.splitlines()[:5]
    assert tables[1].splitlines()[:4] == once.splitlines()[1:5]
