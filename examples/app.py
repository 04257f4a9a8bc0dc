"""A web page for a trained network: upload a photo, see its label map. Needs examples/requirements.txt.

    python examples/app.py --run runs/demo                 # then open http://127.0.0.1:7860

Photos are uploaded, pasted or taken with a camera; nothing leaves this machine. GRADIO_SERVER_NAME=0.0.0.0 makes the
page reachable from other machines, GRADIO_SERVER_PORT sets the port. docs/parsing.md has a client in Python.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import user_path  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from inference import add_run_options  # noqa: E402
from predict import Parser  # noqa: E402
from viz import pictures  # noqa: E402


def build(parser: Parser) -> gr.Blocks:
    """The page, with one API endpoint: /parse."""
    def parse(photo: str | None):
        if photo is None:                                  # the photo was removed
            return None, None
        try:
            image = parser.read(photo)
            label = parser.parse(image)
        except (UserError, MemoryError) as error:
            raise gr.Error(str(error).replace(photo, "the photo") or "the photo does not fit in memory") from None
        png = Path(tempfile.mkdtemp()) / f"{Path(photo).stem}_labels.png"
        pictures.save_palette_png(png, label, parser.palette)
        shown = [k for k in np.unique(label) if any(parser.palette[k])]       # without a black background
        return (image, [(label == k, parser.classes[k]) for k in shown]), str(png)

    colours = {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(parser.classes, parser.palette)}
    with gr.Blocks(title="SCHNet", analytics_enabled=False) as page:
        gr.Markdown(f"# SCHNet human parsing\n`{parser.path}`, {len(parser.classes)} classes of {parser.labels.name}"
                    + (", with test-time augmentation" if parser.tta else ""))
        if parser.model.cfg.dataset == "synthetic":
            gr.Markdown("This network was trained on drawn people only; on photos its results are poor.")
        with gr.Row():
            photo = gr.Image(sources=["upload", "webcam", "clipboard"], type="filepath", image_mode=None, label="Photo")
            classes = gr.AnnotatedImage(color_map=colours, label="Classes")
        outputs = [classes, gr.File(label="Label map (pixel = class)")]
        photo.change(parse, photo, outputs, api_name="parse", concurrency_limit=1)
    return page.queue(max_size=16)


def main(argv: list[str] | None = None):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(options)
    options.add_argument("--map", type=user_path, metavar="FILE", help="merge the classes: a file of configs/maps")
    args = options.parse_args(argv)
    build(Parser(args.run, args.tta, device=args.device, class_map=args.map)).launch(show_error=True)


if __name__ == "__main__":
    run_program(main, less_memory="--device cpu")
