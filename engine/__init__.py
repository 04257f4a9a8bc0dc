"""What keeps a run alive and whole: errors, processes, loaders, the folder of a run, checkpoints."""

try:
    import cv2  # noqa: F401
except ImportError as error:                               # every program comes by here first
    raise SystemExit(f"error: OpenCV cannot be loaded ({error}). On a machine without a screen:\n"
                     "    pip uninstall opencv-python; pip install opencv-python-headless") from None
