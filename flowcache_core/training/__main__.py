"""`python -m flowcache_core.training vae | dit | install | evaluate`: how the bundled model came to be, one command a stage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from ..demo import bundle
from ..device import fast_dtype
from ..generate import Job, decode, generate
from ..models.wan_vae import WanVAE
from . import dit, vae
from .evaluate import contact_sheet, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(prog="flowcache_core.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of checkpoints; a stopped stage goes on from there")
    stages = parser.add_subparsers(dest="stage", required=True)
    one = stages.add_parser("vae", help="the small VAE")
    one.add_argument("--steps", type=int, default=2000, help="encoder and decoder together")
    one.add_argument("--decoder-steps", type=int, default=3000, help="the decoder alone, on the frozen encoder")
    two = stages.add_parser("dit", help="the network; needs the VAE")
    two.add_argument("--steps", type=int, default=6000)
    two.add_argument("--batch", type=int, default=6)
    stages.add_parser("install", help="copy the averaged weights into the package")
    four = stages.add_parser("evaluate", help="the figures of the model card")
    four.add_argument("--prompts", type=int, default=50)
    four.add_argument("--json", type=Path)
    five = stages.add_parser("look", help="frames of one film, as a picture")
    five.add_argument("prompt")
    five.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.stage == "vae":
        vae.train(args.out, args.steps, args.decoder_steps)
        trained = WanVAE.from_state_dict({k: v.float() for k, v in load_file(args.out / "vae.safetensors").items()})
        print(f"reconstruction of held-out clips: {vae.reconstruction(trained):.2f} dB PSNR")
    elif args.stage == "dit":
        dit.train(args.out, args.steps, args.batch)
    elif args.stage == "install":
        bundle.WEIGHTS.mkdir(exist_ok=True)
        bundle.NETWORK.write_bytes((args.out / "dit.safetensors").read_bytes())
        bundle.VAE.write_bytes((args.out / "vae.safetensors").read_bytes())
    elif args.stage == "evaluate":
        figures = evaluate(bundle.load_bundle(fast_dtype()), args.prompts)
        print(json.dumps(figures, indent=1))
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    else:
        model = bundle.load_bundle(fast_dtype())
        film = decode(model, generate(model, Job(args.prompt, seed=args.seed))[0])
        args.out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(contact_sheet(film)).save(args.out / "look.png")


if __name__ == "__main__":
    main()
