"""Writing a data set so that it is there whole, or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ARGUMENTS_FILE = "made_with.json"


def make_folder(
    target: Path, arguments: dict, build: Callable[[Path], None], *, force: bool = False
) -> bool:
    """Has ``build`` fill a temporary folder beside ``target``, then renames it.

    Args:
        arguments: what the contents depend on; kept in the folder.
        force: replace a data set that was made with other arguments.

    Returns:
        False if ``target`` was there already, made with the same arguments.

    Raises:
        FileExistsError: it was there, made with others or by somebody else.
    """
    arguments = json.loads(json.dumps(arguments))
    if target.exists():
        record = target / ARGUMENTS_FILE
        if not record.is_file():
            raise FileExistsError(
                f"{target}: expected nothing or a data set made here, found a folder without "
                f"{ARGUMENTS_FILE}; move it away"
            )
        found = json.loads(record.read_text())
        if not force and found == arguments:
            return False
        if not force:
            raise FileExistsError(
                f"{target}: expected a data set made with {arguments}, found one made with "
                f"{found}; --force replaces it"
            )
    with replacing_folder(target) as made:
        build(made)
        (made / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2))
    return True


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder, which takes the place of ``target`` once it is filled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        made = Path(folder) / target.name
        made.mkdir()
        yield made
        if target.exists():
            target.rename(Path(folder) / "replaced")
        made.rename(target)


def write_coco(path: Path, images: list, categories: list, annotations: list | None) -> None:
    """Writes COCO's JSON; without annotations, in the form of its test-dev ``image_info`` files."""
    content = {"info": {"description": path.stem}, "licenses": [], "images": images}
    content["categories"] = categories
    if annotations is not None:
        content["annotations"] = annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
