"""What is refused of a state that is loaded: that of another kind of optimizer, or of another
model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

# Group options by which an optimizer is known, the telling ones first.
_KINDS = {
    "lambd": "ASGD",
    "alpha": "RMSprop",
    "rho": "Adadelta",
    "etas": "Rprop",
    "momentum_decay": "NAdam",
    "ns_steps": "Muon",
    "history_size": "LBFGS",
    "beta2_decay": "Adafactor",
    "lr_decay": "Adagrad",
    "eta": "LARS",
    "betas": "AdamW",
    "momentum": "SGD",
}


def check_state_dict(state: Any, hooked: bool = True) -> Any:
    """The state; raise ValueError for what no optimizer's state_dict gave. hooked: the caller's
    hooks, which may make one of it, have seen it."""
    if not isinstance(state, Mapping) or hooked and not {"state", "param_groups"}.issubset(state):
        raise ValueError(
            "this is no optimizer's state_dict, which has 'state' and 'param_groups': give what "
            "optimizer.state_dict() gave, of a checkpoint its 'optimizer'."
        )
    return state


def check_kind(group: Mapping[str, Any], kind: str, own: Collection[str]) -> None:
    """Raise ValueError if a loaded group is known to be another optimizer's than that of `kind`,
    which is torch's of that name with EMA behind it. own: options that the user has given the group
    here too, as a factor for its lr, which tell nothing."""
    found = next((_KINDS[name] for name in _KINDS if name in group and name not in own), "")
    if found == "AdamW" and "foreach" in group and "amsgrad" not in group:
        found = "Adamax or RAdam"
    if kind and found and found != kind.removesuffix("EMA"):  # or one that is derived
        raise ValueError(
            f"the state is that of {found}, another kind of optimizer than {kind}, which takes its "
            f"own and {kind.removesuffix('EMA')}'s: load it into the kind that saved it, or begin "
            "without a state."
        )


def check_moments(state: Mapping[Any, Any], moments: Sequence[str], kind: str) -> None:
    """state: by parameter. Raise ValueError unless it holds the moments alone, in the parameters'
    shapes, or nothing yet."""
    for p, kept in state.items():
        if not isinstance(kept, Mapping):
            continue
        names = {name for name, value in kept.items() if value is not None}
        # the last of AMSGrad, which the groups' `amsgrad` tells or has turned off
        names -= {"master", "teacher_master", "max_exp_avg_sq"}
        if names and names != set(moments):
            raise ValueError(
                f"the state holds {', '.join(sorted(names))} for a parameter, and {kind} needs "
                f"{', '.join(moments)}: it is of another kind of optimizer."
            )
        for name in sorted(names - {"step"}) if isinstance(p, Tensor) else ():
            shape = getattr(kept[name], "shape", None)
            if shape != p.shape:
                there = type(kept[name]).__name__ if shape is None else tuple(shape)
                raise ValueError(
                    f"{name} of the state is {there} and the parameter it is for "
                    f"{tuple(p.shape)}: the state is of another model, or of other groups."
                )
