"""Index PNGs for configs/custom.yaml from colour masks, COCO polygons or LabelMe files.

    python examples/make_labels.py colours masks/ --out labels --colours "Background=0,0,0 Hair=255,0,0 Coat=0,119,221"
    python examples/make_labels.py coco instances.json --out labels
    python examples/make_labels.py labelme annotations/ --out labels --classes "Background Hair Coat"

Labels are numbered in the order of the classes given (COCO: Background, then the categories by id), which is printed for
`classes:` of the config. Pixels of a colour that is not listed become 255 (ignore), and their share is printed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def from_colours(folder: Path, text: str):
    colours = dict(item.split("=") for item in text.split())
    print("classes:", list(colours))
    for path in sorted(folder.glob("*.png")):
        rgb = np.array(Image.open(path).convert("RGB"))
        label = np.full(rgb.shape[:2], 255, np.uint8)
        for k, colour in enumerate(colours.values()):
            label[(rgb == np.array(colour.split(","), np.uint8)).all(2)] = k
        yield path.stem, label


def draw(size: tuple[int, int], shapes: list[tuple[int, list]]) -> np.ndarray:
    """Polygons ((x, y), ...) with their labels, later ones on top."""
    picture = Image.new("L", size)
    for k, points in shapes:
        ImageDraw.Draw(picture).polygon([tuple(point) for point in points], fill=k)
    return np.array(picture)


def from_coco(path: Path):
    data = json.loads(path.read_text(encoding="utf-8"))
    categories = sorted(data["categories"], key=lambda category: category["id"])
    number = {category["id"]: k for k, category in enumerate(categories, 1)}
    print("classes:", ["Background", *(category["name"] for category in categories)])
    for image in data["images"]:
        shapes = [(number[a["category_id"]], np.reshape(polygon, (-1, 2)).tolist()) for a in data["annotations"]
                  if a["image_id"] == image["id"] and isinstance(a["segmentation"], list) for polygon in a["segmentation"]]
        yield Path(image["file_name"]).stem, draw((image["width"], image["height"]), shapes)


def from_labelme(folder: Path, classes: list[str]):
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        shapes = [(classes.index(shape["label"]), shape["points"]) for shape in data["shapes"] if len(shape["points"]) > 2]
        yield path.stem, draw((data["imageWidth"], data["imageHeight"]), shapes)


options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("kind", choices=("colours", "coco", "labelme"))
options.add_argument("source", type=Path, help="folder of masks or of LabelMe files, or COCO's JSON file")
options.add_argument("--out", type=Path, required=True, help="folder of the labels")
options.add_argument("--colours", default="", help='"NAME=R,G,B ..."')
options.add_argument("--classes", default="", help="names, separated by spaces; the first is label 0")

if __name__ == "__main__":
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    labels = {"colours": lambda: from_colours(args.source, args.colours), "coco": lambda: from_coco(args.source),
              "labelme": lambda: from_labelme(args.source, args.classes.split())}[args.kind]()
    for stem, label in labels:
        Image.fromarray(label).save(args.out / f"{stem}.png")
        ignored = (label == 255).mean()
        print(f"{args.out / stem}.png" + (f": {ignored:.1%} ignored" if ignored else ""))
