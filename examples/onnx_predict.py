"""Parse a photo, of 8 bits and opaque, with an exported network: onnxruntime, numpy, pillow, nothing of this repository.

    python examples/onnx_predict.py model.onnx photo.jpg photo_labels.png
"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, photo, result = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}

# The photo with its long side at base_size, in the corner of a canvas of the mean colour.
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
scale = min(about["base_size"] / max(image.size), about["width"] / image.width, about["height"] / image.height)
small = image.resize([max(1, round(side * scale)) for side in image.size], reducing_gap=3)
canvas = Image.new("RGB", (about["width"], about["height"]), tuple(about["pad_colour"]))
canvas.paste(small)

probabilities, = session.run(None, {"image": np.asarray(canvas)[None]})             # (1, K, H, W)
probabilities = probabilities[0, :, :small.height, :small.width]
best = np.zeros((image.height, image.width), np.float32)
label = np.zeros((image.height, image.width), np.uint8)
for k, channel in enumerate(probabilities):                # one class at a time: large photos fit
    channel = np.asarray(Image.fromarray(channel).resize(image.size, Image.Resampling.BILINEAR))
    label[channel > best], best = k, np.maximum(best, channel)

picture = Image.fromarray(label)
picture.putpalette(np.uint8(about["palette"]).tobytes())
picture.save(result)
print({about["classes"][k]: f"{(label == k).mean():.1%}" for k in np.unique(label)})
