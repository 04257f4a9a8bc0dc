"""How long a full-size run takes to load, with SAM ViT-L and CLIP ViT-B/16 in files like the official ones.

    python benchmarks/bench_loading.py [--rounds 3]        # writes 2 GB of random weights into a temporary folder

Beside it: reading the same bytes, the SHA-256 of the two files, and the hash of their tensors by which a checkpoint
knows them. Seconds of the processor, the least of the rounds; the hash of the tensors uses all cores.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from full_size import lip_config
from timing import options, print_machine

import clip_vit
import sam_vit
from datasets import label_set
from engine import checkpoint
from files.foundations import content_hash
from files.weights import sha256
from inference import load_run
from model import build_model


def seconds(work: Callable, rounds: int) -> str:
    """Processor time and wall time."""
    measured = []
    for _ in range(rounds):
        start = time.process_time(), time.perf_counter()
        work()
        measured.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return "{:.2f} s of the processor, {:.2f} s".format(*map(min, zip(*measured)))


def write_run(folder: Path) -> tuple[list[Path], torch.nn.Module]:
    """The two files, and a checkpoint that leaves their frozen tensors to them."""
    cfg = lip_config(f"sam_weights={folder / 'sam.pth'}", f"clip_weights={folder / 'clip.pt'}",
                     "clip_activation=quick_gelu")
    sam, clip = sam_vit.SAMViT(*sam_vit.SIZES[cfg.sam]), clip_vit.CLIP(*clip_vit.SIZES[cfg.clip])
    torch.save({f"image_encoder.{name}": tensor for name, tensor in sam.state_dict().items()}, cfg.sam_weights)
    torch.save(clip.state_dict(), cfg.clip_weights)
    labels = label_set(cfg)
    given = {"f_txt": torch.rand(len(labels.classes), 512), "sim_scale": torch.tensor(100.0)}
    model = build_model(cfg, labels.classes, given)
    content = checkpoint.pack(model, labels, checkpoint.official_files(model), {"progress": {}})
    content["model"] = {name: given.get(name, torch.rand(tensor.shape)).to(tensor.dtype)
                        for name, tensor in content["model"].items()}
    checkpoint.write(folder / "last.pt", content)
    return [folder / "sam.pth", folder / "clip.pt"], model


def main():
    args = options(__doc__, rounds=3, threads=2).parse_args()
    print_machine("loading a full-size run", args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files, model = write_run(folder)
        everything = [*files, folder / "last.pt"]
        size = sum(file.stat().st_size for file in everything) / 2 ** 20
        print(f"reading {size:.0f} MiB: {seconds(lambda: [file.read_bytes() for file in everything], args.rounds)}")
        print(f"SHA-256 of the two files: {seconds(lambda: [sha256(file) for file in files], args.rounds)}")
        towers = model.sam, model.clip
        print(f"hash of their tensors: {seconds(lambda: [content_hash(t.state_dict()) for t in towers], args.rounds)}")
        print(f"load_run: {seconds(lambda: load_run(folder, [], 'cpu'), args.rounds)}")


if __name__ == "__main__":
    main()
