"""python tests/demo/progress.py RUN PICTURE: a run's validation pictures side by side, all from the same noise."""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def progress(run, picture, shown=7, line=16):
    """Composes control | first picture drawn at each of `shown` steps, the first and the last among them | target."""
    side = json.loads(Path(run, "run.json").read_text())["config"]["resolution"]
    files = sorted(Path(run, "validation").glob("step-*.png"), key=lambda file: int(file.stem[5:]))
    if not files:
        return
    files = [files[n] for n in sorted({k * (len(files) - 1) // (shown - 1) for k in range(shown)})]
    columns = [(file.stem.replace("-", " "), Image.open(file), side) for file in files]
    first = columns[0][1]
    columns = [("control", first, 0), *columns, ("target", first, first.width - side)]
    cell = side * -(-160 // side)  # small pictures are enlarged
    height = cell * first.height // side
    sheet = Image.new("RGB", (cell * len(columns), line + height), "white")
    for n, (heading, grid, left) in enumerate(columns):
        ImageDraw.Draw(sheet).text((n * cell + 4, 2), heading, fill="black")
        column = grid.crop((left, 0, left + side, first.height))
        sheet.paste(column.resize((cell, height), Image.Resampling.NEAREST), (n * cell, line))
    sheet.save(picture)


if __name__ == "__main__":
    progress(*sys.argv[1:3])
