"""The entry points of hubconf.py, as torch.hub finds them."""

import runpy
from pathlib import Path

import pytest
import torch

from dinofast import load_backbone, vit_nano, vit_tiny

ROOT = str(Path(__file__).parent.parent)
ENTRIES = ["load", "vit_base", "vit_nano", "vit_small", "vit_tiny"]


def hub(name, *args, **options):
    return torch.hub.load(ROOT, name, *args, source="local", **options)


def test_nothing_else_is_listed():
    """By the rule of `torch.hub.list`, which itself would download."""
    hubconf = runpy.run_path(f"{ROOT}/hubconf.py")
    found = {n: v for n, v in hubconf.items() if callable(v) and not n.startswith("_")}
    assert sorted(found) == ENTRIES and all(entry.__doc__ for entry in found.values())


@pytest.mark.parametrize("arch, width", [("vit_tiny", 192), ("vit_nano", 64)])
def test_random_weights(arch, width):
    vit = hub(arch, patch_size=8, img_size=(32,))
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, width) and vit.grid == 4


def test_a_checkpoint(tmp_path):
    vit = vit_tiny(patch_size=8, img_size=(32,)).eval()
    path = tmp_path / "c.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}}, path)
    images = torch.randn(2, 3, 32, 32)
    for loaded in (
        hub("vit_tiny", pretrained=path),
        hub("vit_tiny", pretrained=str(path), patch_size=8, img_size=(32,), drop_path_rate=0.1),
        hub("load", path),
        hub("load", str(path), key="teacher"),
    ):
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(images), vit(images))
    with pytest.raises(ValueError, match="does not fit this backbone"):
        hub("vit_small", pretrained=path)
    with pytest.raises(ValueError, match="give a checkpoint, pretrained='checkpoint.pth'"):
        hub("vit_tiny", pretrained=True)


def test_load_is_load_backbone(tmp_path):
    torch.save(vit_nano(img_size=(16,)).state_dict(), tmp_path / "w.pth")
    ours = load_backbone(tmp_path / "w.pth").state_dict()
    torch.testing.assert_close(hub("load", tmp_path / "w.pth").state_dict(), ours, rtol=0, atol=0)
