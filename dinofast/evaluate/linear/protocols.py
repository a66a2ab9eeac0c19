"""Linear classification of frozen features by three protocols: a sweep of learning rates and
features (DINOv2's), the official eval_linear.py, and logistic regression."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...runtime.progress import counting, in_words
from ...runtime.terminal import say
from ...runtime.words import counted, spelled
from ..frozen import FrozenBackbone, check_batches, labeled_halves, load_frozen
from ..images import LabeledImages, labeled_folder
from ..knn import knn_classify
from . import logistic, official, sweep
from .features import Choice, choices, extract, few_of_each, held_out, hits, in_percent, percent

PROTOCOLS = ("sweep", "official", "logistic")
# DINOv2's, for 256 images at a time
LEARNING_RATES = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    *(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
)
K = 20
KNN_ON_CPU = 10**12  # multiplications that take some seconds there


def linear(
    pretrained_weights: str | Path,
    data_path: str | Path,
    *,
    protocol: str = "sweep",
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    batch_size_per_gpu: int = 128,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
    per_class: int | None = None,
    seed: int = 0,
    epochs: int | None = None,
    learning_rates: Sequence[float] | None = None,
    lr: float | None = None,
    n_last_blocks: int | None = None,
    avgpool_patchtokens: bool | None = None,
    num_labels: int | None = None,
    val_freq: int | None = None,
    output_dir: str | Path | None = None,
    evaluate: bool = False,
    pretrained_linear: str | Path | None = None,
) -> dict[str, Any]:
    """Train a linear classifier on `data_path/train`, measure it on `data_path/val`, print a table.

    The backbone, its device and the size of its images: see `frozen.load_frozen`. Without train/
    and val/ every fourth image of each class folder is held out. per_class: images of each class to
    train on, drawn by `seed`; default all.

    sweep: epochs default to 12,500 steps, 10 epochs at least; learning_rates for 256 images at a
    time. official: lr 0.001 for 256 images, 100 epochs, n_last_blocks 4 without, for ViT-B 1 with
    avgpool_patchtokens, val_freq 1, checkpoint and log.txt in output_dir "."; evaluate: only
    measure the layer of the file pretrained_linear, else of output_dir.

    Returns "top1" and, of five classes and more, "top5" on val in percent, and what the protocol
    has beside. Raises ValueError for what cannot be.
    """
    _check(
        protocol,
        per_class,
        seed,
        epochs=epochs,
        learning_rates=learning_rates,
        lr=lr,
        n_last_blocks=n_last_blocks,
        avgpool_patchtokens=avgpool_patchtokens,
        num_labels=num_labels,
        val_freq=val_freq,
        output_dir=output_dir,
        evaluate=evaluate,
        pretrained_linear=pretrained_linear,
    )
    check_batches(batch_size_per_gpu, num_workers)
    frozen = load_frozen(
        pretrained_weights,
        checkpoint_key=checkpoint_key,
        arch=arch,
        patch_size=patch_size,
        resize=resize,
        crop=crop,
        device=device,
        backbone=backbone,
    )
    if protocol != "official":
        train, val = _images(data_path, frozen, per_class, seed)
        features = _Features(frozen, train, val, batch_size_per_gpu, num_workers)
        if protocol == "logistic":
            return _logistic(features, seed)
        rates = tuple(learning_rates or LEARNING_RATES)
        return _sweep(features, rates, epochs, batch_size_per_gpu, seed)
    how = official.Official(
        official.inputs_of(frozen.module, n_last_blocks, avgpool_patchtokens),
        num_labels or 0,
        epochs or official.EPOCHS,
        official.LR if lr is None else lr,
        val_freq or 1,
        batch_size_per_gpu,
        num_workers,
        seed,
    )
    folder = Path(output_dir or ".")
    if evaluate:
        return _evaluate(frozen, data_path, how, Path(pretrained_linear or folder / official.NAME))
    return _official(frozen, *_images(data_path, frozen, per_class, seed), how, folder)


# ---- options
_OF = {
    "epochs": ("sweep", "official"),
    "learning_rates": ("sweep",),
    **dict.fromkeys(("lr", "n_last_blocks", "avgpool_patchtokens"), ("official",)),
    **dict.fromkeys(("num_labels", "val_freq", "output_dir"), ("official",)),
    **dict.fromkeys(("evaluate", "pretrained_linear"), ("official",)),
}


def _check(protocol: str, per_class: int | None, seed: int, **given: Any) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is '{protocol}': choose from {', '.join(PROTOCOLS)}.")
    for name, value in given.items():
        if protocol not in _OF[name] and value is not None and value is not False:
            raise ValueError(
                f"`{name}` is of `protocol` {' and '.join(_OF[name])}, not of {protocol}: leave it "
                "out, or name the protocol."
            )
    whole = ("epochs", "n_last_blocks", "num_labels", "val_freq")
    for name, value in (("per_class", per_class), *((name, given[name]) for name in whole)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: it must be at least 1.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` is {seed}: it must be a whole number from 0 on.")
    rates = (("lr", given["lr"]), *(("learning_rates", x) for x in given["learning_rates"] or ()))
    for name, rate in rates:
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"`{name}` is {rate}: it must be a number above 0.")
    if given["pretrained_linear"] and not given["evaluate"]:
        raise ValueError("`pretrained_linear` is measured, not trained: add `evaluate`.")
    if protocol == "logistic" and (reason := logistic.unavailable_reason()):
        raise ValueError(
            f"`protocol` logistic: {reason}: pip install scikit-learn, or take `protocol` sweep."
        )


def _images(
    data_path: str | Path, frozen: FrozenBackbone, per_class: int | None, seed: int
) -> tuple[LabeledImages, LabeledImages]:
    train, val = labeled_halves(data_path, frozen)
    if per_class:
        train = few_of_each(train, per_class, seed)
        say(f"few-shot: {counted(len(train), 'training image')}, {per_class} of each class")
    return train, val


# ---- protocols on features that are computed once
class _Features:
    """Of the training images and of val: x (N, K), y (N,)."""

    def __init__(
        self,
        frozen: FrozenBackbone,
        train: LabeledImages,
        val: LabeledImages,
        batch_size: int,
        num_workers: int,
    ) -> None:
        start = time.perf_counter()
        self.x, self.y = extract(frozen, train, batch_size, num_workers)
        self.val_x, self.val_y = extract(frozen, val, batch_size, num_workers)
        elapsed_s = time.perf_counter() - start
        n = len(self.y) + len(self.val_y)
        say(f"features of {counted(n, 'image')} in {in_words(elapsed_s)}, {n / elapsed_s:,.1f}/s")
        self.choices = choices(frozen.module, self.x.shape[1])
        self.classes = len(train.classes)
        self.device = frozen.device

    def knn(self) -> dict[str, float]:
        """For comparison, where it takes no notable time."""
        columns = self.choices[0].columns
        x, val_x = self.x[:, columns], self.val_x[:, columns]
        if self.device.type == "cpu" and len(x) * len(val_x) * x.shape[1] > KNN_ON_CPU:
            return {}
        x, y, val_x, val_y = (part.to(self.device) for part in (x, self.y, val_x, self.val_y))
        k = min(K, len(x))
        top1, top5 = knn_classify(x, y, val_x, val_y, k, n_classes=self.classes)
        found = {"top1": top1, "top5": top5} if self.classes >= 5 else {"top1": top1}
        say(f"for comparison, {k}-NN classifier result: {in_percent(found)}")
        return {"k": k, **found}


def _sweep(
    f: _Features, rates: Sequence[float], epochs: int | None, batch_size: int, seed: int
) -> dict[str, Any]:
    """Twice: without the held-out images, which choose, and with them."""
    chooses = held_out(f.y, seed)
    count, n = len(f.choices) * len(rates), len(f.y)
    shown = epochs or sweep.default_epochs(n, batch_size)
    say(
        spelled(
            f"training {count} classifiers together, twice: to choose, and on all training images; "
            f"{shown * math.ceil(n / batch_size):,} steps each (`epochs` {shown})"
        )
    )

    def trained(x: Tensor, y: Tensor, what: str) -> sweep.Classifiers:
        columns = [choice.columns for choice in f.choices]
        made = sweep.start(columns, len(rates), f.classes, seed).to(f.device)
        x = sweep.place(x, f.device)
        sweep.train(
            x,
            y.to(x.device),
            made,
            [rate * batch_size / 256 for rate in rates],
            epochs=epochs or sweep.default_epochs(len(x), batch_size),
            batch_size=batch_size,
            seed=seed,
            tell=counting(f"{count} classifiers, {what}, step", True),
        )
        return made

    start = time.perf_counter()
    judged = trained(f.x[~chooses], f.y[~chooses], "to choose").hits(f.x[chooses], f.y[chooses])
    final = trained(f.x, f.y, "on all training images").hits(f.val_x, f.val_y)
    say(f"trained {count} classifiers twice in {in_words(time.perf_counter() - start)}")
    return {**_report(f, rates, judged, final, int(chooses.sum())), "knn": f.knn()}


def _report(
    f: _Features, rates: Sequence[float], judged: Tensor, final: Tensor, n_held: int
) -> dict[str, Any]:
    """judged, final (G, R, 2): hits among the held-out images and, of those trained on all, among
    val."""
    n_val, places = len(f.val_y), [(g, r) for g in range(len(judged)) for r in range(len(rates))]
    grid: list[dict[str, Any]] = [
        {
            "features": f.choices[g].name,
            "learning_rate": rates[r],
            "held_out_top1": percent(judged[g, r], n_held, 1)["top1"],
            "val": percent(final[g, r], n_val, f.classes),
        }
        for g, r in places
    ]
    _table(f.choices, rates, judged, final, n_held, n_val)
    found, words = list[dict[str, Any]](), list[str]()
    for counts in (judged, final):
        one = grid[int(counts[..., 0].argmax())]  # of equals the first
        rate, accuracy = one["learning_rate"], one["val"]
        found.append({"features": one["features"], "learning_rate": rate, **accuracy})
        words.append(f"{in_percent(accuracy)} ({one['features']}, learning rate {rate:g}; ")
    say(
        f"linear classifier result: {words[0]}chosen on "
        f"{counted(n_held, 'held-out training image')}, trained on all)"
    )
    if len(rates) > 1 and found[0]["learning_rate"] == max(rates):
        say(spelled("the largest learning rate was best: larger `learning_rates` may do more"))
    say(
        f"best on val: {words[1]}DINOv2 reports this one, chosen on the images that it is measured "
        "on)"
    )
    return {**found[0], "best_on_val": found[1], "grid": grid}


def _table(
    found: Sequence[Choice],
    rates: Sequence[float],
    judged: Tensor,
    final: Tensor,
    n_held: int,
    n_val: int,
) -> None:
    """A line a choice of features: its best learning rate, and what that reaches."""
    wide = max(len(choice.name) for choice in found)
    say(f"{'features':{wide}}  learning rate  held-out top-1  val top-1")
    for g, choice in enumerate(found):
        r = int(judged[g, :, 0].argmax())
        held, val = 100 * judged[g, r, 0].item() / n_held, 100 * final[g, r, 0].item() / n_val
        say(f"{choice.name:{wide}}  {rates[r]:13g}  {held:14.1f}  {val:9.1f}")


def _logistic(f: _Features, seed: int) -> dict[str, Any]:
    columns = f.choices[0].columns
    x, val_x, chooses = f.x[:, columns], f.val_x[:, columns], held_out(f.y, seed)
    start = time.perf_counter()
    strength, top1 = logistic.choose(x, f.y, chooses, counting("strengths of the penalty", True))
    model = logistic.fit(x, f.y, strength)
    found = percent(
        hits(logistic.scores(model, val_x, f.classes), f.val_y), len(f.val_y), f.classes
    )
    elapsed_s = time.perf_counter() - start
    for value, accuracy in top1.items():
        say(f"C {value:<8g} held-out top-1 {accuracy:5.1f}{'  chosen' * (value == strength)}")
    if model.n_iter_.max() >= logistic.MOST_ITERATIONS:
        say(f"not converged within {logistic.MOST_ITERATIONS:,} iterations")
    n_held = counted(int(chooses.sum()), "held-out training image")
    say(
        f"logistic regression result: {in_percent(found)} ({f.choices[0].name}, C {strength:g} of "
        f"{len(top1)} chosen on {n_held}, fitted on all, {in_words(elapsed_s)})"
    )
    return {
        "features": f.choices[0].name,
        "C": strength,
        **found,
        "knn": f.knn(),
        "grid": [{"C": value, "held_out_top1": accuracy} for value, accuracy in top1.items()],
    }


# ---- the official protocol
def _official(
    frozen: FrozenBackbone,
    train: LabeledImages,
    val: LabeledImages,
    how: official.Official,
    folder: Path,
) -> dict[str, Any]:
    how = _with_labels(how, len(train.classes))
    say(
        f"one layer for {how.num_labels} classes on {how.inputs}: {counted(how.epochs, 'epoch')}, "
        f"learning rate {how.lr * how.batch_size / 256:g} ({how.lr:g} x {how.batch_size} / 256)"
    )
    found = official.train(frozen, train, val, how, folder)
    last = {name: value for name, value in found.items() if name != "best_top1"}
    say(
        f"linear classifier result: {in_percent(last)} after the last epoch; best Top1: "
        f"{found['best_top1']:.1f}, which the official code reports"
    )
    return {"features": str(how.inputs), **found}


def _evaluate(
    frozen: FrozenBackbone, data_path: str | Path, how: official.Official, file: Path
) -> dict[str, Any]:
    """Of a layer in a file, on val/; train/ need not be there."""
    if not file.is_file():
        raise ValueError(
            f"there is no classifier at '{file}' to evaluate: give one as `pretrained_linear`."
        )
    root = Path(data_path)
    if (root / "val").is_dir() and not (root / "train").is_dir():
        val = replace(labeled_folder(root / "val", frozen.transform), decode=frozen.decode)
        say(f"{counted(len(val), 'image')} to classify (val/); features of {frozen.told}")
    else:
        _, val = labeled_halves(data_path, frozen)
    how = _with_labels(how, len(val.classes))
    found = official.evaluate(frozen, val, how, file)
    say(f"linear classifier result: {in_percent(found)} ({how.inputs}, layer of '{file}')")
    return {"features": str(how.inputs), **found}


def _with_labels(how: official.Official, n_classes: int) -> official.Official:
    """num_labels, where it is not given (0): the classes that are there."""
    if 0 < how.num_labels < n_classes:
        raise ValueError(
            f"`num_labels` is {how.num_labels}, but there are {n_classes} classes: give that or "
            "more."
        )
    return replace(how, num_labels=how.num_labels or n_classes)
