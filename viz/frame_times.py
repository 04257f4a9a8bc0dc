"""When each frame of a video is shown, and what is wrong with the file: decode it once, before it is parsed.

    python viz/frame_times.py clip.mp4                     # on stderr a line with milliseconds for each frame

A program of its own, because FFmpeg tells its errors to the terminal alone, and because a file can bring it down.
"""

import os
import sys

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"                # errors; read when OpenCV first opens a video
os.environ["OPENCV_LOG_LEVEL"] = "OFF"                     # OpenCV's own remarks are not about the file

import cv2  # noqa: E402


def main():
    capture = cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG)
    while capture.grab():
        print(capture.get(cv2.CAP_PROP_POS_MSEC), file=sys.stderr)       # stdout is OpenCV's


if __name__ == "__main__":
    main()
