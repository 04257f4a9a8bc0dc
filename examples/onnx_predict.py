"""Parses a photo with an exported network: needs onnxruntime, numpy, pillow and opencv, but not this repository.

    python examples/onnx_predict.py model.onnx photo.jpg photo_labels.png

The network sees the same pixels as in predict.py if it was exported with `--size` equal to the run's crop_size.
"""
import json
import sys

import cv2
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, photo, result = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}

# The photo, resized to base_size (long side), in the corner of a canvas of the mean colour.
image = np.array(ImageOps.exif_transpose(Image.open(photo)).convert("RGB"))
height, width = image.shape[:2]
scale = min(about["base_size"] / max(height, width), about["width"] / width, about["height"] / height)
h, w = (max(1, int(side * scale + 0.5)) for side in (height, width))
canvas = np.empty((about["height"], about["width"], 3), np.uint8)
canvas[:] = about["pad_colour"]
canvas[:h, :w] = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)

probabilities, = session.run(None, {"image": canvas[None]})              # (1, K, H, W)
best, label = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint8)
for k, channel in enumerate(probabilities[0, :, :h, :w]):                # one class at a time, to save memory
    channel = cv2.resize(channel, (width, height), interpolation=cv2.INTER_LINEAR)
    label[channel > best], best = k, np.maximum(best, channel)

output = Image.fromarray(label)
output.putpalette(np.uint8(about["palette"]).tobytes())
output.save(result)
print({about["classes"][k]: f"{(label == k).mean():.1%}" for k in np.unique(label)})
