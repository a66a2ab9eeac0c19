"""The smallest run that has all parts: its options, and the model and the optimizer of them."""

from dinofast import AdamWEMA, Config, param_groups
from dinofast.nn.dino import Model

TINY = Config(
    arch="vit_nano",
    patch_size=4,
    out_dim=32,
    head_hidden_dim=16,
    head_bottleneck_dim=8,
    local_crops_number=2,
    global_crops_size=16,
    local_crops_size=8,
)


def parts(cfg=TINY, make=None):
    model = Model.from_config(cfg, make)
    optimizer = AdamWEMA(param_groups(model.student), student=model.student, teacher=model.teacher)
    return model, optimizer
