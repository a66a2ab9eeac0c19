"""`AdamWEMA` in a real Lightning Trainer with automatic optimization, which steps by
`optimizer.step(closure)`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dinofast import AdamWEMA, DINOLoss, param_groups

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

STEPS, MOMENTUM = 4, 0.9


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(6, 8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.dino_loss = DINOLoss(8, 4, 0.04, 0.04, 0, 10)

    def loss(self, crops):  # (B, 4, 6)
        crops = crops.transpose(0, 1)
        student, teacher = self.student(crops).flatten(0, 1), self.teacher(crops[:2]).flatten(0, 1)
        return self.dino_loss(student, teacher, 0)

    def training_step(self, crops, batch_index):
        return self.loss(crops)

    def configure_optimizers(self):
        optimizer = AdamWEMA(
            param_groups(self.student),
            lr=0.01,
            student=self.student,
            teacher=self.teacher,
            clip_grad=3.0,
            teacher_momentum=MOMENTUM,
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader():
    data = torch.randn(8 * STEPS, 4, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=8)


def fit(module, folder, epochs, resume=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return trainer


def by_hand(epochs, precision=None):
    module = Module()
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for _ in range(epochs):
        for crops in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = module.loss(crops)
            loss.backward()
            optimizer.step()
            scheduler["scheduler"].step()
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_is_the_loop_by_hand(tmp_path, precision):
    module, start = Module(), Module()
    fit(module, tmp_path, 1, precision=precision)
    expected = by_hand(1, precision)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)
    for model in ("student", "teacher"):
        assert not torch.equal(getattr(module, model).weight, getattr(start, model).weight)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_resumes_from_its_checkpoint(tmp_path):
    first = fit(Module(), tmp_path, 1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    module = Module()
    trainer = fit(module, tmp_path, 2, resume=tmp_path / "one.ckpt")
    torch.testing.assert_close(module.state_dict(), by_hand(2).state_dict(), rtol=0, atol=0)
    (optimizer,) = trainer.optimizers
    assert [group["teacher_momentum"] for group in optimizer.param_groups] == [MOMENTUM] * 2
