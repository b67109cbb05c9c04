"""What a source of training data is: captions in an order that never changes, and in most of them an image for each."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from ..demo.world import TRAIN_SEED, World
from ..errors import InputError
from .pictures import CENTRE, Picture, Unreadable, View, load


class Source(ABC):
    """A finite list of captions that never changes order.

    Attributes:
        captions: one a sample, "" for none.
    """

    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.captions)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all captions, in order, and of what tells the images from others; the same in every run."""


class ImageSource(Source):
    """Captioned images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call image `index`."""

    @abstractmethod
    def pictures(self, index: int, resolution: int, views: Sequence[View] = (CENTRE,)) -> list[Picture]:
        """Squares of `resolution` pixels of image `index`, one a view; called from several threads.

        Raises :class:`.pictures.Unreadable` for an image that cannot be decoded, InputError where reading fails otherwise.
        """


class EncodedImages(ImageSource):
    """Images in files or columns, decoded by Pillow."""

    @abstractmethod
    def data(self, index: int) -> bytes:
        """The encoded image; raises OSError, or Unreadable where there is none."""

    def pictures(self, index: int, resolution: int, views: Sequence[View] = (CENTRE,)) -> list[Picture]:
        try:
            data = self.data(index)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise Unreadable(error.strerror or type(error).__name__) from error
        except OSError as error:  # not the image's fault, so not to be remembered as such
            raise InputError(
                f"expected to read {self.name(index)!r}, got: {error}; see to the disk or network and start again: finished "
                "parts of the cache are kept"
            ) from error
        return load(data, resolution, views)


class WorldImages(ImageSource):
    """The first `count` images of the demo's training world, drawn at whatever resolution is asked for.

    Args:
        count: how many images.
        captioned: false leaves all captions empty.
    """

    def __init__(self, count: int, captioned: bool = True) -> None:
        self.captions = World(TRAIN_SEED).captions(range(count)) if captioned else [""] * count

    def name(self, index: int) -> str:
        return f"demo image {index}"

    def pictures(self, index: int, resolution: int, views: Sequence[View] = (CENTRE,)) -> list[Picture]:
        pixels = World(TRAIN_SEED, resolution).pixels([index])[0]
        size = (resolution, resolution)  # a square has one place to be cut from
        return [Picture(pixels.flip(-1) if view.flip else pixels, size, (0, 0)) for view in views]

    def fingerprint(self) -> str:
        found = digest(self.captions)
        # the pixels are a function of code: a few of them tell when it was changed
        found.update(World(TRAIN_SEED).pixels(range(min(32, len(self)))).numpy().tobytes())
        return str(found.hexdigest())


def digest(*lists: Iterable[str]) -> Any:
    """A hash object fed with lists of texts, each text with its length."""
    found = hashlib.blake2b(digest_size=16)
    for texts in lists:
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")  # names of files may be any bytes
            found.update(len(data).to_bytes(8, "little") + data)
        found.update(b"\xff" * 8)  # as long as no text is: the end of a list
    return found
