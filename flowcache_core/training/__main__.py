"""`python -m flowcache_core.training all`: how the bundled model came to be; every stage is a command of its own too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from ..device import fast_dtype
from ..files import whole, write_text
from ..models import bundle
from ..models.checkpoint import read
from ..models.wan_vae import WanVAE
from ..run.generate import Job, decode, generate
from ..show.film import write_picture
from . import dit, preview, vae
from .evaluate import contact_sheet, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(prog="flowcache_core.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of checkpoints; a stopped stage goes on from there")
    stages = parser.add_subparsers(dest="stage", required=True)
    stages.add_parser("all", help="vae, dit, install and evaluate, one after the other")
    one = stages.add_parser("vae", help="the small VAE")
    one.add_argument("--autoencoder-steps", type=int, default=vae.AUTOENCODER_STEPS)
    one.add_argument("--encoder-steps", type=int, default=vae.ENCODER_STEPS)
    one.add_argument("--decoder-steps", type=int, default=vae.DECODER_STEPS)
    two = stages.add_parser("dit", help="the network")
    two.add_argument("--steps", type=int, default=dit.STEPS)
    two.add_argument("--batch", type=int, default=dit.BATCH)
    stages.add_parser("install", help="copy the averaged weights into the package")
    four = stages.add_parser("evaluate", help="the figures of the model card")
    four.add_argument("--prompts", type=int, default=50)
    four.add_argument("--json", type=Path)
    five = stages.add_parser("look", help="frames of one film, as a picture")
    five.add_argument("prompt")
    five.add_argument("--seed", type=int, default=0)
    stages.add_parser("preview", help="colours of the bundled VAE's latents, as the family holds them")
    args = parser.parse_args()

    if args.stage == "all":
        _vae(args.out, vae.AUTOENCODER_STEPS, vae.ENCODER_STEPS, vae.DECODER_STEPS)
        dit.train(args.out, dit.STEPS, dit.BATCH)
        _install(args.out)
        _evaluate(50, None)
    elif args.stage == "vae":
        _vae(args.out, args.autoencoder_steps, args.encoder_steps, args.decoder_steps)
    elif args.stage == "dit":
        dit.train(args.out, args.steps, args.batch)
    elif args.stage == "install":
        _install(args.out)
    elif args.stage == "evaluate":
        _evaluate(args.prompts, args.json)
    elif args.stage == "preview":
        _preview()
    else:
        _look(args.out, args.prompt, args.seed)


def _vae(out: Path, autoencoder_steps: int, encoder_steps: int, decoder_steps: int) -> None:
    vae.train(out, autoencoder_steps, encoder_steps, decoder_steps)
    trained = WanVAE.from_state_dict({k: v.float() for k, v in load_file(out / "vae.safetensors").items()})
    print(f"reconstruction of held-out clips: {vae.reconstruction(trained):.2f} dB PSNR")


def _install(out: Path) -> None:
    for made, place in (("dit.safetensors", bundle.NETWORK), ("vae.safetensors", bundle.VAE)):
        weights = (out / made).read_bytes()
        with whole(place) as partial:
            partial.write_bytes(weights)


def _evaluate(prompts: int, path: Path | None) -> None:
    figures = json.dumps(evaluate(bundle.load_bundle(fast_dtype()), prompts), indent=1)
    print(figures)
    if path:
        write_text(path, figures + "\n")


def _preview() -> None:
    found = preview.fit(WanVAE.from_state_dict({k: v.float() for k, v in read(bundle.VAE)[0].items()}))
    print("\n".join(f"{colour}," for colour in found.factors), f"bias {found.bias}", sep="\n")


def _look(out: Path, prompt: str, seed: int) -> None:
    model = bundle.load_bundle(fast_dtype())
    film = decode(model, generate(model, Job(prompt, seed=seed))[0])
    write_picture(out / "look.png", Image.fromarray(contact_sheet(film)))


if __name__ == "__main__":
    main()
