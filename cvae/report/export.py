"""Write a trained model in a form that other programs read.

    python -m cvae.report.export q1 --to model.onnx            # for onnxruntime and others
    python -m cvae.report.export q1 --to model.pt2             # for PyTorch without this package
    python -m cvae.report.export q1 --to model.safetensors     # weights and settings, for cvae.load
    python -m cvae.report.export q1 --to hub-folder my-model   # a folder for the Hugging Face Hub; nothing is uploaded

The run is a folder, a name below runs/, or a .safetensors file. Each file is checked against the model before it takes
its place. docs/export.md says what is in them. Exit codes: 0 done, 2 usage, or a package is missing; 3 the run cannot
be read, or a file would not do what the model does; 5 disk.
"""

import argparse
import io
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvae.console import command, say
from cvae.data.masks import is_picture, mask_name, mask_png
from cvae.data.tasks import FixedMask
from cvae.errors import DataError, UsageError
from cvae.model.cvae import CVAE
from cvae.report import figures
from cvae.run.checkpoint import atomic_file, telling_of_disk, write_atomically, write_json
from cvae.run.folder import CONFIG, OBSERVED, WEIGHTS, quoted
from cvae.run.load import Trained, as_safetensors, description, load_trained, passed_on
from cvae.run.plan import user_path
from cvae.settings import VERSION

TOLERANCE, HALF_TOLERANCE = 1e-5, 0.05  # of a pixel in [0, 1]; float16 has 11 bits, and errors add up over the layers
FORMATS = ONNX, PT2, HALVES = ".onnx", ".pt2", ".safetensors"  # the last one alone has weights in half precision
HUB_FOLDER = "hub-folder"
SAMPLES, BATCH = torch.export.Dim("samples", min=1), torch.export.Dim("batch", min=1)
FREE: Any = {"dynamic_shapes": {"x": {0: BATCH}, "eps": {0: SAMPLES, 1: BATCH}}}  # the sizes that a graph leaves open


class Completion(nn.Module):
    """The exported function: pictures with a hidden part and noise → completed pictures, as `content` says it."""

    def __init__(self, model: CVAE):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        given = self.model.task.batch(self.model.task.rows(x)).x
        return self.model.task.compose(given, self.model.completions(given, eps))


def content(trained: Trained, suffix: str, half: bool = False) -> bytes:
    """Return a file of this format: weights, or the function as a graph, for any numbers of samples and pictures."""
    if suffix == HALVES:
        return as_safetensors(trained, half)
    function, task, z = Completion(trained.model), trained.model.task, trained.model.latent_dim
    example = torch.zeros(2, task.height, task.width), torch.zeros(3, 2, z)
    function(*example)  # what the task keeps for later calls is there before
    graph = torch.export.export(function, example, **FREE)
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # where the source code lies on this machine
    size = f"{task.height}, {task.width}"
    metadata = description(trained) | {
        "x": f"float32 [batch, {size}]: pictures, grey levels in [0, 1]; hidden pixels may hold anything",
        "eps": f"float32 [samples, batch, {z}]: noise, N(0, 1), other noise for other samples",
        "completed": f"float32 [samples, batch, {size}]: x where it is observed, else pixel means in [0, 1]",
    }
    if suffix == PT2:
        torch.export.save(graph, buffer := io.BytesIO(), extra_files={"metadata.json": json.dumps(metadata, indent=2)})
        return buffer.getvalue()
    names: Any = {"input_names": ["x", "eps"], "output_names": ["completed"], "external_data": False}
    program: Any = torch.onnx.export(graph, **FREE, **names, verbose=False)
    proto = program.model_proto  # made anew at each look
    import_module("onnx").helper.set_model_props(proto, metadata)
    return bytes(proto.SerializeToString())


def function_in(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function in a file, as the readers of its format compute it."""
    if path.suffix == HALVES:
        return Completion(load_trained(path).model)
    if path.suffix == PT2:
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x, eps: torch.from_numpy(session.run(None, {"x": x.numpy(), "eps": eps.numpy()})[0])


def export(path: Path, trained: Trained, half: bool = False) -> str:
    """Write a file once what is read from it does what the model does; returns what there is to say of it.

    Raises DataError if a pixel differs by more than the tolerance, and DiskError: what stood there is intact.
    """
    task, random = trained.model.task, torch.Generator().manual_seed(0)
    x = torch.rand(3, task.height, task.width, generator=random)
    eps = torch.randn(1, 3, trained.model.latent_dim, generator=random)
    with torch.no_grad(), warnings.catch_warnings(), atomic_file(path) as file:
        warnings.simplefilter("ignore")  # about how an export is done
        file.write(content(trained, path.suffix, half))
        file.flush()
        difference = float((function_in(Path(file.name))(x, eps) - Completion(trained.model)(x, eps)).abs().max())
        if not difference <= (HALF_TOLERANCE if half else TOLERANCE):  # so that NaN is more
            raise DataError(f"{path}: is not written, for its completions differ from the model's by {difference:.1e}")
    size = path.stat().st_size / 1e6
    return f"{path}: {size:.1f} MB; read again, its completions differ from the model's by at most {difference:.1g}"


def export_folder(folder: Path, trained: Trained, half: bool = False) -> str:
    """Write the folder of a model for the Hugging Face Hub, which `cvae.load` reads too; returns what there is to say.

    Raises UsageError if there is something in it already, and what `export` does.
    """
    figures.refuse_to_replace(list(folder.glob("*")))
    with telling_of_disk(f"{folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    line = export(folder / WEIGHTS, trained, half)
    s, task = passed_on(trained.settings), trained.model.task
    write_json(folder / CONFIG, {"settings": s.to_dict(), "images": trained.images, "version": VERSION})
    if is_picture(s) and isinstance(task, FixedMask):
        write_atomically(folder / OBSERVED, mask_png(task.observed))
    write_atomically(folder / "README.md", card(folder.resolve().name, trained).encode())
    return f"{line}\n{folder}: ready; to upload it: hf upload USER/NAME {quoted(folder)}"


def card(name: str, trained: Trained) -> str:
    """Return the model card: what the model is, and how it is used."""
    model, s = trained.model, passed_on(trained.settings)
    images, parameters = s.data or "MNIST", sum(parameter.numel() for parameter in model.parameters())
    if train := trained.images.get("train"):
        images += f", {min(train['count'], s.train_limit or train['count'])} of them"
    mask, images = (text.replace("|", "\\|") for text in (mask_name(s), images))
    return f"""---
library_name: cvae-quadrants
pipeline_tag: image-to-image
tags: [pytorch, safetensors, conditional-vae, image-completion]
---

# {name}

A conditional variational autoencoder (Sohn, Lee and Yan 2015), which samples the hidden part of a picture given the
observed one.

| | |
|---|---|
| pictures | {model.task.height}×{model.task.width}, grey levels in [0, 1] |
| observed | {mask}: {model.task.x_dim} of {model.task.height * model.task.width} pixels |
| training images | {images} |
| model | {s.network}, {s.objective}, {model.latent_dim} dimensions of z, {parameters:,} parameters |

`{CONFIG}` has the settings. With the package `cvae-quadrants`:

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, places = parser.add_argument, f"a file ({', '.join(FORMATS)}), or the word {HUB_FOLDER} and a new folder"
    add("run", type=user_path, metavar="RUN", help="run, as a path or a name below runs/, or a .safetensors file")
    add("--to", nargs="+", required=True, metavar="PATH", help=f"what is to be written: {places}")
    add("--half", action="store_true", help=f"weights in float16, half the size; for {HALVES} and {HUB_FOLDER}")
    options = parser.parse_args(argv)
    words, path = options.to[:-1], user_path(options.to[-1])
    is_folder = words == [HUB_FOLDER]
    suffix = HALVES if is_folder else path.suffix
    if suffix not in FORMATS or len(words) > is_folder or (options.half and suffix != HALVES):
        parser.error(f"--to takes {places}, with --half {HALVES} or {HUB_FOLDER}, not {' '.join(options.to)}")
    packages = "onnx", "onnxscript", "onnxruntime"
    if suffix == ONNX and not all(map(find_spec, packages)):
        raise UsageError(f"{suffix} needs more packages: pip install {' '.join(packages)}")
    say((export_folder if is_folder else export)(path, load_trained(options.run), options.half))
    return 0


if __name__ == "__main__":
    sys.exit(main())
