"""Stand-ins for the compiler and for an official checkout."""

import textwrap

import pytest
import torch


@pytest.fixture
def not_compiled(monkeypatch):
    # 5 s for nothing that is tested here
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Stands in for a checkout: scripts that cannot be imported, with what is taken from them."""
    (tmp_path / "main_dino.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        class DINOLoss(nn.Module):
            def __init__(self, out_dim, ncrops, warmup, temp, epochs, nepochs, student_temp=0.1):
                super().__init__()
                self.ncrops, self.temp, self.student_temp = ncrops, np.float64(temp), student_temp
                self.register_buffer('center', torch.zeros(1, out_dim))
            def forward(self, student, teacher, epoch):
                q = F.softmax((teacher - self.center) / self.temp, dim=-1).detach().chunk(2)
                p = F.log_softmax(student / self.student_temp, dim=-1).chunk(self.ncrops)
                batch_center = teacher.sum(0, keepdim=True)
                dist.all_reduce(batch_center)
                rows = len(teacher) * dist.get_world_size()
                self.center = 0.9 * self.center + 0.1 * batch_center / rows
                pairs = [(t, v) for t in range(2) for v in range(self.ncrops) if v != t]
                return sum(-(q[t] * p[v]).sum(-1).mean() for t, v in pairs) / len(pairs)
        """)
    )
    (tmp_path / "utils.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        def clip_gradients(model, clip):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(torch.clamp(clip / (p.grad.norm() + 1e-6), max=1))
        def get_params_groups(model):
            some = [p for p in model.parameters() if p.requires_grad]
            plain = [p for p in some if p.ndim == 1 or p.shape[0] == 1]
            return [{'params': [p for p in some if p.ndim > 1 and p.shape[0] > 1]},
                    {'params': plain, 'weight_decay': 0.0}]
        class MultiCropWrapper(nn.Module):
            def __init__(self, backbone, head):
                super().__init__()
                self.backbone, self.head = backbone, head
            def forward(self, crops):
                return self.head(torch.cat([self.backbone(crop) for crop in crops]))
        """)
    )
    (tmp_path / "vision_transformer.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        def drop_path(): ...
        class DropPath: ...
        class Mlp: ...
        class Attention: ...
        class Block: ...
        class PatchEmbed: ...
        class VisionTransformer: ...
        def vit_nano(**options):
            from dinofast.nn.vit import vit_nano
            return vit_nano(**options)
        def DINOHead(width, out_dim):
            from dinofast.nn.head import DINOHead
            return DINOHead(width, out_dim)
        """)
    )
    monkeypatch.setenv("DINO_OFFICIAL", str(tmp_path))
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
