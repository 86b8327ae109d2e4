"""`python -m flowcache_core.training all`: how the bundled models came to be; every stage is a command of its own too."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..device import fast_dtype
from ..files import whole, write_text
from ..models import bundle
from ..models.checkpoint import read
from ..models.family import Family
from ..models.skyreels_family import SKYREELS
from ..run.generate import decode, generate
from ..show.film import write_picture
from . import preview
from .basis import BASIS, basis_of
from .clips import POOL
from .evaluate import contact_sheet, evaluate, hidden, vae_of
from .loop import TrainOptions
from .recipes import RECIPES, Recipe
from .vae import reconstruction


def main() -> None:
    parser = argparse.ArgumentParser(prog="flowcache_core.training", description=__doc__)
    parser.add_argument("--model", choices=RECIPES, default=next(iter(RECIPES)))
    parser.add_argument("--out", type=Path, help="folder of checkpoints, by default runs/MODEL; a stopped stage goes on from there")
    stages = parser.add_subparsers(dest="stage", required=True)
    stages.add_parser("all", help="vae, dit, install and evaluate, one after the other")
    one = stages.add_parser("vae", help="the small VAE")
    one.add_argument("--start", type=Path, help="a VAE of an earlier training to begin with, such as the bundled one; of the same basis.safetensors")
    for part in sorted({part for recipe in RECIPES.values() for part in recipe.vae_steps}):
        one.add_argument(f"--{part}-steps", type=int, help=_default(part))
    two = stages.add_parser("dit", help="the network")
    two.add_argument("--steps", type=int, help="over which the learning rate falls")
    two.add_argument("--until", type=int, help="stop after so many of the steps")
    two.add_argument("--minutes", type=float, help="stop after so long")
    two.add_argument("--batch", type=int)
    two.add_argument(
        "--clips", type=int, help=f"that are drawn by the end (default {POOL}); the same in every call; use more for more steps or larger batches"
    )
    two.add_argument("--start", type=Path, help="weights of an earlier training to begin with, such as the bundled ones")
    stages.add_parser("install", help="copy the averaged weights into the package")
    four = stages.add_parser("evaluate", help="the figures of the model card")
    four.add_argument("--prompts", type=int, default=50)
    four.add_argument("--json", type=Path)
    five = stages.add_parser("look", help="frames of one film, as a picture")
    five.add_argument("prompt")
    five.add_argument("--seed", type=int, default=0)
    for films in (four, five):
        films.add_argument("--cfg", type=float, help="guidance, by default that of the model card")
    stages.add_parser("preview", help="colours of the bundled VAE's latents, as the family holds them")
    args = parser.parse_args()

    recipe, out = RECIPES[args.model], args.out or Path("runs", args.model)
    if args.stage == "all":
        if recipe.vae:
            _vae(recipe, out, {}, None)
        recipe.network(out, recipe.steps, recipe.batch)
        _install(recipe, out)
        _evaluate(recipe, 50, None)
    elif args.stage == "vae":
        if recipe.vae is None:
            parser.error(f"{args.model} uses {bundle.files_of(recipe.family)[1].name}: train that with the model that it was made for")
        steps = {part: getattr(args, f"{part}_steps") for part in recipe.vae_steps}
        if args.start and steps.get("autoencoder"):
            parser.error("with --start there is no autoencoder to train: leave --autoencoder-steps out")
        try:
            start = _earlier(recipe.family, args.start) if args.start else None
        except (ValueError, OSError) as why:
            parser.error(f"--start: {why}")
        if start:
            _same_latents(recipe, out)
        _vae(recipe, out, steps, start)
    elif args.stage == "dit":
        if args.clips and recipe.teacher:
            parser.error(f"{args.model} learns from films that it makes: leave --clips out")
        try:
            options = TrainOptions(args.until, args.minutes, args.start, args.clips)
        except ValueError as why:
            parser.error(str(why))
        if args.start:
            try:
                _require_network(recipe.family, args.start)
            except (ValueError, OSError) as why:
                parser.error(f"--start: {why}")
            _same_latents(recipe, out)
        recipe.network(out, args.steps or recipe.steps, args.batch or recipe.batch, options)
    elif args.stage == "install":
        _install(recipe, out)
    elif args.stage == "evaluate":
        _evaluate(_guided(recipe, args.cfg), args.prompts, args.json)
    elif args.stage == "preview":
        _preview(recipe)
    else:
        _look(_guided(recipe, args.cfg), out, args.prompt, args.seed)


def _default(part: str) -> str:
    return ", ".join(f"{recipe.vae_steps[part]} for {name}" for name, recipe in RECIPES.items() if part in recipe.vae_steps)


def _guided(recipe: Recipe, cfg: float | None) -> Recipe:
    return recipe if cfg is None else replace(recipe, job=replace(recipe.job, cfg=cfg))


def _vae(recipe: Recipe, out: Path, steps: dict[str, int | None], start: dict[str, Tensor] | None) -> None:
    assert recipe.vae is not None
    recipe.vae(out, *(usual if steps.get(part) is None else steps[part] for part, usual in recipe.vae_steps.items()), start=start)
    trained = vae_of(recipe.family, out / "vae.safetensors")
    print(f"reconstruction of held-out clips: {reconstruction(trained, scene=recipe.scene):.2f} dB PSNR")


def _earlier(family: Family, path: Path) -> dict[str, Tensor]:
    """The weights of a VAE in a file. Raises ValueError for one that is not built as the family's tiny one is."""
    bundled = bundle.files_of(family)[1]
    found = vae_of(family, path).state_dict()
    _require_alike(path, found, bundled, vae_of(family, bundled).state_dict())
    return found


def _require_network(family: Family, path: Path) -> None:
    """Raises ValueError for weights that are not of a network built as the family's tiny one is."""
    bundled = bundle.files_of(family)[0]
    _require_alike(path, read(path)[0], bundled, read(bundled)[0])


def _require_alike(path: Path, found: Mapping[str, Tensor], bundled: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless both files have the same names and shapes."""
    here, there = ({name: weight.shape for name, weight in some.items()} for some in (found, weights))
    names = here.keys() | there.keys()
    if wrong := sorted(name for name in names if here.get(name) != there.get(name)):
        raise ValueError(
            f"{path} holds another network than {bundled.name}: {len(wrong)} of {len(names)} tensors differ in name or shape, the first is "
            f"{wrong[0]}; name one that this training made"
        )


def _same_latents(recipe: Recipe, out: Path) -> None:
    """What goes on from earlier weights knows the latents of the bundled VAE: unless the folder has a basis, it gets that one."""
    if recipe.vae and not (out / BASIS).exists():
        _copy(basis_of(bundle.files_of(recipe.family)[1]), out / BASIS)


def _install(recipe: Recipe, out: Path) -> None:
    network, vae = bundle.files_of(recipe.family)
    _copy(out / "dit.safetensors", network)
    if recipe.vae:
        _copy(out / "vae.safetensors", vae)
        _copy(out / BASIS, basis_of(vae))


def _copy(made: Path, place: Path) -> None:
    weights = made.read_bytes()
    with whole(place) as partial:
        partial.write_bytes(weights)


def _evaluate(recipe: Recipe, prompts: int, path: Path | None) -> None:
    model, teacher = bundle.load_bundle(fast_dtype(), family=recipe.family), None
    if recipe.teacher:
        teacher = bundle.load_bundle(fast_dtype(), family=recipe.teacher[0]), recipe.teacher[1]
    found = evaluate(model, recipe.job, recipe.scene, prompts, teacher)
    if recipe.family is SKYREELS:
        found["hidden_sprite_seen_again"] = hidden(model, recipe.job)
    figures = json.dumps(found, indent=1)
    print(figures)
    if path:
        write_text(path, figures + "\n")


def _preview(recipe: Recipe) -> None:
    found = preview.fit(vae_of(recipe.family), scene=recipe.scene, pixels=recipe.family.frames)
    print("\n".join(f"{colour}," for colour in found.factors), f"bias {found.bias}", sep="\n")


def _look(recipe: Recipe, out: Path, prompt: str, seed: int) -> None:
    model = bundle.load_bundle(fast_dtype(), family=recipe.family)
    film = decode(model, generate(model, replace(recipe.job, prompt=prompt, seed=seed))[0])
    write_picture(out / "look.png", Image.fromarray(contact_sheet(film)))


if __name__ == "__main__":
    main()
