"""Write a trained model in a form that other programs read.

    python -m cvae.report.export q1 --to model.onnx            # for onnxruntime and others
    python -m cvae.report.export q1 --to model.pt2             # for PyTorch without this package
    python -m cvae.report.export q1 --to model.safetensors     # weights and settings, for cvae.load
    python -m cvae.report.export q1 --to hub-folder my-model   # a folder for the Hugging Face Hub; nothing is uploaded

The run is a folder, a name below runs/, or a .safetensors file. Each file is checked against the model before it takes
its place. docs/export.md says what is in them. Exit codes: 0 done, 2 usage, or a package is missing; 3 the run cannot
be read, or a file would not do what the model does; 5 disk.
"""

if __name__ == "__main__":
    from cvae.console import before_torch

    before_torch()

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cvae import __version__
from cvae.console import command, say
from cvae.data.mask_pictures import mask_png
from cvae.data.masks import is_picture, mask_name
from cvae.errors import DiskError, UsageError
from cvae.report.formats import FORMATS, Completion, largest_difference, write
from cvae.run.checkpoint import write_atomically
from cvae.run.folder import CONFIG, OBSERVED, WEIGHTS, quoted, write_json
from cvae.run.load import load_trained
from cvae.run.plan import user_path
from cvae.run.weights_file import Trained, passed_on

HUB_FOLDER = "hub-folder"
HALVES = ".safetensors"  # the format that has weights in half precision


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `to` is the file or folder, and `is_folder` says which."""
    parser = argparse.ArgumentParser(
        prog="python -m cvae.report.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=user_path, metavar="RUN", help="run, as a path or a name below runs/, or a .safetensors file")
    add(
        "--to",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"file to write, as its ending says ({', '.join(FORMATS)}), or the word {HUB_FOLDER} and a new folder",
    )
    add("--half", action="store_true", help=f"weights in float16, half the size; for {HALVES} and {HUB_FOLDER}")
    options = parser.parse_args(argv)
    options.is_folder = options.to[0] == HUB_FOLDER and len(options.to) == 2
    if len(options.to) != 1 + options.is_folder or options.to == [HUB_FOLDER]:
        parser.error(f"--to takes a file, or {HUB_FOLDER} and a folder, not {' '.join(options.to)}")
    options.to = user_path(options.to[-1])
    suffix = options.to.suffix.lower()
    if not options.is_folder and suffix not in FORMATS:
        parser.error(f"--to {options.to}: files are written as {', '.join(FORMATS)}; choose one of these endings")
    if options.half and not options.is_folder and suffix != HALVES:
        parser.error(f"--half is for {HALVES} and {HUB_FOLDER}; {suffix} has weights in float32")
    return options


def export(path: Path, trained: Trained, half: bool) -> str:
    """Write a file; returns what there is to say of it. Raises DataError, DiskError and UsageError."""
    make, read = FORMATS[path.suffix.lower()]
    rounded = trained
    if half:
        make = partial(make, half=True)
        rounded = trained._replace(model=copy.deepcopy(trained.model).half().float())
    difference = write(path, rounded, make, read)
    line = (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; read again, its completions differ from the model's by at most "
    )
    if not half:
        return f"{line}{difference:.1g}"
    cost = largest_difference(Completion(rounded.model), trained.model)
    return f"{line}{difference:.1g} with its weights in float16, and by {cost:.1g} with them in float32"


def export_folder(folder: Path, trained: Trained, half: bool) -> str:
    """Write the folder of a model for the Hugging Face Hub, which `cvae.load` reads too; returns what there is to say.

    Raises UsageError if there is something at `folder` already, and what `export` does.
    """
    try:
        if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
            raise UsageError(f"{folder} exists already and is left as it is; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made ({error.strerror or error})") from None
    line = export(folder / WEIGHTS, trained, half)
    settings = passed_on(trained.settings)
    write_json(folder / CONFIG, {"settings": settings.to_dict(), "images": trained.images, "version": __version__})
    if is_picture(settings):
        write_atomically(folder / OBSERVED, mask_png(trained.model.split.observed))
    write_atomically(folder / "README.md", card(folder.resolve().name, trained).encode())
    return f"{line}\n{folder}: ready; to upload it: hf upload USER/NAME {quoted(folder)}"


def card(name: str, trained: Trained) -> str:
    """The model card: what the model is, and how it is used."""
    model, s, images = trained.model, trained.settings, trained.images
    split = model.split
    trained_on = passed_on(s).data or "MNIST"
    if train := images.get("train"):
        trained_on += f", {min(train['count'], s.train_limit or train['count'])} of them"
    rows = {
        "pictures": f"{split.height}×{split.width}, grey levels in [0, 1]",
        "observed": f"{mask_name(s)}: {split.num_observed} of {split.num_pixels} pixels",
        "training images": trained_on,
        "networks, objective": f"{s.network}, {s.objective}",
        "dimensions of z": f"{model.latent_dim}, in {s.levels} level{'s' * (s.levels > 1)}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "written by": f"cvae-quadrants {__version__}",
    }
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return CARD.format(name=name, table=table)


CARD = """---
library_name: cvae-quadrants
pipeline_tag: image-to-image
tags:
- pytorch
- safetensors
- conditional-vae
- image-completion
---

# {name}

A conditional variational autoencoder (Sohn, Lee and Yan 2015), which samples the hidden part of a picture given the
observed one.

| | |
|---|---|
{table}

`model.safetensors` has the weights, and in its metadata all that is needed to build the model; `config.json` has the
settings. With the package `cvae-quadrants`:

```python
import cvae
from huggingface_hub import snapshot_download

model = cvae.load(snapshot_download("USER/{name}"))
completed = model.complete("picture.png", samples=10)
```
"""


@command("export.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    trained = load_trained(options.run)
    say((export_folder if options.is_folder else export)(options.to, trained, options.half))
    return 0


if __name__ == "__main__":
    sys.exit(main())
