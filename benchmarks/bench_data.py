"""Images/s of the data path on a CPU: from JPEG files to batches of normalized crops, 2 x 224 and 8
x 96 an image.

    python -m pytest benchmarks/bench_data.py         prints the comparison; --save-results keeps it
    python benchmarks/bench_data.py --save-results    the same without pytest

"official" is the official pipeline rewritten: PIL makes each crop, tensors are normalized and
collated by torch's DataLoader without workers. dinofast's rows give the same crops bit for bit,
which is checked first. "official checkout" is the official `DataAugmentationDINO` itself, where
$DINO_OFFICIAL names a checkout and torchvision is there; "DALI" the same kind of work by DALI's own
CPU operators, where that is there. Those two draw crops of their own. Photographs are those of
photographs.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data_on_gpu
import numpy as np
import official_checkout
import photographs
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinofast.bench.record import main, version
from dinofast.bench.timing import Turns, add_ratios, quartiles, row_of
from dinofast.config import Config
from dinofast.data import Loader, augmentation, backend_dali, backend_native, make_loader
from dinofast.data.augmentation import Draw
from dinofast.data.backend_pil import render
from dinofast.data.decode import decode
from dinofast.data.sampler import batch_indices
from dinofast.runtime.backends import cores

NAME = "data"
ALL_CORES = "dinofast, all cores"
BATCHES = 4  # of it in a turn: its threads start and end with that


class Case(NamedTuple):
    photographs: int
    batch: int
    sides: tuple[int, int] = (224, 96)

    def __str__(self) -> str:
        return (
            f"{self.photographs} photographs, 2 x {self.sides[0]} and 8 x {self.sides[1]} "
            "crops, float32, one thread"
        )


def cases(device: torch.device) -> list[Case | data_on_gpu.Case]:
    return [Case(512, 16)] if device.type == "cpu" else [data_on_gpu.Case(512, 128)]


def candidates_of(case: Case | data_on_gpu.Case) -> tuple[str, ...]:
    if isinstance(case, data_on_gpu.Case):
        return tuple(data_on_gpu.CANDIDATES)
    return "official", "official checkout", "DALI", "dinofast, pil", "dinofast", ALL_CORES


class Turn(NamedTuple):
    """How a candidate makes the next batch, or several, the first of which it returns: (N, 3, S, S)
    each, crop-major.

    same: it makes the official crops, bit for bit. before, after: untimed.
    """

    name: str
    call: Callable[[], Sequence[Tensor]]
    same: bool = True
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    batches: int = 1


def measure_case(case: Case | data_on_gpu.Case, device: torch.device) -> dict[str, Any]:
    """Every candidate makes the same batch, then every candidate the next, until all photographs
    are through. On a GPU see data_on_gpu.py."""
    if isinstance(case, data_on_gpu.Case):
        return list(data_on_gpu.growing(case, device))[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="dinofast-") as folder:
            photographs.write(Path(folder) / "photographs", case.photographs)
            turns, left_out = make_turns(case, Path(folder))
            check_same(turns)
            rounds = case.photographs // case.batch
            together = Turns(
                {turn.name: lambda turn=turn: measure_turn(turn, case.batch) for turn in turns},
                catch=(),
            )
            together.run(0.0, fewest=rounds, most=rounds)
    finally:
        torch.set_num_threads(threads)
    return {
        "case": str(case),
        "photographs": case.photographs,
        "batch": case.batch,
        "dtype": "float32",
        "implementation": "pil" if backend_native.unavailable_reason() else "native",
        "rounds": rounds,
        "versions": {
            name: version(name) for name in ("pillow", "torchvision", "nvidia-dali-cuda130")
        },
        "rows": add_ratios(
            [data_row(turn.name, together.results[turn.name], turn.same) for turn in turns]
        ),
        "left_out": left_out,
    }


def measure_turn(turn: Turn, batch: int) -> tuple[float, float]:
    """Milliseconds an image of one turn: elapsed, and CPU time of all threads."""
    turn.before()
    elapsed, cpu = time.perf_counter(), time.process_time()
    made = turn.call()
    images = batch * turn.batches
    times = (
        (time.perf_counter() - elapsed) * 1e3 / images,
        (time.process_time() - cpu) * 1e3 / images,
    )
    turn.after()
    del made
    return times


def data_row(
    name: str, turns: Sequence[tuple[float, ...]], same: bool, **more: Any
) -> dict[str, Any]:
    """Of a candidate whose turns took (elapsed, CPU) milliseconds an image; same: it makes the
    official crops, bit for bit."""
    elapsed_ms, cpu_ms = ([turn[i] for turn in turns] for i in range(2))
    return row_of(
        name,
        elapsed_ms,
        same_crops=same,
        images_per_s=1e3 / quartiles(elapsed_ms)[1],
        cpu_ms=quartiles(cpu_ms)[1],
        **more,
    )


def check_same(turns: Sequence[Turn]) -> None:
    """Raise AssertionError unless all are of one shape, and those said to be the same so bit for
    bit. Takes a turn of each."""
    first = by_resolution(turns[0].call())
    for turn in turns[1:]:
        turn.before()
        made = by_resolution(turn.call())
        turn.after()
        assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in first], (
            f"'{turn.name}' makes other batches"
        )
        assert not turn.same or all(map(torch.equal, made, first)), (
            f"crops of '{turn.name}' differ from '{turns[0].name}'"
        )


def by_resolution(crops: Sequence[Tensor]) -> list[Tensor]:
    """(V_r B, 3, S_r, S_r) each, as a model takes them; only dinofast makes them so."""
    return [
        torch.cat([crop for crop in crops if crop.shape[-1] == side])
        for side in sorted({c.shape[-1] for c in crops})
    ]


def make_turns(case: Case, folder: Path) -> tuple[list[Turn], list[str]]:
    """The candidates, and why others are left out."""
    cfg = Config(
        data_path=str(folder / "photographs"),
        output_dir=str(folder),
        batch_size_per_gpu=case.batch,
        device="cpu",
        global_crops_size=case.sides[0],
        local_crops_size=case.sides[1],
        num_workers=0,
    )
    loader = loader_of(cfg, "pil")
    turns, left_out = [Turn("official", rewritten(cfg, loader).__next__)], []
    no_dali, no_native = backend_dali.unavailable_reason("cpu"), backend_native.unavailable_reason()
    for name, make, reason in (
        ("official checkout", checkout, no_checkout()),
        ("DALI", dali_pipeline, no_dali),
    ):
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            turns.append(Turn(name, make(cfg, loader).__next__, same=False))
    turns.append(Turn("dinofast, pil", loader.__next__))
    if no_native:
        return turns, [*left_out, *(f"{name}: {no_native}" for name in ("dinofast", ALL_CORES))]
    turns.append(Turn("dinofast", loader_of(cfg, "native").__next__))
    return [*turns, all_cores(cfg)], left_out


def loader_of(cfg: Config, backend: str, **changes: Any) -> Loader:
    return make_loader(Config(**cfg.to_dict() | {"data_backend": backend} | changes))


def all_cores(cfg: Config) -> Turn:
    """Its threads work ahead, which they must not do in others' turns: they start in its own and
    end after it."""
    loader, step = loader_of(cfg, "native", num_workers=cores()), itertools.count()

    def call() -> list[Tensor]:
        return [next(loader) for _ in range(BATCHES)][0]

    return Turn(
        ALL_CORES, call, before=lambda: loader.seek(next(step)), after=loader.close, batches=BATCHES
    )


# ---- the official pipeline
class Rewritten(Dataset):
    """The official semantics: crops drawn by our plan, so that results can be compared, and made
    one by one by PIL."""

    def __init__(self, cfg: Config, loader: Loader) -> None:
        self.read = loader.reader.dataset.read
        self.mean, self.std = (
            torch.tensor(c).view(3, 1, 1) for c in (cfg.image_mean, cfg.image_std)
        )

    def __getitem__(self, drawn: tuple[int, Draw, int]) -> list[Tensor]:
        index, draw, b = drawn
        image = decode(self.read(index))
        views = draw.plan(b, image.height, image.width)
        # ToTensor
        crops = (torch.from_numpy(render(image, view).transpose(2, 0, 1).copy()) for view in views)
        # and Normalize
        return [crop.float().div(255).sub(self.mean).div(self.std) for crop in crops]


def rewritten(cfg: Config, loader: Loader) -> Iterator[list[Tensor]]:
    def drawn() -> Iterator[list[tuple[int, Draw, int]]]:
        for epoch, indices in batches_of(cfg, loader):
            draw = loader.augmentation.draw(epoch, indices)
            yield [(index, draw, b) for b, index in enumerate(indices.tolist())]

    return iter(DataLoader(Rewritten(cfg, loader), batch_sampler=drawn()))


def batches_of(cfg: Config, loader: Loader) -> Iterator[tuple[int, np.ndarray]]:
    """Epoch and indices of each batch, those of dinofast's loaders."""
    return batch_indices(
        cfg.seed, loader.n_images, loader.steps_per_epoch, batch_size=cfg.batch_size_per_gpu
    )


def no_checkout() -> str:
    if not official_checkout.is_there():
        return official_checkout.NOT_SET
    return "" if importlib.util.find_spec("torchvision") else "torchvision is not installed"


class Checkout(Dataset):
    """The checkout's own augmentation behind torchvision's way to open an image."""

    def __init__(self, cfg: Config, loader: Loader) -> None:
        from torchvision import transforms

        self.path = loader.reader.dataset.path
        taken = {
            name: official_checkout.take(
                "utils.py", name, random=random, ImageFilter=ImageFilter, ImageOps=ImageOps
            )
            for name in ("GaussianBlur", "Solarization")
        }
        augmentation = official_checkout.take(
            "main_dino.py",
            "DataAugmentationDINO",
            transforms=transforms,
            Image=Image,
            utils=types.SimpleNamespace(**taken),
        )
        self.augment = augmentation(
            cfg.global_crops_scale, cfg.local_crops_scale, cfg.local_crops_number
        )

    def __getitem__(self, sample: int) -> list[Tensor]:
        with open(self.path(sample), "rb") as file:
            return self.augment(Image.open(file).convert("RGB"))


def checkout(cfg: Config, loader: Loader) -> Iterator[list[Tensor]]:
    return iter(
        DataLoader(
            Checkout(cfg, loader),
            batch_sampler=(samples.tolist() for _, samples in batches_of(cfg, loader)),
        )
    )


# ---- DALI
def dali_pipeline(cfg: Config, loader: Loader) -> Iterator[list[Tensor]]:
    """One thread, and nothing made ahead: each run reads, decodes and makes the crops of one
    batch."""
    from nvidia.dali import fn, pipeline_def, types

    mean, std = ([255 * level for level in levels] for levels in (cfg.image_mean, cfg.image_std))
    order = np.concatenate(
        [
            samples
            for _, samples in itertools.islice(batches_of(cfg, loader), loader.steps_per_epoch)
        ]
    )
    paths = [loader.reader.dataset.path(sample) for sample in order.tolist()]

    def maybe(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=(low, high))

    @pipeline_def(
        enable_conditionals=True,
        batch_size=cfg.batch_size_per_gpu,
        num_threads=1,
        device_id=None,
        seed=0,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
    )
    def graph() -> tuple:
        encoded, _ = fn.readers.file(files=paths)
        image = fn.decoders.image(encoded, output_type=types.RGB)
        crops = []
        for view in loader.augmentation.views:
            crop = fn.random_resized_crop(
                image,
                size=(view.size, view.size),
                random_area=view.scale,
                antialias=True,
                interp_type=types.INTERP_CUBIC,
            )
            if maybe(augmentation.JITTER_P):
                low, high = augmentation.FACTORS_LOW.tolist(), augmentation.FACTORS_HIGH.tolist()
                brightness, contrast, saturation, hue = map(between, low, high)
                crop = fn.color_twist(
                    crop,
                    brightness=brightness,
                    contrast=contrast,
                    saturation=saturation,
                    hue=360 * hue,
                )
            if maybe(augmentation.GRAY_P):
                crop = fn.saturation(crop, saturation=0.0)
            if maybe(view.blur_p):
                crop = fn.gaussian_blur(crop, sigma=between(*view.blur_radius))
            if maybe(view.solarize_p):
                dark = fn.cast(crop < 128, dtype=types.UINT8)
                crop = fn.cast(crop * dark + (255 - crop) * (1 - dark), dtype=types.UINT8)
            mirror = fn.random.coin_flip(probability=augmentation.FLIP_P)
            crops.append(fn.crop_mirror_normalize(crop, mirror=mirror, mean=mean, std=std))
        return tuple(crops)

    pipeline = graph()
    pipeline.build()

    while True:
        yield [torch.from_dlpack(crop.as_tensor()) for crop in pipeline.run()]


def rehearsal() -> list[data_on_gpu.Case]:
    return [data_on_gpu.Case(8, 4, (32, 16))]


def growing(case: Case | data_on_gpu.Case, device: torch.device) -> Iterator[dict[str, Any]]:
    return (
        data_on_gpu.growing(case, device)
        if isinstance(case, data_on_gpu.Case)
        else iter([measure_case(case, device)])
    )


def test_data(measure: Callable[[], dict[str, Any]]) -> None:
    assert measure()["rows"]


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
