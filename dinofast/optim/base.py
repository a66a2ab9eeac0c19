"""What the optimizers have in common: norms and clip, the decision to skip, the teacher's
average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops, reference

CLIP_MODES = ("tensor", "global")
_HALVES = (torch.bfloat16, torch.float16)
# what a teacher follows; parameters of other dtypes can only be frozen ones, equal in both
_AVERAGED = (torch.float32, torch.float64, *_HALVES)
# whatever the parameter's dtype
_FLOAT32_STATE = ("exp_avg", "exp_avg_sq", "master", "teacher_master")
_T = TypeVar("_T", Tensor, Tensor | None)


class StudentTeacherOptimizer(torch.optim.Optimizer):
    """What `AdamWEMA`, `SGDEMA` and `LARSEMA` have in common; a child updates the student.

    params: parameters or groups, as for any torch optimizer. student, teacher: modules with the
    same parameters in the same order; `teacher <- momentum teacher + (1 - momentum) student`
    follows every step, for frozen parameters too, not for buffers. A 16-bit teacher is the rounded
    copy of an average in float32 (`state["teacher_master"]`): it would stand still otherwise.
    clip_grad: largest L2 norm, 0 for none; of each gradient tensor on its own with clip_mode
    "tensor", as in the official code, of the whole gradient with "global", as in
    `torch.nn.utils.clip_grad_norm_`.

    copies: 16-bit tensors by the float32 parameter, student's or teacher's, that they are rounded
    copies of; every step writes them too (see `nn.weight_copies`).

    After a step `grad_norm` () is the norm of the whole gradient before clipping, `skipped` () the
    number of steps left out because a gradient was not finite; both stay on the device. `lr` and
    `weight_decay` of a group may be floats or tensors ().
    """

    # torch.amp.GradScaler then leaves unscaling and the skip to us, without a sync
    _step_supports_amp_scaling = True

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
        if clip_grad < 0:
            raise ValueError(
                f"clip_grad is {clip_grad}: it must not be negative; 0 switches clipping off."
            )
        if clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode is {clip_mode!r}: choose from {', '.join(CLIP_MODES)}.")
        for name in ("lr", "weight_decay", "eps"):
            if not isinstance(defaults.get(name, 0.0), Tensor) and not defaults.get(name, 0.0) >= 0:
                raise ValueError(f"{name} is {defaults[name]}: it must not be negative.")
        super().__init__(params, defaults)
        self._teacher_of = (
            _pairs(student, teacher) if student is not None and teacher is not None else {}
        )
        trained = {p for group in self.param_groups for p in group["params"]}
        if self._teacher_of and trained.isdisjoint(self._teacher_of):
            raise ValueError(
                "none of the parameters given is one of student's: give those of the student that "
                "the teacher follows."
            )
        self.copies: dict[Tensor, Tensor] = {}
        # of students in no group, for which torch keeps none
        self._frozen_state: dict[Tensor, dict[str, Tensor]] = {}
        self.clip_grad, self.clip_mode = clip_grad, clip_mode
        device = next(p.device for group in self.param_groups for p in group["params"])
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch: its loss is a float
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        momentum: float | Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """One step. momentum: of the teacher's average, needed when there is a teacher. skip: bool
        tensor (), leave it out."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if momentum is None:
            if self._teacher_of:
                raise ValueError(
                    "this optimizer averages a teacher: give step(momentum=...), for example 0.996."
                )
            momentum = 1.0  # no teacher: of nothing
        ops.check_momentum(momentum)
        trained = [
            [p for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        active = [p for params in trained for p in params]
        bad = (
            torch.zeros((), dtype=torch.bool, device=self.grad_norm.device)
            if skip is None
            else skip
        )
        if active:
            # GradScaler sets these two around its call of step
            scale = getattr(self, "grad_scale", None)
            found_inf = getattr(self, "found_inf", None)
            inv_scale = 1.0 if scale is None else 1.0 / scale
            norms = ops.grad_norms([p.grad for p in active]) * inv_scale
            self.grad_norm = norms.norm()
            bad = bad | ~torch.isfinite(self.grad_norm)
            if found_inf is not None:
                bad = bad | (found_inf > 0)
            coefficients = (
                reference.clip_coefficients(norms, self.clip_grad, self.clip_mode) * inv_scale
            )
            for group, params, clip in zip(
                self.param_groups,
                trained,
                coefficients.split([len(ps) for ps in trained]),
                strict=True,
            ):
                if params:
                    self._update(group, params, [p.grad for p in params], clip, bad, momentum)
        updated = set(active)
        self._average([s for s in self._teacher_of if s not in updated], momentum, bad)
        self.skipped += bad
        return loss

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

    def _average(self, students: list[Tensor], momentum: float | Tensor, skip: Tensor) -> None:
        """The teachers of those that have one."""
        students = [s for s in students if s in self._teacher_of]
        if students:
            teachers, copies = self._masters(
                [(s, self._teacher_of[s]) for s in students], "teacher_master"
            )
            ops.ema_(
                teachers,
                [self._state_of(s).get("master", s) for s in students],
                momentum,
                skip,
                copies=copies,
            )

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
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update({k: v.item() for k, v in group.items() if isinstance(v, Tensor)})
        if self._frozen_state:
            state["frozen"] = {
                i: self._frozen_state[s]
                for i, s in enumerate(self._teacher_of)
                if s in self._frozen_state
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own, which rounds what is kept to the parameter's dtype: here float32 stays
        float32.

        A teacher that is no longer 16-bit takes over its average in float32: load the modules
        first. Raises ValueError for a state of `maximize=True` or `amsgrad=True`, which these
        optimizers do not have.
        """
        for group in state_dict["param_groups"]:
            for name in ("maximize", "amsgrad"):
                if group.get(name):
                    raise ValueError(
                        f"the state is of an optimizer with {name}=True, which "
                        f"{type(self).__name__} does not have."
                    )
        super().load_state_dict(state_dict)
        numbers = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(
            numbers, (p for group in self.param_groups for p in group["params"]), strict=True
        ):
            if p.dtype in _HALVES:
                self.state[p].update(
                    {
                        name: x.to(p.device, torch.float32)
                        for name, x in state_dict["state"].get(i, {}).items()
                        if name in _FLOAT32_STATE
                    }
                )
        students, frozen = list(self._teacher_of), state_dict.get("frozen", {})
        self._frozen_state = {
            students[i]: {name: x.to(students[i].device) for name, x in state.items()}
            for i, state in frozen.items()
        }
        for s, t in self._teacher_of.items():
            master = None if t.dtype in _HALVES else self._state_of(s).pop("teacher_master", None)
            # was 16-bit when saved: the average itself goes on, and is kept only once
            if master is not None:
                t.detach().copy_(master)
        self._frozen_state = {s: state for s, state in self._frozen_state.items() if state}

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch's own keeps its three attributes only."""
        own = (
            "_teacher_of",
            "copies",
            "_frozen_state",
            "clip_grad",
            "clip_mode",
            "grad_norm",
            "skipped",
        )
        return super().__getstate__() | {name: getattr(self, name) for name in own}


def _pairs(student: nn.Module, teacher: nn.Module) -> dict[Tensor, Tensor]:
    """Student's parameter -> teacher's. Raises ValueError for modules that do not go together."""
    students, teachers = list(student.parameters()), list(teacher.parameters())
    if len(students) != len(teachers):
        raise ValueError(
            f"student and teacher differ: {len(students)} parameters here and {len(teachers)} "
            "there."
        )
    for s, t in zip(students, teachers, strict=True):
        if s.shape != t.shape:
            raise ValueError(
                f"student and teacher differ: a parameter is {tuple(s.shape)} here and "
                f"{tuple(t.shape)} there."
            )
        if s is t:
            raise ValueError(
                "student and teacher share a parameter: the teacher must be a copy "
                "(copy.deepcopy(student))."
            )
    return {s: t for s, t in zip(students, teachers, strict=True) if s.dtype in _AVERAGED}
