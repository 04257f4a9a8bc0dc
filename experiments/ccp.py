"""Converts Clothing Co-Parsing for configs/custom.yaml: the 802 training and 60 validation photos of learn.py.

    git clone https://github.com/bearpaw/clothing-co-parsing
    python experiments/ccp.py clothing-co-parsing data/custom          needs scipy to read the labels

Photos and labels are halved in size. The 59 labels become 15 classes; labels that fit none of them (belts, jewellery,
capes, vests, ...) become 255 (ignore). LEFT_OUT lists 142 of the 1,004 labelled photos that are not used.
"""

import argparse

import cv2
import numpy as np
import runner  # noqa: F401                                sets sys.path
from scipy.io import loadmat

from config import IGNORE, user_path
from errors import run_program
from files.atomic import mark_folder

CLASSES = ("null bag purse wallet", "hat", "hair", "gloves", "sunglasses",
           "blouse hoodie jumper shirt sweater sweatshirt t-shirt top", "dress", "blazer coat jacket suit",
           "socks stockings", "jeans leggings pants shorts", "", "scarf", "skirt", "skin",
           "boots clogs flats heels loafers pumps sandals shoes sneakers wedges")        # in the order of custom.yaml
VAL = """
2 6 10 19 26 56 112 125 127 150 151 165 200 201 228 266 300 320 324 325 335 350 369 379 390 397 405 429 464 486
489 521 554 556 561 562 568 608 611 617 643 649 653 687 725 732 755 758 800 801 850 859 879 880 885 910 925 965
977 983"""
LEFT_OUT = """
7 22 28 38 40 42 52 54 63 65 66 74 82 84 86 89 93 96 109 114 118 136 142 153 160 161 184 187 188 202 207 218 223
234 236 237 245 251 252 253 269 271 278 279 281 285 286 298 311 341 345 361 364 371 372 377 383 396 399 400 408
409 412 415 417 420 422 443 451 458 468 470 471 490 530 534 536 537 551 555 574 576 595 599 615 629 636 639 642
645 652 657 658 675 680 683 684 689 692 695 696 706 710 714 715 717 718 720 738 747 751 752 766 767 781 782 784
787 788 797 798 804 826 833 834 844 845 846 847 868 886 898 912 927 930 935 938 949 961 970 981 995"""


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=user_path, help="a clone of bearpaw/clothing-co-parsing")
    parser.add_argument("out", type=user_path)
    args = parser.parse_args(argv)
    names = [str(name[0]) for name in loadmat(args.source / "label_list.mat")["label_list"].ravel()]
    table = np.full(256, IGNORE, np.uint8)
    for k, members in enumerate(CLASSES):
        table[[names.index(name) for name in members.split()]] = k
    mark_folder(args.out)
    val, left_out = ({int(number) for number in text.split()} for text in (VAL, LEFT_OUT))
    for number in sorted(set(range(1, 1005)) - left_out):
        split, name = "val" if number in val else "train", f"{number:04d}"
        photo = cv2.imread(str(args.source / f"photos/{name}.jpg"))
        label = table[loadmat(args.source / f"annotations/pixel-level/{name}.mat")["groundtruth"]]
        size = photo.shape[1] // 2, photo.shape[0] // 2
        for file, image, interpolation in ((f"images/{split}/{name}.jpg", photo, cv2.INTER_AREA),
                                           (f"labels/{split}/{name}.png", label, cv2.INTER_NEAREST_EXACT)):
            (args.out / file).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(args.out / file), cv2.resize(image, size, interpolation=interpolation))


if __name__ == "__main__":
    run_program(main)
