"""`dinofast doctor`: what is installed, and which path each part takes."""

from types import SimpleNamespace

import pytest
import torch

from dinofast import cli, ops
from dinofast.commands import doctor
from dinofast.nn import attention
from dinofast.nn.onednn_linear import select_library


def test_doctor_says_what_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "GPU" in text
    for name, paths in ops.paths().items():
        assert f"{name:22} {paths['cpu']}" in text
    library = select_library(None, torch.device("cpu"), torch.float32)
    assert (f"{'linear layers':22} the ViTs' large ones in fp32 by oneDNN" in text) == (
        library == "onednn"
    )
    assert f"{'linear layers':22} torch's BLAS\n" in text  # on cuda


def test_doctor_says_which_other_attention_a_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(
        torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False
    )
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for module in (attention, doctor):
        monkeypatch.setattr(
            module, "xformers_unavailable_reason", lambda: "xformers is not installed"
        )
    assert doctor._attention("cuda") == (
        "sdpa, torch's, per crop size; others: varlen, cudnn, eager; not xformers: xformers is not "
        "installed; not fa3: Some GPU is no H100 or H200, for which its kernels are made"
    )


@pytest.mark.parametrize(
    "there, words",
    [
        (
            {"flash": "fa2F@2.7.4-pt"},
            "flash operators: fa2F@2.7.4-pt (torch has it); what it warns of",
        ),
        (
            {"flash3": "fa3F@pip_pkg", "flash": "fa2F@2.8.3"},
            "flash operators: fa3F@pip_pkg, fa2F@2.8.3; what it warns of",
        ),
        ({}, "flash operators: none; what it warns of"),
    ],
    ids=str,
)
def test_doctor_says_which_of_xformers_kernels_there_are(monkeypatch, there, words):
    def operator(name):
        return SimpleNamespace(
            FwOp=SimpleNamespace(NAME=there.get(name, "unused"), is_available=lambda: name in there)
        )

    monkeypatch.setattr(doctor, "xformers_unavailable_reason", lambda: None)
    monkeypatch.setattr(
        doctor, "fmha", lambda: SimpleNamespace(flash3=operator("flash3"), flash=operator("flash"))
    )
    assert words in doctor._xformers_operators()
    monkeypatch.setattr(doctor, "xformers_unavailable_reason", lambda: "xformers is not installed")
    assert doctor._xformers_operators() == ""
