"""What keeps a run alive and whole: errors, processes, loaders, the folder of a run, checkpoints."""

import importlib.util
from pathlib import Path

try:
    import cv2  # noqa: F401
except ImportError as error:                               # every program comes by here first
    raise SystemExit(f"error: OpenCV cannot be loaded ({error}). On a machine without a screen:\n"
                     "    pip uninstall opencv-python; pip install opencv-python-headless") from None

_datasets = importlib.util.find_spec("datasets").origin
if not Path(_datasets).samefile(Path(__file__).parents[1] / "datasets.py"):
    raise ImportError(f"SCHNet's datasets.py cannot be imported beside {_datasets}: Hugging Face's packages `datasets` and "
                      "`evaluate` go by the same names; use SCHNet in a process that does not import them, with its folder "
                      "first in sys.path")
