"""Frame timestamps of a video, and the decoder's messages: decodes the file once, before it is parsed.

    python files/frame_times.py clip.mp4                   # a line with milliseconds for each frame, on stderr

A separate program, because FFmpeg prints its messages only, and a bad file can crash it. The messages up to the first
"Statistics:" are about opening the file, the later ones about opening and decoding all of it.
"""

import os
import sys

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "48"                # debug; read when OpenCV first opens a video
os.environ["OPENCV_LOG_LEVEL"] = "OFF"                     # OpenCV's own messages are not about the file

import cv2  # noqa: E402

if __name__ == "__main__":
    capture = cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG)
    capture.grab()
    capture.release()                                      # prints "Statistics:"
    capture = cv2.VideoCapture(sys.argv[1], cv2.CAP_FFMPEG)
    while capture.grab():
        print(capture.get(cv2.CAP_PROP_POS_MSEC), file=sys.stderr)       # OpenCV prints on stdout
