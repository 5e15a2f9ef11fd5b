"""Pictures that cannot be read when their turn comes: named, or left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.utils.events import get_event_storage
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .pictures import UnreadableError
from .stream import SampleStream

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.data.unreadable")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Around the reading of a picture: raises ``UnreadableError`` if that fails."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableError(
            f"{path}: expected a picture, got what cannot be read: {error}"
        ) from error


class Mapper(DatasetMapper):
    """detectron2's, which names a picture that cannot be read."""

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            return super().__call__(dataset_dict)
        except Exception:
            # Was it the picture, or what belongs to it? It is read first, and by itself.
            with naming(dataset_dict["file_name"]):
                read_image(dataset_dict["file_name"], self.image_format)
            raise


class Readable(Dataset):
    """The items of a data set, each a dict, whose pictures can be read.

    An item has "skipped" as well, the messages about pictures that were left out, or that alone.
    """

    def __init__(self, dataset: Any, *, skip: bool, replace: bool = False, hint: str = ""):
        """
        Args:
            dataset: raises ``UnreadableError`` for a picture that cannot be read.
            skip: whether such a picture is left out; else it is an error.
            replace: whether the next that can be read takes the place of one that is left out.
            hint: how to learn of all of them, for the error.
        """
        self.dataset = dataset
        self.skip = skip
        self.replace = replace
        self.hint = hint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            UnreadableError: the picture, or every picture, cannot be read.
        """
        skipped: list[str] = []
        for attempt in range(len(self) if self.replace else 1):
            try:
                item = self.dataset[(index + attempt) % len(self)]
            except UnreadableError as error:
                if not self.skip:
                    raise UnreadableError(
                        f"{error}; repair it, or set DATALOADER.SKIP_CORRUPT True to leave such "
                        f"pictures out{self.hint}"
                    ) from error
                skipped.append(str(error))
            else:
                return {**item, "skipped": skipped}
        if self.replace:
            raise UnreadableError(
                f"expected pictures, none of {len(self)} can be read: {skipped[0]}"
            )
        return {"skipped": skipped}


class CountingLoader(DataLoader):
    """Names and counts the pictures that its batches of a :class:`Readable` leave out.

    Attributes:
        skipped: how many they were; in training also the trainer's scalar ``skipped_pictures``.
    """

    skipped = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            messages, batch = _without_messages(batch)
            for message in messages:
                self.skipped += 1
                LOGGER.warning("%s; left out (%d)", message, self.skipped)
            if self.skipped and isinstance(self.batch_sampler, SampleStream):
                get_event_storage().put_scalar("skipped_pictures", self.skipped)
            if batch:
                yield batch


def _without_messages(batch: dict | list[dict]) -> tuple[list[str], dict | list[dict] | None]:
    """The messages, and a classifier's or a detector's batch of what has an image, if any does."""
    if isinstance(batch, dict):
        return batch.pop("skipped"), batch if batch["image"] is not None else None
    messages = [message for record in batch for message in record.pop("skipped")]
    return messages, [record for record in batch if "image" in record]
