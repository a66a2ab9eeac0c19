"""Before and after, of a run's own images: where the CLS token looks, and what is nearest to
what."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..config import Config
from ..data.dataset import scan
from ..data.decode import UnreadableImage
from ..data.held_out import evenly
from ..data.reader import ImageReader
from ..evaluate.attention_maps import attention_maps
from ..evaluate.frozen import FrozenBackbone, load_frozen
from ..evaluate.images import EvalTransform
from ..evaluate.knn import nearest
from ..evaluate.pictures import overlay, sheet, stretch
from ..nn.features import features as features_of
from ..nn.vit import VisionTransformer
from ..run_folder import RunFolder

N_LOOKED_AT, N_QUERIES, N_NEIGHBORS, N_AMONG = 6, 4, 5, 400
CELL, BATCH = 128, 32  # pixels; images at a time


@dataclass(frozen=True)
class Figure:
    """A picture as it stands in a page, and what it shows."""

    title: str
    picture: Image.Image
    caption: str

    def as_html(self) -> str:
        file = io.BytesIO()
        self.picture.convert("RGB").save(file, "WEBP", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        size = f'width="{self.picture.width}" height="{self.picture.height}"'
        return (
            f'<figure><img alt="{self.title}" {size} src="data:image/webp;base64,{data}">'
            f"<figcaption>{self.caption}</figcaption></figure>"
        )


def figures(run: RunFolder, device: str | None = None) -> list[Figure]:
    """Attention (of our ViTs) and nearest neighbors, of the untrained and the trained network.

    Raises `ValueError` where the images or the weights are not there.
    """
    source = run.options.get("data_path")
    if not source:
        raise ValueError(f"'{run.path}' does not tell its images: config.yaml is missing.")
    if source == Config.data_path:
        raise ValueError("the images came from a data set in Python.")
    trained = load_frozen(run.checkpoint, device=device)
    before = load_frozen(run.checkpoint, checkpoint_key="untrained", device=device)
    shown, images = _images(source, trained)
    found = []
    if isinstance(trained.module, VisionTransformer):
        found.append(_attention(shown[:N_LOOKED_AT], images[:N_LOOKED_AT], before, trained))
    if len(images) > N_NEIGHBORS:
        found.append(_neighbors(shown, images, before, trained))
    return found


def _images(source: str, frozen: FrozenBackbone) -> tuple[Tensor, Tensor]:
    """Of up to N_AMONG images from all over the source: what people see, (N, 3, CELL, CELL) in [0,
    1], and what the network sees. The first ones are from all over, too."""
    dataset = scan(source)
    reader = ImageReader(dataset)
    first = evenly(len(dataset), max(N_LOOKED_AT, N_QUERIES))
    rest = [i for i in evenly(len(dataset), N_AMONG) if i not in first]
    scale = frozen.transform.resize / frozen.transform.crop
    look = EvalTransform(round(CELL * scale), CELL, (0, 0, 0), (1, 1, 1))
    pairs = []
    for index in [*first, *rest][:N_AMONG]:
        try:
            image = frozen.decode(reader.dataset.read(index))
        except UnreadableImage:
            continue
        pairs.append((look(image), frozen.transform(image)))
    if not pairs:
        raise ValueError(f"no image of '{source}' can be read.")
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def _attention(
    shown: Tensor, images: Tensor, before: FrozenBackbone, trained: FrozenBackbone
) -> Figure:
    def heat(frozen: FrozenBackbone) -> Tensor:
        maps = attention_maps(frozen.module, images.to(frozen.device), size=(CELL, CELL))
        return overlay(shown, stretch(maps.mean(1).cpu()))

    rows = [
        ("image", shown),
        ("attention, untrained", heat(before)),
        ("attention, trained", heat(trained)),
    ]
    return Figure(
        "attention",
        sheet(rows),
        "Attention of the CLS token in the last block, mean over heads: before training, and the "
        "teacher's at the end. Training images, whole.",
    )


def _neighbors(
    shown: Tensor, images: Tensor, before: FrozenBackbone, trained: FrozenBackbone
) -> Figure:
    rows = []
    queries = [_nearest_to_first(frozen, images) for frozen in (before, trained)]
    for q in range(min(N_QUERIES, len(images))):
        for name, found in zip(("untrained", "trained"), queries, strict=True):
            rows.append((f"image and nearest, {name}", shown[[q, *found[q].tolist()]]))
    return Figure(
        "nearest neighbors",
        sheet(rows),
        f"The {N_NEIGHBORS} images nearest to the one at the left by cosine of features, among "
        f"{len(images)}: before training, and the teacher's at the end.",
    )


@torch.no_grad()
def _nearest_to_first(frozen: FrozenBackbone, images: Tensor) -> Tensor:
    """Rows of the neighbors of the first N_QUERIES images, without themselves: (N_QUERIES,
    N_NEIGHBORS)."""
    parts = [features_of(frozen.module, x.to(frozen.device)) for x in images.split(BATCH)]
    features = torch.cat(parts).float().cpu()
    _, rows = nearest(features, features[:N_QUERIES], N_NEIGHBORS + 1)
    kept = [[i for i in row if i != q][:N_NEIGHBORS] for q, row in enumerate(rows.tolist())]
    return torch.tensor(kept)
