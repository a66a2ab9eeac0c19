"""The architecture that was meant by a name that does not exist."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable

from ..config import VITS

# vits16, ViT-S/16, vit_small_patch16_224, vitb14_reg, deit-small, and base alone
_OUR_VIT = re.compile(
    r"(?:(?:vit|deit)(tiny|ti|t|small|s|base|b|nano|n)?|(tiny|small|base|nano))"
    r"(?:p|patch)?(8|14|16|32)?(?:\d{3})?(?:distilled|reg\d?)?"
)
_SIZES = {"t": "tiny", "s": "small", "b": "base", "n": "nano"}
# the package, the organization or the method before a name: timm/, facebook/dino-
_BEFORE = re.compile(r"^.*[/:](?=[a-z]{2})|^(timm|torchvision)\.(models\.)?|^dino(v\d)?[-_]?(?=\w)")
_ALIKE = 0.85  # vitg14 and vit_h_14 are 0.83, resnt50 and resnet50 0.93


def nearest_arch(arch: str) -> str:
    """' Did you mean X?', or nothing. Of torchvision and timm only what is imported already."""
    wanted = _letters(_without_source(arch))
    names = _names()
    # as another spells it, but for dashes and capitals
    same = next((name for name in names if _letters(name) == wanted), None)
    if same is not None:
        return f" Did you mean {same}?"
    if vit := _OUR_VIT.fullmatch(wanted):
        size, patch = (vit[1] or vit[2] or "small")[0], vit[3]
        return f" Did you mean vit_{_SIZES[size]}{f' with `patch_size` {patch}' if patch else ''}?"
    by_letters = {_letters(name): name for name in reversed(names)}
    begins = [known for known in by_letters if known.startswith(wanted)] if len(wanted) > 3 else []
    if begins:
        # resnet18 before resnetaa50, vit_large_patch16_224 before vit_large_r50_s32_224
        size_next = re.compile(rf"{wanted}(patch16|\d)")
        return f" Did you mean {by_letters[min(begins, key=lambda n: _rank(n, size_next))]}?"
    near = difflib.get_close_matches(wanted, by_letters, n=1, cutoff=_ALIKE)
    return f" Did you mean {by_letters[near[0]]}?" if near else ""


def _rank(name: str, best: re.Pattern[str]) -> tuple[bool, int, str]:
    return not best.match(name), len(name), name


def _without_source(arch: str) -> str:
    name, before = arch.lower().strip(), ""
    while name != before:
        before, name = name, _BEFORE.sub("", name, count=1)
    return re.sub(r"\.\w+$", "", name)  # of which weights, as timm tags them


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _names() -> list[str]:
    """Ours, torchvision's, timm's, in this order."""
    listing: list[Callable[[], list[str]]] = [lambda: list(VITS)]
    torchvision, timm = sys.modules.get("torchvision.models"), sys.modules.get("timm")
    if torchvision is not None:
        listing.append(lambda: torchvision.list_models(module=torchvision))
    if timm is not None:
        listing.append(lambda: timm.list_models())
    names: list[str] = []
    for names_of in listing:
        try:
            names += names_of()
        except Exception:  # a version without a list
            continue
    return names
