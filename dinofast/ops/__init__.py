"""The seam between Python and the kernels. Per operation: the torch.library schema, implementations
(C++ on the CPU, Triton on CUDA), fake, backward, and the public function with its checks. A call
that no kernel can take goes to `dinofast.reference`.
"""

from ._adamw_ema import adamw_ema_, ema_, grad_norms
from ._checks import check_momentum, check_one_number
from ._choice import OPERATIONS, check_required, is_known, paths, unavailable_reason
from ._color import color
from ._dino_loss import dino_loss, soft_cross_entropy
from ._normalize import normalize

__all__ = [
    "OPERATIONS",
    "adamw_ema_",
    "check_momentum",
    "check_one_number",
    "check_required",
    "color",
    "dino_loss",
    "ema_",
    "grad_norms",
    "is_known",
    "normalize",
    "paths",
    "soft_cross_entropy",
    "unavailable_reason",
]
