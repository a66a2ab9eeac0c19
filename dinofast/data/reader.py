"""Decoded images by index: a read that fails is tried again, and another image stands in for one
that cannot be had."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Literal, NamedTuple

from PIL import Image

from dinofast.data.dataset import ImageDataset
from dinofast.data.decode import TransientReadError, UnreadableImage, decode, remark, shade

RETRY_PAUSES_S = (0.1, 1.0)  # before a file that could not be read is tried again
# of trying file after file, none of which can be read: then it is the storage that fails
UNREAD_S = 30.0
PROBES = 100  # images tried before it is said that none decodes
SAMPLE, SAMPLE_S = 20, 2.0  # images looked at before a run, and seconds after which no more are


class Met(NamedTuple):
    """A file that gave no image, and why. kind: "bad" for good; "unread" this time, and its image
    replaced; "lost": the last of many that could not be read."""

    path: str
    reason: str
    kind: Literal["bad", "unread", "lost"]


class ImageReader:
    """Decoded images of a dataset by index. The next index, cyclically, that decodes stands in for
    one that does not.

    So what stands in depends on the files alone, not on the process, its threads or the steps
    before, and a resumed run sees what an unbroken one sees. Only a file that cannot be read for
    the moment (`TransientReadError`) is another matter: it is tried again at once, replaced if that
    fails too, and tried again when its turn comes next; a run that meets it at another time may see
    it where this one saw the next image. Threads may share one.

    value_range, exif: see `decode`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        value_range: tuple[float, float] | None = None,
        exif: bool = False,
    ) -> None:
        self.dataset = dataset
        self._to_rgb = partial(decode, value_range=value_range, exif=exif)
        self._bad: set[int] = set()  # so that each is decoded once
        self._any_decodes = False
        self._lost = False  # a thread has given up, and nothing could be read since

    def decode(self, index: int) -> Image.Image:
        """The image at this index. Raises `UnreadableImage`."""
        for pause_s in () if self._lost else RETRY_PAUSES_S:
            try:
                return self._decode_once(index)
            except TransientReadError:
                time.sleep(pause_s)
        return self._decode_once(index)

    def _decode_once(self, index: int) -> Image.Image:
        image = self._to_rgb(self.dataset.read(index))
        self._any_decodes, self._lost = True, False
        return image

    def decode_next(self, index: int, met: list[Met]) -> tuple[Image.Image | None, int]:
        """The first image from this index on that decodes, and its index. What is met on the way is
        added to `met`: bad files the first time, and the file at `index` whenever it cannot be
        read.

        No image if none decodes any more, or if the storage fails: if for UNREAD_S no file on the
        way could be read. Then the other threads give up at their next file, until one can be read
        again.
        """
        n, failed, unread = len(self.dataset), 0, None
        since = 0.0  # the first of the files in a row that could not be read
        for used in itertools.chain(range(index, n), range(index)):
            if used in self._bad:
                continue
            try:
                return self.decode(used), used
            except TransientReadError as reason:
                now = time.monotonic()
                since = since if unread else now
                unread = Met(self.dataset.path(used), str(reason), "lost")
                if used == index:
                    met.append(unread._replace(kind="unread"))
                if self._lost or now - since >= UNREAD_S:
                    break
            except UnreadableImage as reason:
                met.append(Met(self.dataset.path(used), str(reason), "bad"))
                self._bad.add(used)
                failed, unread = failed + 1, None
                if failed == PROBES and not self._some_decode():
                    break
        if unread:
            self._lost = True
            met.append(unread)
        return None, index

    def forget(self) -> None:
        """What was found bad is met again."""
        self._bad.clear()

    def remark(self) -> str:
        """A sentence if of SAMPLE images from all over the dataset nearly all are black or white,
        else "". Says nothing of files that cannot be read."""
        shades, n, start = Counter[str](), 0, time.monotonic()
        for index in range(0, len(self.dataset), -(-len(self.dataset) // SAMPLE)):
            if time.monotonic() - start > SAMPLE_S:
                break
            with suppress(UnreadableImage), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
                shades[shade(self._to_rgb(self.dataset.read(index)))] += 1
                n += 1
        return remark(shades, n)

    def _some_decode(self) -> bool:
        """Whether anything has decoded in this process, or does among PROBES images from all over
        the dataset, or may do so another time."""
        for index in range(0, len(self.dataset), max(1, len(self.dataset) // PROBES)):
            if self._any_decodes:
                return True
            try:
                self.decode(index)
            except TransientReadError:
                return True
            except UnreadableImage:
                pass
        return self._any_decodes
