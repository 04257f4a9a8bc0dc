"""Converts colour masks, LabelMe files or COCO polygons to index PNGs. Existing files are never overwritten.
Classes are numbered in the order given, as in configs/custom.yaml; other colours become 255 (ignore).

    python examples/make_labels.py colours masks/ labels/ Background=0,0,0 Hair=255,0,0 Coat=0,119,221
    python examples/make_labels.py labelme annotations/ labels/ Background Hair Coat
    python examples/make_labels.py coco instances.json labels/ Background Hair Coat
"""

import json
import sys
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
        yield path.name, draw_polygons((data["imageWidth"], data["imageHeight"]), shapes, classes)


def from_coco(source: Path, classes: list[str]):
    data = json.loads(source.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in data["categories"]}
    shapes = {}
    for part in data["annotations"]:
        shapes.setdefault(part["image_id"], []).extend((names[part["category_id"]], p) for p in part["segmentation"])
    for image in data["images"]:
        yield image["file_name"], draw_polygons((image["width"], image["height"]), shapes.get(image["id"], []), classes)


def draw_polygons(size: tuple[int, int], shapes: list[tuple[str, list]], classes: list[str]) -> np.ndarray:
    """Draws polygons (class, points) into a label map, later polygons on top."""
    label = Image.new("L", size)
    for name, points in shapes:
        if name not in classes:
            sys.exit(f"error: class {name!r} of the annotations is not among the classes given")
        ImageDraw.Draw(label).polygon(np.ravel(points).tolist(), fill=classes.index(name))
    return np.array(label)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        print("usage:", __doc__)
        sys.exit("--help" not in sys.argv)
    kind, source, out, *classes = sys.argv[1:]
    Path(out).mkdir(exist_ok=True)
    for name, label in globals()[f"from_{kind}"](Path(source), classes):
        with open(Path(out) / f"{Path(name).stem}.png", "xb") as file:   # fails if it exists: edited, or a second one
            Image.fromarray(label).save(file, "PNG")
