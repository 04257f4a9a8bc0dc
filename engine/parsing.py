"""Parsing many photos: in batches, read ahead and written behind; a bad file does not stop the rest."""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.workers import read_ahead
from errors import in_one_line
from files.atomic import atomic_write
from files.images import ALL_FORMATS, read_photo
from files.inputs import Input
from files.results import Record, Results
from viz import pictures

THREADS = 4                                                # they read and write files while the network works
LESS_MEMORY = "a smaller --batch or --size, or --device cpu"


@dataclass
class Report:
    """Parsed and failed inputs so far; shared by threads."""
    parsed: list[str] = field(default_factory=list)        # names
    failed: list[str] = field(default_factory=list)        # one line each: file and reason

    @contextlib.contextmanager
    def work_on(self, *inputs: Input):
        """Records a failure of these files and carries on; bugs propagate."""
        try:
            yield
        except Exception as error:
            line = in_one_line(error, LESS_MEMORY)
            if not line:
                raise
            self.failed += [line if line.startswith(f"{found.path}: ") else f"{found.path}: {line}" for found in inputs]

    def print(self, seconds: float, out: Path):
        print(f"{len(self.parsed)} parsed in {seconds:.1f} s" + (f", in {out}" if self.parsed else ""), flush=True)
        if self.failed:
            failed = "\n  ".join(map(printable, self.failed))
            print(f"{len(self.failed)} not parsed:\n  {failed}", file=sys.stderr, flush=True)


def printable(line: str) -> str:
    """File names may hold any character."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", line)


@dataclass(eq=False)
class Photo:
    found: Input
    origin: Record                                         # of the file before it was read: it may be edited meanwhile
    image: np.ndarray


class Job:
    """Parses inputs with a `predict.Parser` into `results`; threads read ahead and write behind."""

    def __init__(self, parser, results: Results, report: Report):
        self.parser, self.results, self.report = parser, results, report

    def run(self, batches: list[list[Input]], done: set[Input], progress: Callable[[], object]):
        """A label can depend, in the last bits, on what else is in its batch. So batches are always the same, whichever
        process parses them: photos of a batch that are `done` go through the network too, but are not written again."""
        reading = read_ahead(self._read, itertools.chain.from_iterable(batches), THREADS, lambda found: found.path)
        with contextlib.closing(reading), ThreadPoolExecutor(THREADS) as pool:
            writing = []
            try:
                for batch in batches:
                    group = [photo for _, photo in itertools.islice(reading, len(batch)) if photo]
                    labels = self._parse(group, done)
                    list(map(Future.result, writing))            # the group before, written while this one was parsed
                    writing = [pool.submit(self._write, *one, progress) for one in labels]
            finally:
                list(map(Future.result, writing))

    def _read(self, found: Input) -> Photo | None:
        with self.report.work_on(found):
            return Photo(found, self.results.origin(found.path), read_photo(found.path, ALL_FORMATS))
        return None

    def _parse(self, group: list[Photo], done: set[Input]) -> list[tuple[Photo, np.ndarray | None]]:
        """Photos that are to be written, with their label maps; None: it comes with the probabilities."""
        wanted = [photo for photo in group if photo.found not in done]
        if "probs" in self.results.kinds or not wanted:
            return [(photo, None) for photo in wanted]
        with self.report.work_on(*[photo.found for photo in wanted]):
            labels = self.parser.parse([photo.image for photo in group])
            return [(photo, label) for photo, label in zip(group, labels) if photo in wanted]
        return []

    def _write(self, photo: Photo, label: np.ndarray | None, progress: Callable[[], object]):
        results, parser, name = self.results, self.parser, photo.found.name
        with self.report.work_on(photo.found):
            if label is None:
                probabilities = parser.probabilities(photo.image)
                label = probabilities.argmax(0).astype(np.uint8)
            kept = results.claim(photo.origin, name)
            pictures.save_palette_png(results.path("labels", name), label, parser.palette,
                                      results.record(photo.origin, label, kept))
            if "probs" in results.kinds:
                with atomic_write(results.path("probs", name)) as part:
                    np.save(part, probabilities.astype(np.float16))
            pictures.save_jpeg(results.path("overlays", name), parser.overlay(photo.image, label))
            self.report.parsed.append(name)
        progress()
