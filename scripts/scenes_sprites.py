"""Rebuilds src/fastar/data/scenes/sprites.png from the two packages that its pictures and names come from.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python scripts/scenes_sprites.py FOLDER        the folder that holds the two .tgz files

Each picture is cut to what is opaque and scaled so that its longer side fills a cell of 48 pixels.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from fastar.data.scenes.nouns import LABELS
from fastar.data.scenes.sprites import ATLAS, CELL, COLUMNS

PICTURES = "lobehub-fluent-emoji-3d-1.1.0.tgz"
NAMES = "emojibase-data-17.0.0.tgz"
FAINTEST = 8  # alpha below this is no part of the picture


def picture_of(archive: tarfile.TarFile, hexcode: str) -> Image.Image:
    """The picture of an emoji; emojibase leaves out the variation selector that some files have in their name."""
    names = set(archive.getnames())
    for name in (f"package/assets/{hexcode}.webp", f"package/assets/{hexcode}-fe0f.webp"):
        if name in names:
            file = archive.extractfile(name)
            assert file is not None, f"{name} is no plain file"
            return Image.open(io.BytesIO(file.read())).convert("RGBA")
    raise KeyError(f"{PICTURES} has no picture {hexcode}")


def cell_of(picture: Image.Image) -> Image.Image:
    """The picture in a cell: RGBA, CELL x CELL, centred."""
    box = picture.getchannel("A").point([255 * (a >= FAINTEST) for a in range(256)]).getbbox()
    picture = picture.crop(box)
    scale = CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    # pasted with itself as the mask on nothing, so that what cannot be seen is zero
    seen = picture.getchannel("A").point([255 * (a > 0) for a in range(256)])
    cell.paste(picture, ((CELL - width) // 2, (CELL - height) // 2), seen)
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with tarfile.open(folder / NAMES) as archive:
        file = archive.extractfile("package/en/data.json")
        assert file is not None, "package/en/data.json is no plain file"
        hexcodes = {entry["label"]: entry["hexcode"].lower() for entry in json.load(file)}
    rows = -(-len(LABELS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    with tarfile.open(folder / PICTURES) as archive:
        for number, label in enumerate(LABELS.values()):
            row, column = divmod(number, COLUMNS)
            atlas.paste(cell_of(picture_of(archive, hexcodes[label])), (column * CELL, row * CELL))
    atlas.save(ATLAS, optimize=True)
    print(f"{ATLAS.name}: {len(LABELS)} sprites, {ATLAS.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
