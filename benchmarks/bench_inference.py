"""A photo through the full-size SCHNet, compared with its three largest parts in transformers. Random weights.

    python benchmarks/bench_inference.py                   480 px, fp32 and bf16 autocast

The parts are SAM's encoder, CLIP's image tower with four taps and UperNet's head: a SCHNet without adapter, SRM and
FTM. bench_parts.py compares each of them with more libraries, and checks their outputs. Both sides have the same
weights and alternate in one process; timing.py explains the columns. Under autocast, this project's frozen weights are
kept in bf16, as in training and prediction.
"""

import full_size
import peers
import torch
from timing import measure, options, print_machine, report

from errors import run_program
from layers import cast_frozen


@torch.inference_mode()
def main(argv: list[str] | None = None):
    parser = options(__doc__, size=480, threads=2, rounds=5)
    args = parser.parse_args(argv)
    print_machine(f"{args.rounds} rounds", args.threads)
    model = full_size.network(full_size.lip_config("precision=fp32")).eval()
    image = torch.rand(1, 3, args.size, args.size)
    maps = [torch.randn(1, 1024, args.size // stride, args.size // stride) for stride in (4, 8, 16, 32)]
    sam = peers.sam("transformers", model.sam.state_dict(), args.size)[1]
    clip = peers.transformers_tower(model.clip.state_dict(), args.size)[1]
    head = peers.upernet(model.head.state_dict()).eval()
    runs = {"SCHNet, this project": lambda: model(image),
            "SAM + CLIP + UperNet, transformers": lambda: (sam(image), clip(image), head(maps))}
    for precision in ("fp32", "bf16"):                     # bf16 last: it rounds the frozen weights
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            cast_frozen(model, precision)
            report(f"{args.size} px, {precision}", measure(runs, args.rounds, precision))


if __name__ == "__main__":
    run_program(main)
