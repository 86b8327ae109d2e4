"""How everything is measured. Each bench is one file with `run`, named in BENCHES; rows share `share`, `psnr`, `ssim`, `wall_ratio`."""
