"""Training samples read and augmented per second on one core, compared with albumentations.

    python benchmarks/bench_data.py --data FOLDER [--rounds 15] [--size 480] [--count 100]

FOLDER holds images/train and labels/train. The two alternate on the same photos; the result is the median processor
time of the rounds. Both do: random scale, crop or pad to the size, flip, brightness, contrast, saturation and hue with
probability 0.5 each, conversion to a uint8 tensor (3, h, w). albumentations does not swap left and right labels, and
does not repeat a crop that one class fills: our retries are off, and measured in a separate row.
"""

import dataclasses
import warnings
from pathlib import Path

import cv2
import torch
from timing import measure, options, print_machine

from augment import BRIGHTNESS, HUE, MEAN_COLOUR, augment
from config import IGNORE, Config, user_path
from datasets import random_numbers
from errors import UserError, run_program
from files.images import read_label, read_photo_of
from files.labels import LABEL_SETS

warnings.filterwarnings("ignore", message="Error fetching version info")
import albumentations as A  # noqa: E402
from albumentations.pytorch import ToTensorV2  # noqa: E402


def albumentations_pipeline(cfg: Config) -> A.Compose:
    low, high = (round(cfg.base_size * scale) for scale in cfg.scale_range)
    return A.Compose([
        A.LongestMaxSize(list(range(low, high + 1))),
        A.PadIfNeeded(*cfg.crop_size, position="top_left", fill=MEAN_COLOUR, fill_mask=IGNORE),
        A.RandomCrop(*cfg.crop_size),
        A.HorizontalFlip(p=cfg.flip_prob),
        A.RandomBrightnessContrast(BRIGHTNESS / 255, 0, p=0.5),
        A.RandomBrightnessContrast(0, 0.5, p=0.5),
        A.HueSaturationValue(0, 40, 0, p=0.5),             # adds to the saturation; ours multiplies: the same cost
        A.HueSaturationValue(HUE, 0, 0, p=0.5),
        ToTensorV2()], seed=0)


def ours(image, label, cfg: Config, slot: int):
    image, label = augment(image, label, cfg, LABEL_SETS["lip"].flip_pairs, random_numbers("augment", 0, 0, slot))
    tensor = torch.empty(3, *cfg.crop_size, dtype=torch.uint8)
    cv2.split(image, list(tensor.numpy()))
    return tensor, torch.from_numpy(label)


def read_ours(photo: Path, label: Path):
    numbers = read_label(label, 20)
    return read_photo_of(numbers, photo, label), numbers


def read_peer(photo: Path, label: Path):
    return (cv2.imread(str(photo), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION),
            cv2.imread(str(label), cv2.IMREAD_UNCHANGED))


def compare(title: str, functions: dict, count: int, rounds: int):
    """Prints the samples per second of each function, called on every photo in every round."""
    runs = {name: lambda function=function: [function(i) for i in range(count)] for name, function in functions.items()}
    print(title)
    for name, row in measure(runs, rounds).summary().items():
        print(f"  {name:<34} {1e3 * count / row.cpu:7.0f} samples/s {row.cpu / count:7.3f} ms"
              + ("" if name == next(iter(functions)) else f"   ours is {row.cpu_ratio:.2f} times as fast"))


def main(argv: list[str] | None = None):
    parser = options(__doc__, rounds=15, size=480, count=100)
    parser.add_argument("--data", type=user_path, required=True, help="folder with images/train and labels/train")
    args = parser.parse_args(argv)
    photos = sorted((args.data / "images/train").glob("*.jpg"))[:args.count]
    files = [(photo, args.data / "labels/train" / f"{photo.stem}.png") for photo in photos]
    if not files:
        raise UserError(f"--data: no .jpg in {args.data}/images/train")
    cv2.setNumThreads(0)
    cfg = Config(crop_size=(args.size, args.size), base_size=args.size, max_class_share=1.0)
    retries = dataclasses.replace(cfg, max_class_share=0.75)
    transform, count = albumentations_pipeline(cfg), len(files)
    arrays = [read_ours(*pair) for pair in files]

    def augment_peer(image, label):
        result = transform(image=image, mask=label)
        return result["image"].contiguous(), result["mask"]

    print_machine(f"{count} photos, crop {args.size}, albumentations {A.__version__}, OpenCV {cv2.__version__}, median "
                  f"of {args.rounds} alternating rounds", threads=1)
    assert ours(*arrays[0], cfg, 0)[0].shape == augment_peer(*arrays[0])[0].shape == (3, *cfg.crop_size)
    compare("augmentation alone, from arrays", {
        "ours": lambda i: ours(*arrays[i], cfg, i),
        "albumentations": lambda i: augment_peer(*arrays[i])}, count, args.rounds)
    compare("reading alone", {
        "ours, with checks": lambda i: read_ours(*files[i]),
        "OpenCV, without checks": lambda i: read_peer(*files[i])}, count, args.rounds)
    compare("reading and augmentation", {
        "ours": lambda i: ours(*read_ours(*files[i]), cfg, i),
        "OpenCV and albumentations": lambda i: augment_peer(*read_peer(*files[i])),
        "ours, with crop retries": lambda i: ours(*read_ours(*files[i]), retries, i)}, count, args.rounds)


if __name__ == "__main__":
    run_program(main)
