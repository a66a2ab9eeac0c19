"""An H100 that is not there: enough of one for fake tensors, torch.compile and Inductor's
scheduler, not for a number.

`device.cpp`, built as a library, must be there before torch is: `enter` starts the script anew with
it, unless it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="",
    pci_bus_id=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)
DEVICE = torch.device("cuda", 0)
ENTERED = "DINOFAST_FAKE_CUDA"


def why_not() -> str:
    """Why fake tensors cannot be on a GPU here; empty if they can."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda:
        return (
            "this torch is built for CUDA, and its own device guard wants a driver: a torch "
            "for CPUs, or a GPU, will do"
        )
    if sys.platform != "linux":
        return "a library is loaded before torch as Linux does it"
    return "" if shutil.which("g++") else "there is no C++ compiler (g++)"


def build(folder: Path) -> Path:
    """The library of device.cpp."""
    library, torch_dir = folder / "device.so", Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            abi,
            f"-I{torch_dir / 'include'}",
            Path(__file__).with_name("device.cpp"),
            "-o",
            library,
            f"-L{torch_dir / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
        ],
        check=True,
    )
    return library


def environment(folder: Path) -> dict[str, str]:
    """In which a process finds the device, built in this folder; where there is a GPU, its own will
    do."""
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.cuda.is_available():
        return usual
    library_path = Path(torch.__file__).parent / "lib"
    return usual | {
        "LD_PRELOAD": str(build(folder)),
        "LD_LIBRARY_PATH": str(library_path),
        ENTERED: "1",
    }


def enter() -> None:
    """To be called first by a script."""
    if not torch.cuda.is_available() and ENTERED not in os.environ:
        if reason := why_not():
            sys.exit(reason)
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(
                subprocess.run(
                    [sys.executable, *sys.argv], env=environment(Path(folder))
                ).returncode
            )
    pretend()


def pretend() -> None:
    """Let torch's Python side believe in the device."""
    if torch.cuda.is_available():
        return
    import torch._subclasses.fake_tensor as fake_tensor

    state, tensor = torch.zeros(16, dtype=torch.uint8), torch.tensor

    def full_of(data, **options):  # torch would fill the device's memory
        return (
            torch.full((), data, **options)
            if isinstance(data, (int, float))
            else tensor(data, **options)
        )

    torch.tensor = full_of
    fake_tensor.init_gpu_context = lambda device: None
    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: True
    torch.cuda._lazy_init = lambda: None
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.set_device = lambda device: None
    torch.cuda._exchange_device = lambda index: 0
    # of its own: the compiler knows each by itself
    torch.cuda._maybe_exchange_device = lambda index: 0
    torch.cuda.is_bf16_supported = lambda *args, **options: True
    torch.cuda.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    torch.cuda.get_device_name = lambda device=None: PROPERTIES.name
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    torch.cuda.manual_seed_all = lambda seed: None
    torch.cuda.get_rng_state = lambda *args: state
    torch.cuda.set_rng_state = lambda *args: None
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
