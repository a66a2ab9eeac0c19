"""The backbones of a run: our ViTs, torchvision's and timm's by name, or what somebody's own
function makes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import VITS, Config
from ..runtime.words import a_kind, one_line
from . import vit
from .arch_names import nearest_arch
from .features import features
from .packages import Candidate, candidates
from .trial import Trial, crops_of, try_out


class UnknownArch(ValueError):
    """A name that is neither ours nor torchvision's nor timm's. hint: the name that was meant, and
    which of the two packages cannot be imported, with the reason."""

    def __init__(self, sentence: str, hint: str) -> None:
        super().__init__(sentence)
        self.hint = hint


class Backbones(NamedTuple):
    """Student's and teacher's, alike; width: D of their features. notes: what there is to say of
    them. all_trained: whether a gradient surely reaches every trainable parameter in every step."""

    student: nn.Module
    teacher: nn.Module
    width: int
    notes: tuple[str, ...] = ()
    all_trained: bool = True


def name_of(make: Callable[[], nn.Module]) -> str:
    """What a backbone of somebody's own goes by as `arch`. Raises `ValueError` for a module instead
    of what makes one."""
    if isinstance(make, nn.Module):
        raise ValueError(
            f"backbone is a {type(make).__name__}: give what makes one, a class or a function; it "
            "is called once for the student, and the teacher gets a copy."
        )
    name: str = getattr(make, "__name__", "<lambda>")
    return "own backbone" if name == "<lambda>" else name


def make_backbones(cfg: Config, make: Callable[[], nn.Module] | None) -> Backbones:
    """What `make` returns and a copy of it, or twice what `cfg.arch` names.

    All but our ViTs are tried at both sizes of crops. Raises `ValueError` for what cannot train.
    """
    if make is not None:
        return _of_ones_own(cfg, make)
    if cfg.vit is not None:
        student = build_backbone(cfg, cfg.drop_path_rate)
        teacher = build_backbone(cfg, 0.0)
        return Backbones(student, teacher, feature_width(student, cfg.global_crops_size))
    refusals: list[ValueError] = []
    unbuilt: list[ValueError] = []
    for candidate in _candidates(cfg):
        torch.manual_seed(cfg.seed)
        what = f"`arch` {cfg.arch} of {candidate.package}"
        try:
            student, teacher = candidate.build(), candidate.build()
        except Exception as error:  # an option that others of the package have, or anything else
            unbuilt.append(ValueError(f"{what} cannot be built ({one_line(error)})."))
            continue
        try:
            trial = try_out(teacher, what, crops_of(cfg))
        except ValueError as error:
            refusals.append(error)
        else:
            notes = (f"{cfg.arch} is {candidate.package}'s", *_notes(cfg.arch, student, trial))
            return Backbones(student, teacher, trial.width, notes, not trial.unused)
    raise [*refusals, *unbuilt][0]  # what the best way to build it lacks


def build_backbone(
    cfg: Config, drop_path_rate: float, weights: Mapping[str, Any] | None = None
) -> nn.Module:
    """A ViT, or a torchvision or timm model without its classifier; only our ViTs have a rate of
    stochastic depth.

    weights: of several models of a name, take the one that they fit. Raises `ValueError` for an
    unknown name.
    """
    if cfg.vit is not None:
        return getattr(vit, cfg.vit)(
            patch_size=cfg.patch_size,
            drop_path_rate=drop_path_rate,
            img_size=(cfg.global_crops_size,),
            in_chans=cfg.in_channels,
        )
    first: nn.Module | None = None
    reason = Exception()
    for candidate in _candidates(cfg):
        try:
            module = candidate.build()
        except Exception as error:  # an option that others of the package have, or anything else
            reason = error
            continue
        if weights is None or _shapes(module.state_dict()) == _shapes(weights):
            return module
        first = first or module
    if first is None:
        raise ValueError(f"`arch` {cfg.arch} cannot be built ({one_line(reason)}).") from reason
    return first


def _candidates(cfg: Config) -> Iterator[Candidate]:
    """Those of `packages.candidates`, at least one. Raises `ValueError` if there is none."""
    arch, missing = cfg.arch, list[str]()
    found = candidates(arch, missing, cfg.in_channels)
    if (first := next(found, None)) is not None:
        yield first
        yield from found
        return
    hint = (
        f" Other names need torchvision or timm installed; not importable: {'; '.join(missing)}."
        if missing
        else ""
    )
    hint = nearest_arch(arch) + hint
    raise UnknownArch(
        f"`arch` '{arch}' is not known: choose from {', '.join(VITS)}, or a name of torchvision or "
        f"timm.{hint} A model of your own goes through Python, dinofast.train(cfg, backbone=...).",
        hint,
    )


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items() if isinstance(x, Tensor)}


# ---- what somebody's own function makes
def _of_ones_own(cfg: Config, make: Callable[[], nn.Module]) -> Backbones:
    student = _call(make)
    what = f"backbone {type(student).__name__}"
    if _lazy(student):
        _initialize(student, what, cfg.global_crops_size, cfg.in_channels)
    teacher = _copy(student, make)
    if isinstance(student, vit.VisionTransformer) and _is_as_built(student):
        for crops in crops_of(cfg):
            student.patchify(
                torch.zeros(1, crops.channels, crops.side, crops.side)
            )  # refuses what is too small
        return Backbones(student, teacher, student.embed_dim)
    # a compiled module is tried as it was written
    tried = getattr(teacher, "_orig_mod", teacher)
    trial = try_out(tried, what, crops_of(cfg))
    if any(p.grad is not None for p in student.parameters()):
        student.zero_grad()  # its forward holds on to its own modules, in a copy too
        teacher = _again(student, make, "its copy computes with the original's parameters")
        trial = try_out(teacher, what, crops_of(cfg))
    return Backbones(
        student,
        teacher,
        trial.width,
        _notes(type(student).__name__, student, trial),
        # what is drawn may leave a layer out
        not (trial.unused or trial.draws),
    )


def _is_as_built(student: vit.VisionTransformer) -> bool:
    """Whether it is our ViT with nothing added, of which all is known without a trial."""
    parts = {name for name, _ in student.named_children()} | set(student._parameters)
    return type(student) is vit.VisionTransformer and parts == {
        "patch_embed",
        "blocks",
        "norm",
        "cls_token",
        "pos_embed",
    }


def _call(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` returns, without arguments; a sentence if that is no module."""
    if not callable(make):
        raise ValueError(
            f"backbone is a {type(make).__name__}: give a function or class that makes a module."
        )
    name = getattr(make, "__name__", type(make).__name__)
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(
            f"backbone {name} is called without arguments ({error}): give those it needs, as in "
            f"backbone=lambda: {name}(...)."
        ) from error
    except ValueError:  # of something in C, which tells no signature
        pass
    module = make()
    if not isinstance(module, nn.Module):
        raise ValueError(f"backbone {name} returns {a_kind(module)}: expected a torch.nn.Module.")
    tensors = chain(module.parameters(), module.buffers())
    if any(x.is_inference() for x in tensors if not is_lazy(x)):
        raise ValueError(
            f"backbone {name} is made under torch.inference_mode, so that nothing can train it: "
            "make it outside of that."
        )
    return module


@torch.no_grad()
def _initialize(module: nn.Module, what: str, side: int, channels: int) -> None:
    """Give lazy layers their shapes."""
    training = module.training
    module.eval()
    try:
        module(torch.zeros(1, channels, side, side))
    except Exception as error:  # whatever a module of somebody else's may raise
        raise ValueError(
            f"{what} has lazy layers, and does not take an image of {side} x {side} "
            f"(`global_crops_size`): {one_line(error)}"
        ) from error
    module.train(training)
    if unmade := _lazy(module):
        raise ValueError(
            f"{what} has lazy layers that its forward never uses ({', '.join(unmade[:4])}): leave "
            "them out, or give them their sizes."
        )


def _lazy(module: nn.Module) -> list[str]:
    """Parameters and buffers without a shape yet."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    return [name for name, x in tensors if is_lazy(x)]


@torch.no_grad()
def _copy(student: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """One like it for the teacher: a copy, or what a second call makes where torch or Python cannot
    copy it."""
    reason = "its copy shares parameters with it"
    try:
        teacher = copy.deepcopy(student)
    except Exception as error:  # a lock, a generator, a tensor with a history, ...
        reason = f"it cannot be copied ({one_line(error)})"
    else:
        if not _share(student, teacher):
            return teacher
    return _again(student, make, reason)


@torch.no_grad()
def _again(student: nn.Module, make: Callable[[], nn.Module], reason: str) -> nn.Module:
    """What a second call makes, with the student's state. reason: why not a copy."""
    name = type(student).__name__
    with torch.random.fork_rng([]):
        teacher = _call(make)
    if _share(student, teacher) or teacher is student:
        raise ValueError(
            f"backbone {name}: the teacher needs one of its own, but {reason}, and the function "
            "returns the same one, or one that shares parameters, each time: let it make a new one."
        )
    try:
        teacher.load_state_dict(student.state_dict())
        for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
            ours.copy_(theirs)  # those that are not saved, too
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"backbone {name}: the teacher needs one like it, but {reason}, and a second call "
            f"makes another one ({one_line(error)})."
        ) from error
    return teacher


def _share(a: nn.Module, b: nn.Module) -> bool:
    ours = {id(x) for x in chain(a.parameters(), a.buffers())}
    return any(id(x) in ours for x in chain(b.parameters(), b.buffers()))


def _notes(name: str, student: nn.Module, trial: Trial) -> tuple[str, ...]:
    notes = []
    if trial.unused:
        shown = ", ".join(trial.unused[:4])
        more = f" and {len(trial.unused) - 4} more" if len(trial.unused) > 4 else ""
        notes.append(
            f"no gradient reached {len(trial.unused)} parameter(s) of {name} in a trial: "
            f"{shown}{more}; without one they stay as they are"
        )
    parameters = list(student.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        notes.append(f"all parameters of {name} are frozen: only the head trains")
    return tuple(notes)


@torch.no_grad()
def feature_width(backbone: nn.Module, image_size: int) -> int:
    """D, the length of a backbone's features, found by a trial image unless it is one of our
    ViTs."""
    if isinstance(backbone, vit.VisionTransformer):
        return backbone.embed_dim
    training = backbone.training
    backbone.eval()  # batch statistics must not see the trial
    width = features(backbone, torch.zeros(1, 3, image_size, image_size)).shape[1]
    backbone.train(training)
    return width
