"""What `train` calls while it runs: hooks of your own, and writers for TensorBoard and Weights &
Biases."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import Config
from .runtime.words import a_kind, one_line


class Callback:
    """To be subclassed, or any object with some of these methods: `train(cfg, callbacks=[...])`.

    Each is called in every process; `training.process.is_main` tells the one that writes.
    `training` has `cfg`, `model` (`student`, `teacher`), `optimizer`, `schedule`, `process` and
    `output_dir`. What one raises ends the run; what was last saved stands.
    """

    def on_start(self, training: Any) -> None:
        """Before the first step."""

    def on_step(self, training: Any, step: int, metrics: Mapping[str, Tensor]) -> None:
        """After optimizer step `step`, the first is 0. metrics: `loss`, `teacher_entropy`, `kl`,
        `center_norm`, `grad_norm`, each () on the device: reading one waits for the device."""

    def on_log(self, training: Any, step: int, metrics: Mapping[str, Any]) -> None:
        """Every `log_steps` steps, when `step` steps are done: the line of metrics.jsonl."""

    def on_epoch(self, training: Any, epoch: int, metrics: Mapping[str, Any]) -> None:
        """After an epoch that is logged and saved: the line of log.txt, empty but on the main
        process."""

    def on_end(self, training: Any) -> None:
        """After the last step, or when the run is interrupted."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """All that are told, each of what it has a method for."""

    def __init__(self, callbacks: Iterable[Any], training: object) -> None:
        self._training = training
        self._hooks = {
            name: [getattr(c, name) for c in callbacks if hasattr(c, name)] for name in HOOKS
        }

    def __call__(self, hook: str, *args: Any) -> None:
        for call in self._hooks[hook]:
            call(self._training, *args)


def check_callbacks(cfg: Config, given: Iterable[Any]) -> list[Any]:
    """Those that the options ask for, and those given. Raises `ValueError` for a package that is
    missing, and for an object without any of the methods."""
    asked = {"tensorboard": cfg.tensorboard, "wandb": bool(cfg.wandb)}
    for name in (name for name, wanted in asked.items() if wanted):
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name, such as our output
            raise ValueError(
                f"`{name}` needs a package that is not installed: pip install {name}, or leave it "
                "out."
            )
    callbacks = list(given) if isinstance(given, Iterable) else [given]
    for callback in callbacks:
        if isinstance(callback, type) or not any(hasattr(callback, name) for name in HOOKS):
            is_class = isinstance(callback, type)
            what = f"the class {callback.__name__}" if is_class else a_kind(callback)
            raise ValueError(
                f"one of `callbacks` is {what}: give objects with some of {', '.join(HOOKS)}."
            )
    board = [TensorBoard()] if cfg.tensorboard else []
    return [*board, *([WeightsAndBiases(cfg.wandb)] if cfg.wandb else []), *callbacks]


class Writer(Callback, ABC):
    """Passes numbers on, on the main process."""

    def on_start(self, training: Any) -> None:
        self._is_open = False
        if training.process.is_main:
            self.begin(training)
            self._is_open = True

    def on_log(self, training: Any, step: int, metrics: Mapping[str, Any]) -> None:
        self._pass_on("train", step, metrics)

    def on_epoch(self, training: Any, epoch: int, metrics: Mapping[str, Any]) -> None:
        self._pass_on("epoch", (epoch + 1) * training.schedule.steps_per_epoch, metrics)

    def on_end(self, training: Any) -> None:
        if self._is_open:
            self.close()

    def _pass_on(self, group: str, step: int, metrics: Mapping[str, Any]) -> None:
        if self._is_open:
            self.write({f"{group}/{name}": x for name, x in _numbers(metrics).items()}, step)

    @abstractmethod
    def begin(self, training: Any) -> None:
        """Open what the others use."""

    @abstractmethod
    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers by name, such as `train/loss`, when `step` steps are done."""

    @abstractmethod
    def close(self) -> None:
        """Nothing follows."""


class TensorBoard(Writer):
    """The metrics as scalars in output_dir/tensorboard."""

    def begin(self, training: Any) -> None:
        folder = str(Path(training.output_dir) / "tensorboard")
        with _explained("tensorboard", "repair the package, or leave it out"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=training.start + 1)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Writer):
    """The metrics as a run of a project; a run that is resumed goes on there."""

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, training: Any) -> None:
        name_file = Path(training.output_dir) / "wandb-run-id.txt"
        known = name_file.read_text().strip() if training.start and name_file.exists() else ""
        name = known or uuid.uuid4().hex[:12]
        name_file.write_text(name + "\n")
        with _explained("wandb", "log in by `wandb login`, or set WANDB_MODE=offline"):
            import wandb

            self._run = wandb.init(
                project=self.project,
                id=name,
                resume="allow",
                dir=training.output_dir,
                config=training.cfg.to_dict(),
            )

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _explained(name: str, way_out: str) -> Iterator[None]:
    """Turns what a writer's package raises at its start into `ValueError`."""
    try:
        yield
    except Exception as error:  # packages of others raise what they like
        raise ValueError(f"`{name}` cannot begin ({one_line(error)}): {way_out}.") from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a line can be drawn."""
    left_out = ("step", "epoch", "time")
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and name not in left_out
    }
