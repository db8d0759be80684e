"""Pictures as people have them (files, arrays, Pillow images) as grey levels, and all that are below a folder."""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from cvae.console import Bar
from cvae.data.readers import GREY, SIXTEEN_BIT, Array, Source, checked, levels, naming, part_named
from cvae.data.tasks import Task, described
from cvae.errors import DataError

Picture = Tensor | Array | Image.Image | str | os.PathLike[str]
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")


def read_pictures(
    path: Path, wanted: Collection[str], side: int | None, show: bool, check: Callable[[], None]
) -> Source | None:
    """Read the wanted parts of the pictures below a folder; None where there is no folder, or no picture in it.

    Folders `train`, `test` and `val` are the parts of the set; without the first two of them the set is not divided.
    side: height and width that all are scaled to; None: they have to be of one size. show, check: as in `load_train`.
    """
    names, others = pictures_below(path) if path.is_dir() else ([], 0)
    if not names:
        return None
    parts: dict[str | None, list[str]] = defaultdict(list)
    for name in names:
        top, _, below = name.partition(os.sep)
        parts[part_named(top) if below else None].append(name)
    notes = [f"{others} files that are no pictures passed over"] if others else []
    if "train" not in parts and "test" not in parts:
        parts = {"all": names}
    elif beside := parts.pop(None, []):
        notes.append(f"{len(beside)} pictures beside train and test passed over, {beside[0]} for one")
    source = Source("pictures below", str(path), {}, notes)
    for part, names in parts.items():
        if part != "all" and len(tops := {name.partition(os.sep)[0] for name in names}) > 1:
            raise DataError(f"{path}: has several folders for one part: {', '.join(sorted(tops))}")
        if part in (*wanted, "all"):
            source.parts[str(part)] = _read_all([str(path / name) for name in names], side, notes, show, check)
    return source


def pictures_below(folder: str | Path) -> tuple[list[str], int]:
    """Return the paths in a folder of all pictures below it, sorted, and the number of other files; no hidden ones."""
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    names, others, seen = [], 0, set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        seen.add(os.path.realpath(place))  # a link may lead back
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen]
        for file in (os.path.join(place, name) for name in files if name[0] != "."):
            is_picture = os.path.splitext(file)[1].lower() in suffixes and os.path.isfile(file)
            names += [os.path.relpath(file, folder)] * is_picture
            others += not is_picture
    return sorted(names, key=lambda name: name.split(os.sep)), others


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


def _read_all(
    paths: Sequence[str], side: int | None, notes: list[str], show: bool, check: Callable[[], None]
) -> Tensor:
    first = read_picture(paths[0], side)
    images = np.empty((len(paths), *first.shape), np.uint8)
    with Bar("pictures", len(paths), "img", show) as bar:
        for i, path in enumerate(paths):
            check()
            picture = read_picture(path, side, notes)
            if picture.shape != first.shape:
                sizes = [f"{height}×{width}" for height, width in (picture.shape, first.shape)]
                raise DataError(f"{path}: has {sizes[0]} pixels, and {paths[0]} has {sizes[1]}; --size N scales all")
            images[i] = picture
            bar.update()
    return checked(images, paths.__getitem__, notes)


def resized(images: Tensor, side: int, check: Callable[[], None]) -> Tensor:
    """Return images uint8 `[N, height, width]` scaled to `[N, side, side]`; check as in `load_train`."""
    result = np.empty((len(images), side, side), np.uint8)
    for i, image in enumerate(images.numpy()):
        check()
        result[i] = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(result)


def read_picture(path: str | Path, side: int | None = None, notes: list[str] | None = None) -> Array:
    """Return the grey levels of a picture's file, uint8 `[height, width]`; raise DataError if it cannot be read.

    It is turned as its EXIF orientation says; transparent pixels are black; of several frames the first is taken.
    side: height and width that it is scaled to. notes: takes what was chosen, in words.
    """
    with naming(path, "cannot be read as a picture"), catch_warnings():
        simplefilter("ignore")
        simplefilter("error", Image.DecompressionBombWarning)
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            grey = grey_picture(image, str(path), notes := [] if notes is None else notes)
            if side is not None and grey.size != (side, side):
                grey = grey.resize((side, side), Image.Resampling.LANCZOS)
                notes.append("scaled")
            return np.asarray(grey)


def grey_picture(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Return an open picture in grey levels; arguments as of `read_picture`."""
    if getattr(image, "is_animated", False):
        notes.append("the first one of several frames taken")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
        notes.append("turned as their EXIF orientation says")
    if image.mode[0] in "IF":
        values, most = np.asarray(image)[None], 65535 if image.mode[0] == "I" else 1
        if most > 1 and values.max() < 256:
            raise DataError(f"{name}: is a 16-bit picture with no level above 255 of 65535; store it with 8 bits")
        notes.append(SIXTEEN_BIT if most > 1 else "floats from 0 to 1")
        image = Image.fromarray(levels(values, most, name)[0])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent pixels made black")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    notes += [GREY] * (image.mode not in ("1", "L"))
    return image.convert("L")


def as_images(picture: Picture, task: Task) -> Tensor:
    """Return pictures of the task's size, `[B, height, width]`, uint8 or floats as they are given.

    Args:
        picture: A tensor or an array, `[height, width]` (B = 1) or `[B, height, width]`, uint8, bool or floats; a
            Pillow image or the path of a file, which are read as `read_picture` does.
        task: The task of the model.

    Raises:
        ValueError: For another size or type; DataError: for a file that cannot be read.
    """
    images = as_tensor(picture)
    images = images.float() if images.dtype == torch.bool else images
    size = [task.height, task.width]
    is_known = images.dtype == torch.uint8 or images.is_floating_point()
    if not is_known or images.dim() not in (2, 3) or list(images.shape[-2:]) != size:
        wanted = f"{size} or [B, {task.height}, {task.width}], uint8 or floats in [0, 1]"
        advice = "" if isinstance(picture, Tensor | np.ndarray) else "; cvae.as_digit finds the digit in a photograph"
        raise ValueError(f"pictures for this model are {wanted}, not {described(images)}{advice}")
    return images if images.dim() == 3 else images[None]


def as_tensor(picture: Picture) -> Tensor:
    """Return a tensor or an array as it is, another picture as grey levels, uint8 `[height, width]`."""
    if isinstance(picture, Tensor):
        return picture.detach()
    if isinstance(picture, str | os.PathLike):
        return torch.tensor(read_picture(os.fspath(picture)))
    if isinstance(picture, Image.Image):
        with naming("the picture", "cannot be read as a picture"):
            return torch.tensor(np.asarray(grey_picture(picture, "the picture", [])))
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "buif":
        return torch.tensor(picture.astype(picture.dtype.newbyteorder("="), copy=False))
    kind = f"{picture.dtype} array" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise ValueError(f"a picture is a tensor, a numpy array, a Pillow image or the path of a file, not: {kind}")


def in_range(pixels: Tensor) -> bool:
    """Return whether pixels are uint8, or all in [0, 1]."""
    return pixels.dtype == torch.uint8 or bool(((pixels >= 0) & (pixels <= 1)).all())


def as_pixels(name: str, pixels: Tensor, like: Tensor) -> Tensor:
    """Return pixels as floats in [0, 1], of another tensor's type and device; raise ValueError for floats outside."""
    if not in_range(pixels):
        raise ValueError(f"{name} has to be uint8, or floats in [0, 1], not {described(pixels)}")
    moved = pixels.to(like.device, like.dtype)
    return moved / 255 if pixels.dtype == torch.uint8 else moved
