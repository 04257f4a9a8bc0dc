"""CLIP's image tower with class embedding and four taps: this project beside open_clip and transformers.

    python benchmarks/bench_clip.py [--size 480] [--batch 1] [--threads 2] [--rounds 15] [--device cpu]
                                    [--kept]

One process, the same random weights in all three, the runs alternate so that noise hits all alike. Position tables of the
peers are made for the size beforehand; open_clip's blocks are OpenAI's (nn.MultiheadAttention). Every output is compared
with ours in fp32 before anything is timed. Times: wall clock, median and quartiles; the last column is the median of the
ratios within a round. Under autocast our frozen weights are kept in bf16, as in training and prediction; the peers keep
fp32, as they come, and round them at each use, unless --kept.
"""

import argparse
import sys
from pathlib import Path

import torch
from timing import alternate, figures

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401                        torchvision beside a CPU-only torch, for the peers
import open_clip  # noqa: E402
import transformers  # noqa: E402
from test_clip_vit import MEAN, STD, error, hugging_face_names, random_state, resized  # noqa: E402

from clip_vit import CLIP  # noqa: E402
from inference import store_frozen  # noqa: E402

OURS = "this project"
TAPS = (3, 5, 7, 11)


def build(size: int, device: str) -> dict:
    """name -> (model, function of an image in [0, 1] that returns (class embedding, four taps (B, N, D)))."""
    clip = CLIP().eval().requires_grad_(False)
    state = random_state(clip)
    clip.load_state_dict(state)
    fitted = resized(state, size // 16, size // 16)
    peer = open_clip.create_model("ViT-B-16-quickgelu", force_image_size=size).eval().requires_grad_(False)
    peer.load_state_dict(fitted, strict=False)
    config = transformers.CLIPVisionConfig(patch_size=16, image_size=size, hidden_act="quick_gelu", projection_dim=512)
    face = transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    assert not face.load_state_dict(hugging_face_names(fitted), strict=False).missing_keys
    mean, std = MEAN.to(device), STD.to(device)
    visual, peer, face = clip.visual.to(device), peer.visual.to(device), face.to(device)

    def ours(image):
        f_cls, taps = visual(image)
        return f_cls, [tap.flatten(1, 2) for tap in taps]

    def theirs(image):
        out = peer.forward_intermediates((image - mean) / std, indices=list(TAPS), output_fmt="NLC",
                                         normalize_intermediates=False)
        return torch.nn.functional.normalize(out["image_features"], dim=-1), out["image_intermediates"]

    def face_run(image):
        out = face((image - mean) / std, output_hidden_states=True)
        taps = [out.hidden_states[tap + 1][:, 1:] for tap in TAPS]
        return torch.nn.functional.normalize(out.image_embeds, dim=-1), taps

    return {OURS: (visual, ours), "open_clip": (peer, theirs), "transformers": (face, face_run)}


def disagreement(runs: dict, image: torch.Tensor, reference) -> dict[str, float]:
    """The largest relative error of the class embedding and the taps against ours in fp32."""
    worst = {}
    for name, run in runs.items():
        f_cls, taps = run(image)
        worst[name] = max(error(f_cls, reference[0]), *(error(a, b) for a, b in zip(taps, reference[1], strict=True)))
    return worst


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("size", 480), ("batch", 1), ("threads", 2), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kept", action="store_true", help="the peers' frozen weights are kept in bf16, as ours are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    image = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    towers = build(args.size, args.device)
    runs = {name: run for name, (_, run) in towers.items()}
    reference = runs[OURS](image)
    ok = True
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, {args.batch} x {args.size} px, ms")
    print(f"{'':14}{'':6}{'median':>9}{'quartiles':>18}{'error':>10}{'time / ours':>13}")
    for mode, allowed in (("fp32", 1e-5), ("bf16", 0.05)):
        for name, (model, _) in towers.items():
            if mode == "bf16" and (name == OURS or args.kept):
                store_frozen(model, mode)
        with torch.autocast(args.device, torch.bfloat16, enabled=mode == "bf16"):
            errors = disagreement(runs, image, reference)
            times = alternate({name: lambda run=run: run(image) for name, run in runs.items()}, args.rounds, warm=2)
        for name, of in figures(times).items():
            print(f"{name:14}{mode:6}{1e3 * of.median:9.1f}{1e3 * of.low:9.1f}{1e3 * of.high:9.1f}{errors[name]:10.1e}"
                  f"{of.ratio:13.2f}")
            ok &= errors[name] <= allowed
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
