"""Draws what SimModule, SRM and FTM do to a photo (sections 3.1 and 3.2 of the paper).

    python examples/look_inside.py photo.jpg --run runs/lip --out inside.png

Bars: f_sim (Eq. 1). Columns: SRM's sites, before the first layer and after each stage. Rows: SAM's tokens after the
last block, after FTM (Eqs. 5, 6) and after SRM (Eqs. 2, 4); CLIP's f_cv. Red, green and blue are the first three
principal components. The three rows of SAM share those of the first, so that differences show what a module changes.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import user_path  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from inference import add_run_options, canvas  # noqa: E402
from predict import Parser  # noqa: E402
from viz import pictures  # noqa: E402


def record(model, image: torch.Tensor) -> tuple[np.ndarray, list[dict[str, torch.Tensor]]]:
    """f_sim (K,), and for each site of SRM the maps (h, w, C): "block", "FTM", "SRM" and "f_cv"."""
    ftm, sites, f_sims = [], [], []
    hooks = []
    if model.cfg.ftm:
        hooks.append(model.ftm.register_forward_hook(lambda _, args, out: ftm.append((args[0][0], out[0]))))

    def at_site(_, args, out):
        f_sv, f_cv, f_sim = args
        f_sims.append(f_sim[0])
        block, after = ftm[-1] if ftm else (f_sv[0], f_sv[0])
        sites.append({"block": block, "FTM": after, "SRM": out[0], "f_cv": f_cv[0]})

    hooks.append(model.srm.register_forward_hook(at_site))
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return f_sims[0].float().cpu().numpy(), sites


def components(tokens: torch.Tensor, basis: torch.Tensor, like: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Tokens (h, w, C) as RGB: their components along `basis` (C, 3), scaled to the range of those of `like`."""
    mean = like.flatten(0, 1).float().mean(0)
    low, high = (((like.float() - mean) @ basis).flatten(0, 1).quantile(q, 0) for q in (0.01, 0.99))
    rgb = (((tokens.float() - mean) @ basis - low) / (high - low + 1e-9)).clamp(0, 1)[:size[0], :size[1]]
    return (255 * rgb).byte().cpu().numpy().repeat(8, 0).repeat(8, 1)


def bars(values: np.ndarray, names: tuple[str, ...], height: int = 20) -> np.ndarray:
    """A bar chart of f_sim, largest class first."""
    canvas_, draw = pictures.blank(height * (len(names) + 2), 520)
    pictures.draw_text(draw, 10, height, "f_sim: how likely each class is in the photo (Eq. 1)", 14)
    for n, k in enumerate(np.argsort(-values)):
        y = height * (n + 1.7)
        pictures.draw_text(draw, 140, y + height / 2, names[k], 13, "rm")
        draw.rectangle((150, y + 3, 150 + 300 * values[k], y + height - 3), fill=(0, 114, 178))
        pictures.draw_text(draw, 158 + 300 * values[k], y + height / 2, f"{values[k]:.3f}", 13)
    return np.array(canvas_)


def main(argv: list[str] | None = None):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("photo")
    options.add_argument("--out", type=user_path, default=Path("inside.png"), help="the picture (inside.png)")
    add_run_options(options)
    args = options.parse_args(argv)
    parser = Parser(args.run, args.tta, device=args.device)
    if not parser.model.cfg.srm:
        raise UserError(f"{parser.path} has no SRM: choose a run of the full network with --run")
    photo = parser.read(args.photo)
    padded, (h, w) = canvas(photo, parser.model.cfg, 1.0)
    device = next(parser.model.parameters()).device
    f_sim, sites = record(parser.model, torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255)
    columns = []
    for maps in sites:
        tokens = {name: maps[name].flatten(0, 1).float() for name in ("block", "f_cv")}
        basis = {name: torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3].T for name, x in tokens.items()}
        columns.append([components(maps[name], basis[like], maps[like], (-(-h // 16), -(-w // 16)))
                        for name, like in (("block", "block"), ("FTM", "block"), ("SRM", "block"), ("f_cv", "f_cv"))])
    titles = ["patch embedding", *(f"stage {s}" for s in range(1, len(sites)))]
    rows = ["SAM's tokens", "after FTM (Eqs. 5, 6)", "after SRM (Eqs. 2, 4)", "CLIP's f_cv"]
    label = parser.parse(photo)
    sheet = pictures.sheet(list(map(list, zip(*columns))), titles, rows, height=180)
    left = [[photo, parser.overlay(photo, label)], [bars(f_sim, parser.classes), None]]
    first = pictures.sheet(left, ["photo", "prediction"], height=360)
    height = max(len(first), len(sheet))
    both = [np.pad(part, ((0, height - len(part)), (0, 0), (0, 0)), constant_values=255) for part in (first, sheet)]
    pictures.save_png(args.out, np.hstack(both))
    print(f"{args.out}: {parser.path}")


if __name__ == "__main__":
    run_program(main, less_memory="--device cpu")
