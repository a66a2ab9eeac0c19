"""What the optimizers have in common: norms and clip, the decision to skip, the teacher's
average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops, reference
from .options import check_group, complete, number, refuse_momentum
from .states import check_kind, check_moments, check_state_dict
from .tensors import TRAINABLE, as_real, grad_norms, inside_zero, is_flat, pairs

CLIP_MODES = ("tensor", "global")
_HALVES = (torch.bfloat16, torch.float16)
# what a teacher follows; parameters of other dtypes can only be frozen ones, equal in both
_AVERAGED = (torch.float32, torch.float64, *_HALVES)
# whatever the parameter's dtype
_FLOAT32_STATE = ("exp_avg", "exp_avg_sq", "master", "teacher_master")
_T = TypeVar("_T", Tensor, Tensor | None)


class StudentTeacherOptimizer(torch.optim.Optimizer):
    """What `AdamWEMA`, `SGDEMA` and `LARSEMA` have in common; a child updates the student.

    params: parameters or groups, named or not, as for any torch optimizer. student, teacher:
    modules with the same parameters in the same order; `teacher <- momentum teacher + (1 -
    momentum) student` follows every step, for frozen parameters too, not for buffers. Frozen
    parameters that have no average (integers, 8-bit floats, sparse ones) must be equal and stay as
    they are. A 16-bit teacher is the rounded copy of an average in float32
    (`state["teacher_master"]`): it would stand still otherwise.

    teacher_momentum: of that average, where `step` is not given one; a group's value may be changed
    at any time (`group["teacher_momentum"]`), and parameters in no group follow the first one.

    clip_grad: largest L2 norm, 0 for none; of each gradient tensor on its own with clip_mode
    "tensor", as in the official code, of the whole gradient with "global", as in
    `torch.nn.utils.clip_grad_norm_`.

    Options of torch's optimizers: `maximize` is honored; `foreach`, `fused` and `capturable` choose
    one of torch's implementations and change nothing; what would change the result (`amsgrad`,
    `differentiable`, `nesterov`, `dampening`, `decoupled_weight_decay` False) is refused, also in a
    group, at a step and in a state that is loaded. Complex parameters train as in torch. Sharded
    ones of FSDP2 (DTensor) are clipped by their whole norm.

    copies: 16-bit tensors by the float32 parameter, student's or teacher's, that they are rounded
    copies of; every step writes them too (see `nn.weight_copies`).

    After a step `grad_norm` () is the norm of the whole gradient before clipping, `skipped` () the
    number of steps left out because a gradient was not finite; both stay on the device. `lr` and
    `weight_decay` of a group may be floats or tensors of one number.
    """

    # torch.amp.GradScaler then leaves unscaling and the skip to us, without a sync
    _step_supports_amp_scaling = True
    _kind = ""  # the class's name, of a class derived from it too
    _moments: tuple[str, ...] = ()  # what a child keeps for each parameter

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        student: nn.Module | None,
        teacher: nn.Module | None,
        clip_grad: float,
        clip_mode: str,
    ) -> None:
        if (student is None) != (teacher is None):
            raise ValueError("student and teacher go together: give both modules, or neither.")
        if teacher is None:
            refuse_momentum([defaults])
        ops.check_one_number(clip_grad, "clip_grad")
        if not clip_grad >= 0:
            raise ValueError(
                f"clip_grad is {clip_grad}: it must not be negative; 0 switches clipping off."
            )
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode is {clip_mode!r}: choose from {', '.join(CLIP_MODES)}.")
        if inside_zero() and (teacher is not None or (clip_grad and clip_mode == "global")):
            raise ValueError(
                "ZeroRedundancyOptimizer gives each process a part of the parameters, so that "
                "neither a teacher nor clip_mode 'global' can be had in it: use clip_mode 'tensor' "
                "and dinofast.ema_, or fully_shard."
            )
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        check_group(defaults, type(self).__name__)
        super().__init__(params, defaults)
        self._teacher_of = (
            pairs(student, teacher) if student is not None and teacher is not None else {}
        )
        self._name_of = (
            {} if student is None else {p: name for name, p in student.named_parameters()}
        )
        if teacher is None:
            refuse_momentum(self.param_groups)
        if student is not None and not self._follows():
            raise ValueError(
                "none of the parameters given is one of student's: give those of the student that "
                "the teacher follows."
            )
        self.copies: dict[Tensor, Tensor] = {}
        # of students in no group, for which torch keeps none
        self._frozen_state: dict[Tensor, dict[str, Tensor]] = {}
        given = (p.device for group in self.param_groups for p in group["params"])
        device = next(given, torch.device("cpu"))
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's own. Raises ValueError for options and parameters that cannot be had."""
        super().add_param_group(param_group)
        group, i = self.param_groups[-1], len(self.param_groups) - 1
        try:
            self._check_group(group, i)
            if not getattr(self, "_teacher_of", True):  # the constructor has not got that far
                refuse_momentum([group])
            self._check_params(group["params"])
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError(f"param group {i} holds a parameter twice: give it once.")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch: its loss is a float
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        momentum: float | Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """One step. momentum: of the teacher's average, for all parameters, instead of their
        groups' `teacher_momentum`. skip: bool tensor (), leave it out."""
        if closure is not None and not callable(closure):
            raise ValueError(
                f"step's first argument is a closure, not {closure!r}: give the teacher's momentum "
                "by name, step(momentum=...)."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            [p for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        active = [p for params in trained for p in params]
        grads = [p.grad for p in active if p.grad is not None]
        self._check_step(active, grads, momentum, skip)
        device = active[0].device if active else self.grad_norm.device
        if self.skipped.device != device:  # the model has been moved
            self.skipped = self.skipped.to(device)
        bad = torch.zeros((), dtype=torch.bool, device=device) if skip is None else skip
        coefficients, bad = self._clip(grads, bad)
        shares = self._shares(momentum, active)
        counts, rest = [len(params) for params in trained], iter(grads)
        for group, params, clip, share in zip(
            self.param_groups, trained, coefficients.split(counts), shares, strict=True
        ):
            if params:
                factors = -clip if group.get("maximize") else clip
                self._update(group, params, list(islice(rest, len(params))), factors, bad, share)
        self._average_rest(set(active), shares, bad)
        self.skipped += bad
        return loss

    def _check_step(
        self,
        active: list[Tensor],
        grads: list[Tensor],
        momentum: float | Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """What may have changed since the optimizer was made."""
        for i, group in enumerate(self.param_groups):
            self._check_group(group, i)
        ops.check_momentum(momentum)
        if any([grad.layout is not torch.strided for grad in grads]):
            p, grad = next(
                (p, g) for p, g in zip(active, grads, strict=True) if g.layout is not torch.strided
            )
            raise ValueError(
                f"{self._name(p)} has a gradient of {grad.layout}: make it dense, for nn.Embedding "
                "by sparse=False."
            )
        if len(self.state) < len(active):  # new ones; of 200 it takes 1 % of the step on a CPU
            self._check_params(active)
            for p in [p for p in active if p.dtype not in TRAINABLE]:
                raise ValueError(
                    f"{self._name(p)} is {p.dtype}, which cannot be trained: keep it frozen, or in "
                    "a float type of 16 bits or more."
                )
        if skip is not None and torch.as_tensor(skip).numel() != 1:
            raise ValueError(f"skip is {skip}: give one number, whether to leave the step out.")
        if self._teacher_of and not self._follows():
            raise ValueError(
                "the parameters in the groups are no longer the student's (a wrapper has replaced "
                "them): make the optimizer after wrapping student and teacher."
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{type(self).__name__}.step cannot be captured in a CUDA graph: capture forward "
                "and backward, and step outside."
            )

    def _check_group(self, group: dict[str, Any], i: int) -> None:
        check_group(group, type(self).__name__, f" of param group {i}")
        for name in ("clip_grad", "clip_mode"):
            # ZeroRedundancyOptimizer writes all arguments into the groups
            if name in group and group[name] != getattr(self, name, group[name]):
                raise ValueError(
                    f"{name} of param group {i} is {group[name]}: there is one for all groups, "
                    f"optimizer.{name}."
                )

    def _check_params(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError for parameters whose norms cannot be had."""
        if self.clip_grad and any(is_flat(p) for p in params):
            raise ValueError(
                f"clip_grad is {self.clip_grad} but FSDP1 keeps the parameters in flat pieces, "
                "whose norms are not those of tensors: use fully_shard (FSDP2), or clip_grad 0 and "
                "the clip_grad_norm_ of FSDP."
            )

    def _name(self, p: Tensor) -> str:
        """A parameter in words: by the student's name, the group's, or its place."""
        for i, group in enumerate(self.param_groups):
            for j, q in enumerate(group["params"]):
                if p is q and (p in self._name_of or "param_names" in group):
                    return f"parameter '{self._name_of.get(p) or group['param_names'][j]}'"
                if p is q:
                    return f"parameter {j} of param group {i}"
        return "a parameter"

    def _follows(self) -> bool:
        """Whether a parameter in the groups has a teacher."""
        return any(p in self._teacher_of for group in self.param_groups for p in group["params"])

    def _clip(self, grads: list[Tensor], bad: Tensor) -> tuple[Tensor, Tensor]:
        """Each gradient's factor (n,), of clipping and loss scale, and whether to skip (); sets
        `grad_norm`."""
        if not grads:
            return torch.zeros(0), bad
        # GradScaler sets these two around its call of step
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        inv_scale = 1.0 if scale is None else 1.0 / scale
        norms = grad_norms(grads) * inv_scale
        self.grad_norm = norms.norm()
        bad = bad | ~torch.isfinite(self.grad_norm)
        if found_inf is not None:
            bad = bad | (found_inf > 0)
        return (
            reference.clip_coefficients(norms, self.clip_grad, self.clip_mode) * inv_scale,
            bad,
        )

    def _shares(
        self, momentum: float | Tensor | None, active: list[Tensor]
    ) -> list[float | Tensor]:
        """The teacher's momentum of each group."""
        groups = self.param_groups
        if momentum is not None or not self._teacher_of:
            return [1.0 if momentum is None else number(momentum)] * len(groups)
        # torch.distributed.checkpoint makes the state by a step of lr 0 on gradients of 0
        if not self.state and active and not any(float(group["lr"]) for group in groups):
            if not self.grad_norm.item():
                return [1.0] * len(groups)
        shares = [number(group.get("teacher_momentum")) for group in groups]
        if any(share is None for share in shares):
            raise ValueError(
                "this optimizer averages a teacher: give it teacher_momentum, or "
                "step(momentum=...), for example 0.996."
            )
        return shares

    def _update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        coefficients: Tensor,
        skip: Tensor,
        momentum: float | Tensor,
    ) -> None:
        raise AssertionError("a child defines this")

    def _average_rest(
        self, updated: set[Tensor], shares: list[float | Tensor], skip: Tensor
    ) -> None:
        """The teachers of those that were not updated, by their momentum."""
        left = [s for s in self._teacher_of if s not in updated]
        if not left:
            return
        share_of = {
            p: share
            for group, share in zip(self.param_groups, shares, strict=True)
            for p in group["params"]
        }
        equal: dict[int, tuple[float | Tensor, list[Tensor]]] = {}
        for s in left:
            share = share_of.get(s, shares[0])
            equal.setdefault(id(share), (share, []))[1].append(s)
        for share, students in equal.values():
            self._average(students, share, skip)

    def _average(self, students: list[Tensor], momentum: float | Tensor, skip: Tensor) -> None:
        """The teachers of those that have one."""
        students = [s for s in students if s in self._teacher_of]
        if students:
            teachers, copies = self._masters(
                [(s, self._teacher_of[s]) for s in students], "teacher_master"
            )
            newest = [self._state_of(s).get("master", s) for s in students]
            teachers, newest, copies = as_real(students, teachers, newest, copies)
            ops.ema_(teachers, newest, momentum, skip, copies=copies)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """What is kept for a parameter, in a group or not; an empty one that is not kept if there
        is nothing."""
        return self.state[p] if p in self.state else self._frozen_state.get(p, {})

    def _masters(
        self, pairs: list[tuple[Tensor, _T]], name: str
    ) -> tuple[list[_T], list[Tensor | None]]:
        """For pairs (parameter, it or its teacher): the tensors to update, and those they are then
        rounded into (or None).

        Of a 16-bit tensor the float32 master kept as `name` is updated, made from its values when
        it is first needed.
        """
        wide: list[_T] = []
        copies: list[Tensor | None] = []
        for p, x in pairs:
            if x is None or x.dtype not in _HALVES:
                wide.append(x)
                copies.append(None if x is None else self.copies.get(x))
                continue
            if name not in self.state.get(p, {}):
                in_group = any(p is q for group in self.param_groups for q in group["params"])
                if in_group:
                    self.state[p].update(self._frozen_state.pop(p, {}))  # it was in none before
                kept = self.state[p] if in_group else self._frozen_state.setdefault(p, {})
                kept.setdefault(name, x.detach().float())
            wide.append(self._state_of(p)[name])
            copies.append(x)
        return wide, copies

    def state_dict(self) -> dict[str, Any]:
        """As torch's own: numbers instead of device scalars, so that any optimizer of the same kind
        can load it."""
        handle = self.register_state_dict_post_hook(_to_numbers, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own, which rounds what is kept to the parameter's dtype: here float32 stays
        float32.

        A parameter or teacher that is no longer 16-bit takes over its values in float32: load the
        modules first. Raises ValueError for a state of another kind of optimizer, or of options
        that this one does not have.
        """
        check_state_dict(state_dict, hooked=False)
        seen: dict[str, Any] = {}  # after the hooks of others
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, x: seen.update(check_state_dict(x))),
            self.register_load_state_dict_post_hook(lambda _: self._keep_wide(seen), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _keep_wide(self, saved: dict[str, Any]) -> None:
        numbers = (i for group in saved["param_groups"] for i in group["params"])
        for i, p in zip(
            numbers, (p for group in self.param_groups for p in group["params"]), strict=True
        ):
            if p.dtype in _HALVES:
                self.state[p].update(
                    {
                        name: x.to(p.device, torch.float32)
                        for name, x in saved["state"].get(i, {}).items()
                        if name in _FLOAT32_STATE
                    }
                )
            elif "master" in self.state.get(p, {}):  # was 16-bit when saved
                p.copy_(self.state[p].pop("master"))
        students, frozen = list(self._teacher_of), saved.get("frozen", {})
        self._frozen_state = {
            students[i]: {name: x.to(students[i].device) for name, x in state.items()}
            for i, state in frozen.items()
        }
        for s, t in self._teacher_of.items():
            master = None if t.dtype in _HALVES else self._state_of(s).pop("teacher_master", None)
            # was 16-bit when saved: the average itself goes on, and is kept only once
            if master is not None:
                t.copy_(master)
        self._frozen_state = {s: state for s, state in self._frozen_state.items() if state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a file or a copy; torch's own load_state_dict ends here, too."""
        kind, defaults = type(self).__name__, state.get("defaults") or self.defaults
        before = self.__dict__.get("param_groups", state["param_groups"])
        for i, (group, old) in enumerate(zip(state["param_groups"], before, strict=True)):
            check_kind(group, self._kind, old.keys() - defaults.keys())
            complete(group, defaults, kind, old.get("teacher_momentum"))
            self._check_group(group, i)
        check_moments(state["state"], self._moments, kind)
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch's own keeps its three attributes only."""
        own = (
            "_teacher_of",
            "_name_of",
            "copies",
            "_frozen_state",
            "clip_grad",
            "clip_mode",
            "grad_norm",
            "skipped",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}


def _to_numbers(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A hook, before those of others: step counters on the host, tensors of a group as numbers."""
    assert isinstance(optimizer, StudentTeacherOptimizer)
    for group in state["param_groups"]:
        group.update(
            {k: v.item() for k, v in group.items() if isinstance(v, Tensor) and v.numel() == 1}
        )
        if group["teacher_momentum"] is None:  # then the keys are the official ones
            del group["teacher_momentum"]
    state["state"] = {
        i: {**s, "step": s["step"].cpu()} if "step" in s else s for i, s in state["state"].items()
    }
    if frozen := optimizer._frozen_state:
        students = enumerate(optimizer._teacher_of)
        state["frozen"] = {i: frozen[s] for i, s in students if s in frozen}
