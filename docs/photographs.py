"""Make the folder of photographs for the picture on the first page: `python docs/photographs.py FOLDER`.

Tiles of four photographs to train on, and crops of three others to reconstruct. They come with two libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path

import skimage
import sklearn
from PIL import Image

SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
SKIMAGE = Path(skimage.__file__).parent / "data"
TRAIN = [SKLEARN / "china.jpg", SKIMAGE / "coffee.png", SKIMAGE / "rocket.jpg", SKIMAGE / "motorcycle_left.png"]
# left, upper, right, lower
VAL = {
    SKIMAGE / "astronaut.png": (130, 10, 322, 202),
    SKIMAGE / "chelsea.png": (75, 0, 345, 270),
    SKLEARN / "flower.jpg": (155, 70, 465, 380),
}
SIDE = 192


def main(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
    for path in TRAIN:
        photo = Image.open(path).convert("RGB")
        for top in range(0, photo.height - SIDE + 1, SIDE // 2):
            for left in range(0, photo.width - SIDE + 1, SIDE // 2):
                tile = photo.crop((left, top, left + SIDE, top + SIDE))
                tile.save(folder / "train" / f"{path.stem}-{top}-{left}.png")
    for path, box in VAL.items():
        crop = Image.open(path).convert("RGB").crop(box)
        crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(folder / "val" / f"{path.stem}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
