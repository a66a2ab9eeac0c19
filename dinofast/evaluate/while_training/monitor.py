"""How good the teacher's backbone is while it trains, which the loss does not tell."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ...config import Config
from ...data import Loader
from ...data.decode import decode
from ...data.held_out import evenly
from ...nn.features import features as features_of
from ...nn.vit import VisionTransformer
from ...runtime.backends import cores
from ...runtime.distributed import Process, local_world
from ...runtime.words import counted
from ..images import EvalTransform, LabeledImages, train_and_val
from ..knn import knn_classify
from .patch_matching import matched
from .rank import lidar, rankme

SHARE = 0.02  # of the work of a run that scores may take unless `eval_every` says how often
N_IMAGES = 512  # of which crops are held out: 77 MB a process and view at 224 pixels
# trained on while the host computes RankMe and LiDAR, half a second: at 4,000 images/s on a GPU, at
# 100 on a CPU
HOST_IMAGES = {"cuda": 2000, "cpu": 50}
K, BATCH = 20, 64  # neighbors; images at a time


class Monitor:
    """`monitor(backbone)` gives its scores by name, on the main process, those that are finite:
    `knn`, 20-NN accuracy in percent, with `eval_data`; `rankme`, `lidar`, and of our ViTs
    `patch_matching`, of crops held out. All processes must call it, each works on its share.

    every: epochs between two times; 0: never. best_by: the score that tells which epoch was best.
    """

    def __init__(self, cfg: Config, loader: Loader, process: Process) -> None:
        self._cfg, self._loader, self._process = cfg, loader, process
        self._labeled = _labeled(cfg) if cfg.eval_data else None
        self.best_by = "knn" if self._labeled else "rankme"
        self._crops: tuple[Tensor, np.ndarray | None] | None = None
        self._threads = max(1, min(cfg.num_workers, cores() // local_world()))
        self.every = self._how_often()
        self.elapsed_s = 0.0

    def is_due(self, epoch: int) -> bool:
        """Whether the scores are taken after this epoch: every so many, and after the last one."""
        return self.every > 0 and (self._cfg.epochs - 1 - epoch) % self.every == 0

    def _work(self) -> float:
        """Of one time, as a share of the run's work, both counted in images trained on."""
        cfg = self._cfg
        passes = 2 * min(N_IMAGES, self._loader.n_images)  # of global crops
        if self._labeled:
            passes += sum(map(len, self._labeled))
        local = cfg.local_crops_number * (cfg.local_crops_size / cfg.global_crops_size) ** 2
        an_image = 2 + 3 * (2 + local)  # the teacher forward, the student forward and back
        images = passes / an_image + HOST_IMAGES[self._process.device.type]
        return images / (self._loader.n_images * cfg.epochs)

    def _how_often(self) -> int:
        if self._cfg.eval_every is not None:
            return self._cfg.eval_every
        times = int(SHARE / self._work())
        return math.ceil(self._cfg.epochs / times) if times else 0

    def told(self) -> str:
        """What is measured, how often, and what share of the run's work that is."""
        if self._cfg.eval_every == 0:
            return ""
        if not self.every:
            return "scores: none in so short a run; `eval_every` 1 takes them all the same"
        what = "RankMe, LiDAR"
        if self._labeled:
            what = f"{K}-NN of {counted(len(self._labeled[1]), 'image')}, {what}"
        times = math.ceil(self._cfg.epochs / self.every)
        often = "after each epoch" if self.every == 1 else f"every {self.every} epochs"
        often = "after the last epoch" if times == 1 else often
        return f"scores: {often}, {what}; {times * self._work():.1%} of the work"

    @torch.no_grad()
    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        start = time.perf_counter()
        with _evaluating(backbone), self._cast():
            scores = self._of_crops(backbone)
            if self._labeled:
                scores = {"knn": self._of_labeled(backbone, *self._labeled), **scores}
        self.elapsed_s = time.perf_counter() - start
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        return finite if self._process.is_main else {}

    def _cast(self) -> AbstractContextManager:
        """The precision of the run."""
        device = self._process.device.type
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._cfg.precision_on(device))
        return torch.autocast(device, half) if half else nullcontext()

    def _of_crops(self, backbone: nn.Module) -> dict[str, float]:
        process, loader = self._process, self._loader
        if self._crops is None:
            indices = evenly(loader.n_images, N_IMAGES)[process.rank :: process.world]
            self._crops = loader.held_out_crops(indices, self._threads)
        crops, views = self._crops
        is_vit, found = isinstance(backbone, VisionTransformer), list[Tensor]()
        patches = torch.zeros(2, dtype=torch.long)  # right ones, and all
        for i in range(0, len(crops), BATCH):
            batch = loader.finished(crops[i : i + BATCH].flatten(0, 1).to(process.device))
            if isinstance(backbone, VisionTransformer):
                tokens = backbone.get_intermediate_layers(batch)[0].unflatten(0, (-1, 2))
                found.append(tokens[:, :, 0].float())
                side = batch.shape[-1] // backbone.patch_embed.patch_size
                of_patches = tokens[:, :, 1:].unflatten(2, (side, side))
                if views is not None:
                    patches += torch.tensor(matched(of_patches, views[i : i + BATCH]))
            else:
                found.append(features_of(backbone, batch).float().unflatten(0, (-1, 2)))
        own = torch.cat(found) if found else torch.empty(0, 2, 1, device=process.device)
        everyones = process.gather(own).cpu()  # (n, 2, D)
        right, shown = process.gather(patches[None].to(process.device)).sum(0).tolist()
        if not process.is_main or len(everyones) < 2 or not everyones.isfinite().all():
            return {}
        scores = {"rankme": rankme(everyones.flatten(0, 1)), "lidar": lidar(everyones)}
        return scores | ({"patch_matching": right / shown} if is_vit and shown else {})

    def _of_labeled(self, backbone: nn.Module, train: LabeledImages, val: LabeledImages) -> float:
        """Accuracy of the nearest neighbors in percent, nan where an image of each is missing."""
        (seen, labels), (unseen, truth) = (self._features(backbone, half) for half in (train, val))
        halves = seen, unseen
        if not self._process.is_main or not all(len(x) and x.isfinite().all() for x in halves):
            return math.nan
        return knn_classify(seen, labels, unseen, truth, min(K, len(seen)))[0]

    def _features(self, backbone: nn.Module, images: LabeledImages) -> tuple[Tensor, Tensor]:
        """Of all processes' shares: features (N, D) fp32 and labels (N,), on the device. What
        cannot be read is left out."""
        process = self._process
        mine = images.pick(range(process.rank, len(images), process.world))
        found, labels = list[Tensor](), list[Tensor]()
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(mine), BATCH):
                rows = range(start, min(start + BATCH, len(mine)))
                read = [(i, x) for i, x, _ in pool.map(mine.__getitem__, rows) if x is not None]
                if read:
                    batch = torch.stack([x for _, x in read]).to(process.device)
                    found.append(features_of(backbone, batch).float())
                    labels.append(torch.tensor([mine.labels[i] for i, _ in read]))
        own = torch.cat(found) if found else torch.empty(0, 1, device=process.device)
        own_labels = torch.cat(labels) if labels else torch.empty(0, dtype=torch.long)
        return process.gather(own), process.gather(own_labels.to(process.device))


def _labeled(cfg: Config) -> tuple[LabeledImages, LabeledImages]:
    """To compare with and to classify, prepared as `dinofast knn` does for this run's
    checkpoints. Raises `ValueError` that names `eval_data`."""
    if cfg.in_channels != 3:
        raise ValueError(
            f"`eval_data` is for images of three channels and `in_channels` is {cfg.in_channels}: "
            "leave it out; held-out crops are scored all the same."
        )
    crop = cfg.global_crops_size
    transform = EvalTransform(round(crop * 256 / 224), crop, cfg.image_mean, cfg.image_std)
    try:
        train, val, _ = train_and_val(str(cfg.eval_data), transform)
    except ValueError as error:
        raise ValueError(f"`eval_data`: {error}") from error
    if len(set(train.labels)) < 2:
        raise ValueError(
            f"`eval_data` '{cfg.eval_data}' has images of one class only in train/: give a folder "
            "for each of two or more."
        )
    as_trained = partial(decode, value_range=cfg.given_value_range, exif=cfg.exif)
    return replace(train, decode=as_trained), replace(val, decode=as_trained)


@contextmanager
def _evaluating(backbone: nn.Module) -> Iterator[None]:
    """In eval mode, each module as it was afterwards."""
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
