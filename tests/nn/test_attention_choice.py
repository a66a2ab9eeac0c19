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
from dinofast.nn.attention import (
    activate,
    fmha,
    select_attention,
    xformers_kernel_unavailable_reason,
)


# ---- which one serves
@pytest.mark.parametrize(
    ("asked", "device", "dtype", "capability", "installed", "chosen"),
    [
        (None, "cuda", torch.bfloat16, (8, 0), True, ("sdpa", None)),
        (None, "cuda", torch.float16, (9, 0), False, ("sdpa", None)),
        (None, "cuda", torch.float32, (9, 0), True, ("sdpa", None)),
        (None, "cuda", torch.float16, (7, 5), True, ("sdpa", None)),
        (None, "cpu", torch.bfloat16, None, True, ("sdpa", None)),
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


def test_an_xformers_that_does_not_import_is_refused(machine):
    machine((9, 0), True, ImportError("it was built for another torch\nand so on"))
    with pytest.raises(ValueError) as error:
        select_attention("xformers", torch.device("cuda"), torch.bfloat16, 64)
    assert str(error.value) == (
        "`attention` xformers was asked for, but xformers does not import (it was built for "
        "another torch), and mslk does not import (it was built for another torch): leave "
        "`attention` out, or give sdpa."
    )


@pytest.mark.parametrize("package", ["xformers", "mslk"])
def test_an_xformers_without_kernels_is_refused(machine, monkeypatch, package):
    """A wheel for another CUDA warns at import and says at the first call what it lacks: seen on an
    H200, 2026-11-27."""

    def no_operator(*args):
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward` with inputs:\n"
            "     query       : shape=(1, 8, 1, 64) (torch.bfloat16)\n"
            "`cutlassF-pt` is not supported because:\n    it wasn't build with CUDA support\n"
        )

    machine((9, 0), True)
    monkeypatch.setattr(
        attention_module,
        "fmha",
        lambda: types.SimpleNamespace(
            __name__=f"{package}.ops.fmha",
            memory_efficient_attention_forward_requires_grad=no_operator,
            attn_bias=types.SimpleNamespace(
                BlockDiagonalMask=types.SimpleNamespace(from_seqlens=lambda *args, **options: None)
            ),
        ),
    )
    reason = xformers_kernel_unavailable_reason.__wrapped__(torch.device("cpu"), torch.bfloat16, 64)
    assert reason == f"{package} has no kernel here (it wasn't build with CUDA support)"
    monkeypatch.setattr(attention_module, "xformers_kernel_unavailable_reason", lambda *how: reason)
    with pytest.raises(ValueError, match=f"asked for, but {package} has no kernel here"):
        select_attention("xformers", torch.device("cuda"), torch.bfloat16, 64)


def test_a_good_mslk_stands_in_for_an_xformers_that_does_not_import(machine, monkeypatch):
    machine((9, 0), True)
    good = types.SimpleNamespace()

    def import_module(name):
        if name.startswith("xformers"):
            raise ImportError("undefined symbol")
        return good

    monkeypatch.setattr(attention_module.importlib, "import_module", import_module)
    chosen = select_attention("xformers", torch.device("cuda"), torch.bfloat16, 64)
    assert chosen == ("xformers", None) and fmha() is good


def test_what_nobody_asks_for_is_not_imported(machine, monkeypatch):
    machine((9, 0), True)
    monkeypatch.setattr(attention_module, "fmha", lambda: pytest.fail("imported"))
    assert select_attention(None, torch.device("cuda"), torch.bfloat16, 64).name == "sdpa"


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


@pytest.mark.parametrize(("width", "fits"), [(64, True), (256, True), (50, False), (264, False)])
def test_choice_by_the_width_of_a_head(machine, width, fits):
    machine((9, 0), True)
    reason = attention_module.unavailable_reason(
        "varlen", torch.device("cuda"), torch.bfloat16, width
    )
    assert (reason is None) == fits
    assert fits or reason.endswith(f"up to 256 in steps of 8, not {width}")


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
        monkeypatch.setattr(
            attention_module, "xformers_kernel_unavailable_reason", lambda *how: None
        )
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if installed else None
        )

    yield pretend
    fmha.cache_clear()
