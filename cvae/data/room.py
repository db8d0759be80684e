"""Whether images fit into the memory: what is held of them, from reading to training or evaluation."""

from collections.abc import Mapping

from cvae.data.division import Rows
from cvae.data.images import DRAWN_ONCE
from cvae.data.masks import is_picture, make_split
from cvae.data.parts import Reading
from cvae.settings import Settings

Sum = dict[str, int]  # bytes, by what they are for


def needed(rows: Rows, sizes: Mapping[str, tuple[int, int]], s: Settings, reading: Reading) -> tuple[Sum, Sum]:
    """The bytes of memory that these images take at the peak, and of the GPU's, if they are brought to one.

    All images of a source are read, whatever `s.train_limit`, since all are identified: a byte a pixel, and more while
    they are read. Then those that are used are brought into the order of the networks, once more a byte a pixel, two
    where they are drawn anew each epoch; and after the baseline has been trained, its guesses are kept, four bytes
    a hidden pixel.
    """
    counts = {name: len(chosen) for name, (_, chosen) in rows.items()}
    height, width = next(iter(sizes.values()))
    pixels = height * width
    read = {"pixels": sum(counts.values()) * pixels}
    more = [0, *(2 * counts.get(name, 0) * pixels for name in DRAWN_ONCE[s.targets])]
    for part in {part for part, _ in rows.values()}:
        number = sum(len(chosen) for each, chosen in rows.values() if each is part)
        stored = number * part.height * part.width
        is_scaled = s.size is not None and (part.height, part.width) != (height, width)
        peak = max(part.held(number), stored * (1 + s.transpose), stored + number * pixels if is_scaled else 0)
        more.append(peak - number * pixels)
    stages = [read | {"copies as they are read": max(more)}]
    if "train" not in rows:
        used, last = [counts["test"] * pixels], {"pixels in order": counts["test"] * pixels}
        stages.append(read | last)
    else:
        images = [min(counts["train"], s.train_limit or counts["train"]), counts["validation"]]
        used = [number * pixels for number in images]
        hidden = pixels if is_picture(s) else make_split(s, height, width).num_hidden
        guesses = {"the baseline's guesses": 4 * hidden * sum(images)}
        last = {"pixels in order": sum(used) + used[0] * (s.targets == "binary" or s.bend > 0), **guesses}
        stages += [read | {"pixels in order": sum(used)}] + ([read | last] if reading.keep else [last])
    if reading.gpu is not None:
        return max(stages[0], read | {"pixels in order": max(used)}, key=_total), last
    return max(stages, key=_total), {}


def shortage(sums: tuple[Sum, Sum], reading: Reading) -> str | None:
    """The words for the memory that is too small; None: none is."""
    places = (sums[0], reading.memory, "are free"), (sums[1], reading.gpu, "are free on the GPU")
    for needs, room, where in places:
        if room is not None and _total(needs) > room:
            words = " + ".join(f"{number / 2**20:,.0f} MiB of {name}" for name, number in needs.items() if number)
            return f"need {words} = {_total(needs) / 2**20:,.0f} MiB, and {room / 2**20:,.0f} MiB {where}"
    return None


def _total(sums: Sum) -> int:
    return sum(sums.values())
