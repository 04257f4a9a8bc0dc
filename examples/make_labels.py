"""Index PNGs for configs/custom.yaml from colour masks, LabelMe files or COCO polygons. Files are never replaced.

    python examples/make_labels.py colours masks/ labels/ Background=0,0,0 Hair=255,0,0 Coat=0,119,221
    python examples/make_labels.py labelme annotations/ labels/ Background Hair Coat
    python examples/make_labels.py coco instances.json labels/ Background Hair Coat

Labels are numbered in the order of the classes. Pixels of a colour that is not listed become 255 (ignore).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def from_colours(source: Path, classes: list[str]):
    colours = [np.array(text.partition("=")[2].split(","), np.uint8) for text in classes]
    for path in sorted(source.glob("*.png")):
        rgb = np.array(Image.open(path).convert("RGB"))
        same = [(rgb == colour).all(2) for colour in colours]
        yield path.name, np.select(same, range(len(classes)), 255).astype(np.uint8)


def from_labelme(source: Path, classes: list[str]):
    for path in sorted(source.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        shapes = ((shape["label"], shape["points"]) for shape in data["shapes"])
        yield path.name, drawn((data["imageWidth"], data["imageHeight"]), shapes, classes)


def from_coco(source: Path, classes: list[str]):
    data = json.loads(source.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in data["categories"]}
    shapes = defaultdict(list)
    for one in data["annotations"]:
        shapes[one["image_id"]] += [(names[one["category_id"]], polygon) for polygon in one["segmentation"]]
    for image in data["images"]:
        yield image["file_name"], drawn((image["width"], image["height"]), shapes[image["id"]], classes)


def drawn(size: tuple[int, int], shapes: list[tuple[str, list]], classes: list[str]) -> np.ndarray:
    """Polygons of (class, points) as a label map, later ones on top."""
    picture = Image.new("L", size)
    for name, points in shapes:
        if name not in classes:
            sys.exit(f"error: the classes given do not include {name!r}")
        ImageDraw.Draw(picture).polygon(np.ravel(points).tolist(), fill=classes.index(name))
    return np.array(picture)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        print("usage:", __doc__)
        sys.exit("--help" not in sys.argv)
    kind, source, out, *classes = sys.argv[1:]
    for name, label in globals()[f"from_{kind}"](Path(source), classes):
        path = Path(out) / f"{Path(name).stem}.png"
        path.parent.mkdir(exist_ok=True)
        with open(path, "xb") as file:                    # fails where there is a label: hand-made, or of the same name
            Image.fromarray(label).save(file, "PNG")
