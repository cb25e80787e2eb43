"""python tests/progress.py RUN PICTURE: the validation pictures of a run side by side: control, then the same noise at each step, then the target."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

CELL, LINE = 160, 16  # as cv4ctrl.save_grid lays them out up to 160 px


def progress(run, picture, shown=7):
    """Compose `picture`, the first one drawn of each case, of at most `shown` of the run's steps, the first and the last among them; nothing where none was drawn."""
    files = sorted(Path(run, "validation").glob("step-*.png"), key=lambda f: int(f.stem.split("-")[1]))
    if not files:
        return
    last, count = len(files) - 1, min(shown, len(files))
    files = [files[round(i * last / max(1, count - 1))] for i in range(count)]
    grids = [Image.open(file).convert("RGB") for file in files]
    columns = [
        ("control", grids[0], 0),
        *((file.stem.replace("-", " "), grid, 1) for file, grid in zip(files, grids)),
        ("target", grids[0], grids[0].width // CELL - 1),
    ]
    sheet = Image.new("RGB", (CELL * len(columns), grids[0].height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (heading, grid, place) in enumerate(columns):
        pen.text((number * CELL + 4, 2), heading, fill="black")
        for top in range(2 * LINE, grid.height, CELL + LINE):
            sheet.paste(grid.crop((place * CELL, top, (place + 1) * CELL, top + CELL)), (number * CELL, top))
    for top in range(LINE, sheet.height, CELL + LINE):  # the captions, which run over the columns
        sheet.paste(grids[0].crop((0, top, 3 * CELL, top + LINE)), (0, top))
    sheet.save(picture)
    print(f"the same noise at steps {', '.join(file.stem.split('-')[1] for file in files)}: {picture}")


if __name__ == "__main__":
    progress(*sys.argv[1:3])
