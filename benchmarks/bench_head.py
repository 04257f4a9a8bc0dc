"""UperNet's head at its real size: this project beside transformers' UperNetHead.

    python benchmarks/bench_head.py [--size 480] [--batch 1] [--train-batch 2] [--threads 2] [--rounds 7] [--device cpu]

1024 channels in, 512 inside, 20 classes; the same random weights and features in both (four maps at strides 4 to 32 of
the image), evaluation, and training (forward and backward to all weights and features), fp32 and bf16 autocast. The
runs alternate. Each gets the features in the layout it would get them in: transformers' plain, ours channels-last, as
the adapter leaves them. Errors: relative, of the logits, and of the features' gradients, against the peer in fp64 on an
image of 96 px. The columns: timing.py.
"""

import copy
import sys

import torch
from peers import upernet
from timing import begin, error, measure, options, report

from uperhead import UPerHead

OURS, PEER = "this project", "transformers"
LAYOUTS = {OURS: torch.channels_last, PEER: torch.contiguous_format}


def heads(device: str) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    ours = UPerHead(1024, 512, 20, dropout=0.0)
    return {OURS: ours.to(device), PEER: upernet(ours.state_dict()).to(device)}


def features(name: str, batch: int, size: int, device: str, train: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    maps = [torch.randn(batch, 1024, size // stride, size // stride) for stride in (4, 8, 16, 32)]
    return [x.to(device, memory_format=LAYOUTS[name]).requires_grad_(train) for x in maps]


def run(head: torch.nn.Module, maps: list[torch.Tensor], train: bool, half: bool) -> list[torch.Tensor]:
    """[logits], in training [logits, gradients of the four maps, gradients of the weights]."""
    with torch.set_grad_enabled(train), torch.autocast(maps[0].device.type, torch.bfloat16, enabled=half):
        logits = head(maps)
    if not train:
        return [logits]
    return [logits, *torch.autograd.grad(logits.float().square().mean(), [*maps, *head.parameters()])]


def disagreement(nets: dict, batch: int, device: str, train: bool, half: bool) -> dict[str, float]:
    exact = run(copy.deepcopy(nets[PEER]).double(), [x.double() for x in features(PEER, batch, 96, device, train)],
                train, False)[:5]
    errors = {}
    for name, net in nets.items():
        errors[name] = error(run(net, features(name, batch, 96, device, train), train, half)[:5], exact)
    return errors


def main() -> int:
    args = options(__doc__, size=480, batch=1, train_batch=2, threads=2, rounds=7, device="cpu").parse_args()
    begin(f"{args.size} px", args.threads, args.device)
    nets, ok = heads(args.device), True
    for train, batch in ((False, args.batch), (True, args.train_batch)):
        for net in nets.values():
            net.train(train)
        for half in (False, True):
            errors = disagreement(nets, max(batch, 4) if train else batch, args.device, train, half)
            maps = {name: features(name, batch, args.size, args.device, train) for name in nets}
            runs = {name: lambda name=name: run(nets[name], maps[name], train, half) for name in nets}
            precision = "bf16" if half else "fp32"
            title = f"{'forward + backward' if train else 'evaluation'}, batch {batch}, {precision}"
            report(title, measure(runs, args.rounds, precision, args.device), f"{'error':>10}",
                   {name: f"{errors[name]:10.1e}" for name in nets})
            # A ReLU's slope jumps: one input within rounding of zero changes the gradients by 1e-3.
            ok &= errors[OURS] <= max(2 * errors[PEER], 1e-2 if train else 1e-5)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
