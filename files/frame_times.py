"""Frame timestamps of a video, and the decoder's errors: decodes the file once, before it is parsed.

    python files/frame_times.py clip.mp4                   # a line with milliseconds for each frame, on stderr

A program of its own, because FFmpeg reports errors only on stderr, and a bad file can crash it.
"""

import os
import sys

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "40"                # verbose; read when OpenCV first opens a video
os.environ["OPENCV_LOG_LEVEL"] = "OFF"                     # OpenCV's own messages are not about the file

import cv2  # noqa: E402


def main():
    capture = cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG)
    while capture.grab():
        print(capture.get(cv2.CAP_PROP_POS_MSEC), file=sys.stderr)       # OpenCV prints on stdout


if __name__ == "__main__":
    main()
