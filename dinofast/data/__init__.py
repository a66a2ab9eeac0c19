"""The data path by stage: dataset -> sampler -> augmentation -> decode -> backend_{pil,native,dali}
-> loader."""

from dinofast.data.loader import Loader, make_loader, select_backend

__all__ = ["Loader", "select_backend", "make_loader"]
