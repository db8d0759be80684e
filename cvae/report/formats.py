"""A trained model as files that other programs read: ONNX, `torch.export`'s, and `.safetensors`, each with its reader.

The first two hold one function, `Completion`: pictures and noise → completed pictures, for any number of pictures and
samples. Their metadata say what goes in and comes out, beside what `weights_file.description` says.
"""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from cvae.errors import DataError, UsageError
from cvae.model.cvae import CVAE
from cvae.run.checkpoint import atomic_file
from cvae.run.weights_file import Trained, as_safetensors, description, load_safetensors

TOLERANCE = 1e-5  # of a pixel in [0, 1]
LARGEST_ONNX = 2_000_000_000  # bytes of weights; the format holds 2 GiB
CHECKED = ((1, 1), (3, 2))  # numbers of samples and of pictures

Function = Callable[[Tensor, Tensor], Tensor]


class Completion(nn.Module):
    """Pictures with a hidden part → completed pictures: what is exported.

    x: `[B, height, width]`, in [0, 1]; its hidden pixels are not looked at. eps: noise, N(0, 1), `[S, B, latent_dim]`.
    Returns `[S, B, height, width]`, in [0, 1]: x where it is observed, else pixel means of p(y|x,z) at z ~ p(z|x).
    """

    def __init__(self, model: CVAE):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        split = self.model.split
        observed = split.split(x)[0]
        return split.compose(  # type: ignore[no-any-return]
            observed, self.model.completions(observed, eps)
        )


def write(path: Path, trained: Trained, make: Callable[[Trained], bytes], read: Callable[[Path], Function]) -> float:
    """Write what `make` makes of a model, once what `read` finds in the file does what the model does.

    Returns the largest difference of a completed pixel. Raises DataError if it is more than `TOLERANCE`, and DiskError:
    in both cases what stood at `path` is intact.
    """
    content = make(trained)
    with atomic_file(path) as file:
        file.write(content)
        file.flush()
        difference = largest_difference(read(Path(file.name)), trained.model)
        if not difference <= TOLERANCE:
            raise DataError(f"{path}: is not written, for its completions differ from the model's by {difference:.1e}")
    return difference


@torch.no_grad()
def largest_difference(function: Function, model: CVAE) -> float:
    """How far a pixel that a function completes lies from the model's at most, for random pictures and noise."""
    found = [torch.zeros(())]
    random = torch.Generator().manual_seed(0)
    for samples, batch in CHECKED:
        x = torch.rand(batch, model.split.height, model.split.width, generator=random)
        eps = torch.randn(samples, batch, model.latent_dim, generator=random)
        found.append((function(x, eps) - Completion(model)(x, eps)).abs().max())
    return float(torch.stack(found).max())  # NaN if there is one


def inputs_and_outputs(model: CVAE) -> dict[str, str]:
    """What an exported function takes and gives, by name, in words."""
    picture, noise = f"{model.split.height}, {model.split.width}", f"samples, batch, {model.latent_dim}"
    return {
        "x": f"float32 [batch, {picture}]: pictures, grey levels in [0, 1]; hidden pixels may hold anything",
        "eps": f"float32 [{noise}]: noise, N(0, 1), other noise for other samples",
        "completed": f"float32 [samples, batch, {picture}]: x where it is observed, else pixel means in [0, 1]",
    }


def as_onnx(trained: Trained) -> bytes:
    """The ONNX file of a model. Raises UsageError without the packages for it, and for a model that is too large."""
    needed_for_onnx("onnx", "onnxscript", "onnxruntime")
    if sum(tensor.nbytes for tensor in trained.model.state_dict().values()) > LARGEST_ONNX:
        raise UsageError("an ONNX file holds 2 GB, and the weights are more; choose .pt2 or .safetensors")
    explained = inputs_and_outputs(trained.model)
    function, example, shapes = traced(trained.model)
    names: dict[str, Any] = {"input_names": ["x", "eps"], "output_names": ["completed"]}
    with exporting():
        program = torch.onnx.export(
            function, example, dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False, **names
        )
    assert program is not None
    proto = program.model_proto
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # where the source code lies on this machine
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = explained[value.name]
    for key, text in {**description(trained), **explained}.items():
        proto.metadata_props.add(key=key, value=text)
    content: bytes = proto.SerializeToString()
    return content


def from_onnx(path: Path) -> Function:
    """The function in an ONNX file, as onnxruntime computes it. Raises UsageError without that package."""
    session = needed_for_onnx("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x, eps: torch.from_numpy(session.run(None, {"x": x.numpy(), "eps": eps.numpy()})[0])


def needed_for_onnx(*names: str) -> Any:
    """The last of these packages. Raises UsageError, with the command that installs them, if one is missing."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        missing = f"{error.name or error} cannot be imported"
        raise UsageError(f"ONNX needs more packages ({missing}): pip install onnx onnxscript onnxruntime") from None


def as_pt2(trained: Trained) -> bytes:
    """The file of `torch.export` of a model; `metadata.json` is among its extra files."""
    metadata = {**description(trained), **inputs_and_outputs(trained.model)}
    buffer = io.BytesIO()
    with exporting():
        function, example, shapes = traced(trained.model)
        program = torch.export.export(function, example, dynamic_shapes=shapes)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # where the source code lies on this machine
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    return buffer.getvalue()


def from_pt2(path: Path) -> Function:
    """The function in such a file."""
    with open(path, "rb") as file, exporting():
        return torch.export.load(file).module()


def traced(model: CVAE) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Any]]:
    """The function to export, an example of its inputs, and which sizes stay open: of pictures and of samples."""
    function = Completion(model)
    example = torch.zeros(2, model.split.height, model.split.width), torch.zeros(3, 2, model.latent_dim)
    function(*example)  # what a split keeps for later calls is there before
    samples, batch = Dim("samples", min=1), Dim("batch", min=1)
    return function, example, {"x": {0: batch}, "eps": {0: samples, 1: batch}}


@contextmanager
def exporting() -> Iterator[None]:
    """Without gradients, and without warnings about how an export is done."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def from_safetensors(path: Path) -> Function:
    """The function of the model in a file."""
    return Completion(load_safetensors(path))


FORMATS: dict[str, tuple[Callable[..., bytes], Callable[[Path], Function]]] = {
    ".onnx": (as_onnx, from_onnx),
    ".pt2": (as_pt2, from_pt2),
    ".safetensors": (as_safetensors, from_safetensors),
}
"""What makes a file and what reads it, by the ending of its name."""
