"""The data path by stage: dataset -> sampler -> augmentation -> decode -> backend_{pil,native,dali}
-> loader."""

from dinofast.data.loader import Loader, choose_backend, make_loader

__all__ = ["Loader", "choose_backend", "make_loader"]
