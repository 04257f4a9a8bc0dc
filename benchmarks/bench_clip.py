"""CLIP's image tower with class embedding and four taps: this project beside open_clip and transformers.

    python benchmarks/bench_clip.py [--size 480] [--batch 1] [--threads 2] [--rounds 15] [--device cpu]
                                    [--kept]

One process, the same random weights in all three, the runs alternate so that noise hits all alike. Position tables of the
peers are made for the size beforehand; open_clip's blocks are OpenAI's (nn.MultiheadAttention). Every output is compared
with ours in fp32 before anything is timed. Under autocast our frozen weights are kept in bf16, as in training and
prediction; the peers keep fp32, as they come, and round them at each use, unless --kept. The columns: timing.py.
"""

import sys

import torch
from peers import CLIPS
from timing import begin, error, measure, options, report

from clip_vit import CLIP
from inference import cast_frozen
from test_clip_vit import random_state

OURS = "this project"


def build(size: int, device: str) -> dict:
    """name -> (model, function of an image in [0, 1] that returns the class embedding and four taps (B, N, D))."""
    clip = CLIP().eval().requires_grad_(False)
    clip.load_state_dict(random_state(clip))
    towers = {name: make(clip.visual.state_dict(), size) for name, make in CLIPS.items()}

    def ours(image):
        f_cls, taps = clip.visual(image)
        return [f_cls, *(tap.flatten(1, 2) for tap in taps)]

    return {name: (model.to(device), run) for name, (model, run) in {OURS: (clip.visual, ours), **towers}.items()}


@torch.inference_mode()
def main() -> int:
    parser = options(__doc__, size=480, batch=1, threads=2, rounds=15, device="cpu")
    parser.add_argument("--kept", action="store_true", help="the peers' frozen weights are kept in bf16, as ours are")
    args = parser.parse_args()
    begin(f"{args.batch} x {args.size} px", args.threads, args.device)
    torch.manual_seed(0)
    image = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    towers = build(args.size, args.device)
    reference = towers[OURS][1](image)
    ok = True
    for mode, allowed in (("fp32", 1e-5), ("bf16", 0.05)):
        for name, (model, _) in towers.items():
            if mode == "bf16" and (name == OURS or args.kept):
                cast_frozen(model, mode)
        with torch.autocast(args.device, torch.bfloat16, enabled=mode == "bf16"):
            errors = {name: error(run(image), reference) for name, (_, run) in towers.items()}
            measured = measure({name: lambda run=run: run(image) for name, (_, run) in towers.items()}, args.rounds, mode,
                               args.device)
        report(mode, measured, f"{'error':>10}", {name: f"{errors[name]:10.1e}" for name in towers})
        ok &= max(errors.values()) <= allowed
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
