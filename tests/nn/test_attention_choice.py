"""Which attention a run takes, and why not another."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from test_attention import RUNS, dense, run, using
from torch.nn.attention import SDPBackend

from dinofast.nn import attention as attention_module
from dinofast.nn.attention import activate, fmha, select_attention


# ---- which one serves
@pytest.mark.parametrize(
    ("asked", "device", "dtype", "capability", "installed", "chosen"),
    [
        (None, "cuda", torch.bfloat16, (8, 0), True, ("xformers", None)),
        (None, "cuda", torch.float16, (9, 0), True, ("xformers", None)),
        (
            None,
            "cuda",
            torch.bfloat16,
            (9, 0),
            False,
            ("varlen", "not xformers: neither xformers nor mslk is installed"),
        ),
        (
            None,
            "cuda",
            torch.float32,
            (9, 0),
            True,
            ("sdpa", "not xformers: it needs bf16 or fp16 on a GPU, not float32 on cuda"),
        ),
        (None, "cpu", torch.bfloat16, None, True, ("sdpa", None)),
        (
            None,
            "cuda",
            torch.float16,
            (7, 5),
            True,
            (
                "sdpa",
                "not xformers: Some GPU is older than the A100, for which its kernels are made",
            ),
        ),
        ("xformers", "cuda", torch.bfloat16, (8, 0), True, ("xformers", None)),
        ("varlen", "cuda", torch.bfloat16, (8, 6), True, ("varlen", None)),
        ("sdpa", "cuda", torch.bfloat16, (9, 0), True, ("sdpa", None)),
        ("eager", "cpu", torch.float64, None, False, ("eager", None)),
        ("fa3", "cuda", torch.bfloat16, (9, 0), True, ("fa3", None)),
        ("cudnn", "cuda", torch.bfloat16, (8, 0), False, ("cudnn", None)),
    ],
)
def test_choice(machine, asked, device, dtype, capability, installed, chosen):
    machine(capability, installed)
    assert select_attention(asked, torch.device(device), dtype, 64) == chosen


def test_an_xformers_that_does_not_import_is_not_chosen(machine):
    machine((9, 0), True, ImportError("it was built for another torch\nand so on"))
    assert select_attention(None, torch.device("cuda"), torch.bfloat16, 64) == (
        "varlen",
        "not xformers: xformers does not import (it was built for another torch), and mslk does "
        "not import (it was built for another torch)",
    )


def test_a_good_mslk_stands_in_for_an_xformers_that_does_not_import(machine, monkeypatch):
    machine((9, 0), True)
    good = types.SimpleNamespace()

    def import_module(name):
        if name.startswith("xformers"):
            raise ImportError("undefined symbol")
        return good

    monkeypatch.setattr(attention_module.importlib, "import_module", import_module)
    assert (
        select_attention(None, torch.device("cuda"), torch.bfloat16, 64) == ("xformers", None)
        and fmha() is good
    )


def test_what_a_failed_import_leaves_behind_is_not_taken(tmp_path, monkeypatch):
    """Python forgets a package whose import fails, not the submodules that it had imported until
    then."""
    for name, text in {
        "xformers": "",
        "xformers/ops": "from . import fmha\nraise ImportError('undefined symbol')",
        "xformers/ops/fmha": "",
        "mslk": "",
        "mslk/attention": "",
        "mslk/attention/fmha": "",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("xformers", "mslk")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        for _ in range(2):
            fmha.cache_clear()
            assert (
                not attention_module.xformers_unavailable_reason()
                and fmha().__name__ == "mslk.attention.fmha"
            )
    finally:
        fmha.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in ("xformers", "mslk")]:
            del sys.modules[name]


def test_an_old_torch_cannot_take_fa3_and_one_without_cudnn_has_none(machine, monkeypatch):
    machine((9, 0), True)
    monkeypatch.setattr(
        torch.nn.attention, "list_flash_attention_impls", lambda: ["FA4"], raising=False
    )
    with pytest.raises(
        ValueError, match="fa3 was asked for, but torch .* cannot take FlashAttention-3"
    ):
        select_attention("fa3", torch.device("cuda"), torch.bfloat16, 64)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cudnn was asked for, but this torch is without cuDNN"):
        select_attention("cudnn", torch.device("cuda"), torch.bfloat16, 64)


def test_flash_attention_3_is_there_for_those_that_ask_for_it_alone(monkeypatch):
    """torch has one flash attention for the process: each step sees to it that it is its own, and
    leaves a user's alone."""
    calls = []
    monkeypatch.setattr(
        torch.nn.attention,
        "current_flash_attention_impl",
        lambda: calls[-1] if calls else None,
        raising=False,
    )
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", calls.append, raising=False
    )
    monkeypatch.setattr(
        torch.nn.attention,
        "restore_flash_attention_impl",
        lambda: calls.append(None),
        raising=False,
    )
    for impl in (
        "varlen",
        "fa3",
        "fa3",
        "varlen",
        "sdpa",
        "fa3",
        "xformers",
        "fa3",
        "cudnn",
        "fa3",
        "eager",
    ):
        activate(impl)
    assert calls == ["FA3", None] * 4
    calls.append("FA4")
    activate("varlen")
    assert calls[-1] == "FA4"


def test_cudnn_is_sdpa_by_its_own_kernel_and_leaves_single_queries_to_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention_module, "sdpa_kernel", lambda backend: asked.append(backend) or nullcontext()
    )
    for cls_only, kernels in ((False, 2), (True, 0)):
        for ours, exact in zip(
            run(using("cudnn"), RUNS["two"], cls_only, torch.float64),
            run(dense, RUNS["two"], cls_only, torch.float64),
            strict=True,
        ):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
        assert asked == [SDPBackend.CUDNN_ATTENTION] * kernels
        asked.clear()


@pytest.mark.parametrize(
    "width, chosen", [(64, "xformers"), (256, "xformers"), (50, "sdpa"), (264, "sdpa")]
)
def test_choice_by_the_width_of_a_head(machine, width, chosen):
    machine((9, 0), True)
    impl, note = select_attention(None, torch.device("cuda"), torch.bfloat16, width)
    assert impl == chosen and (not note or f"up to 256 in steps of 8, not {width}" in note)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "capability", "installed", "message"),
    [
        (
            "flash",
            "cuda",
            torch.bfloat16,
            (9, 0),
            True,
            "`attention` is 'flash': choose from xformers, varlen, fa3, cudnn, sdpa,",
        ),
        ("", "cpu", torch.float32, None, True, "`attention` is '': choose from"),
        (
            "xformers",
            "cuda",
            torch.bfloat16,
            (9, 0),
            False,
            "`attention` xformers was asked for, but neither xformers nor mslk is installed: leave "
            "`attention` out, or give sdpa.",
        ),
        (
            "xformers",
            "cpu",
            torch.float32,
            None,
            True,
            "but it needs bf16 or fp16 on a GPU, not float32 on cpu: leave `attention` out, or "
            "give sdpa.",
        ),
        (
            "varlen",
            "cuda",
            torch.float32,
            (9, 0),
            True,
            "`attention` varlen was asked for, but it needs bf16 or fp16 on a GPU",
        ),
        (
            "varlen",
            "cuda",
            torch.bfloat16,
            (7, 0),
            True,
            "`attention` varlen was asked for, but Some GPU is older than the A100",
        ),
        (
            "fa3",
            "cuda",
            torch.bfloat16,
            (8, 0),
            True,
            "`attention` fa3 was asked for, but Some GPU is no H100 or H200",
        ),
        (
            "fa3",
            "cuda",
            torch.bfloat16,
            (9, 0),
            False,
            "but flash_attn_interface is not installed (it is",
        ),
        (
            "cudnn",
            "cuda",
            torch.float32,
            (9, 0),
            True,
            "`attention` cudnn was asked for, but it needs bf16 or fp16 on a GPU",
        ),
    ],
)
def test_choice_refused(machine, asked, device, dtype, capability, installed, message):
    machine(capability, installed)
    with pytest.raises(ValueError) as error:
        select_attention(asked, torch.device(device), dtype, 64)
    assert message in str(error.value)


@pytest.fixture
def machine(monkeypatch):
    """A function that sets the GPU's capability and whether xformers and mslk are installed, and
    how they fail if they do."""

    def pretend(capability, installed, fails=None):
        fmha.cache_clear()  # of what was there before

        def import_module(name):
            if fails:
                raise fails

        monkeypatch.setattr(attention_module.importlib, "import_module", import_module)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if installed else None
        )

    yield pretend
    fmha.cache_clear()
