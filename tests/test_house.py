"""Rules of the house: layers, cheap import, sizes of files."""

import ast
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dinofast"
SERVICES = {"config", "config_file", "options", "presets", "schedule", "data"}
LAYERS = [
    {"_C", "runtime"},
    {"reference", "kernels"},
    {"ops"},
    {"loss", "optim"},
    {"nn"},
    {"checkpoint"},
    {"resume", "run_folder"},
    {"evaluate", "export"},
    {"step", "report"},
    {"introduce", "callbacks"},
    {"records"},
    {"train"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# the options, what checks them, and the version may be read from anywhere above
FREE = {"config", "config_file", "options", "presets", "validation", "dinofast"}


def files():
    return sorted(
        p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts[:-1]
    )


def test_files_of_the_data_path_import_each_other_in_no_circle():
    """Types included, as a person reads them."""
    graph = {}
    for path in (PACKAGE / "data").glob("*.py"):
        found = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        graph[path.stem] = {
            name
            for node in found
            for name in (
                [a.name for a in node.names]
                if node.module == "dinofast.data"
                else [node.module.removeprefix("dinofast.data.")]
                if node.module
                else []
            )
        }
    assert list(TopologicalSorter(graph).static_order())


def room(path: Path) -> str:
    """The layer's member a file belongs to: data/backend_pil.py belongs to data."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules of dinofast that a file imports, anywhere in it."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dinofast.")}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = list(inside[: len(inside) - node.level + 1]) + base
            elif base[0] != "dinofast":
                continue
            else:
                base = base[1:]
            found |= (
                {base[0]} if base else {a.name for a in node.names if not a.name.startswith("__")}
            )
    return found


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_point_down(path):
    me = room(path)
    if me in ("__init__", "_version"):
        return
    for other in imports(path) - {me} - FREE:
        if me in SERVICES:
            assert other in FREE | {"_C", "ops", "runtime"}, (
                f"{me} is a service and imports {other}"
            )
        elif other in SERVICES:
            assert level(me) >= level("checkpoint"), f"{me} imports the service {other}"
        else:
            assert level(other) < level(me), f"{me} imports {other}, which stands no lower"


def test_every_file_has_a_layer():
    rooms = {room(p) for p in files()} - {"__init__"} - SERVICES - FREE
    assert rooms <= set().union(*LAYERS)


def test_only_the_named_files_read_the_configuration():
    readers = {room(p) for p in files() if "config" in imports(p)} - {"__init__"}
    assert readers <= {
        "nn",
        "data",
        "schedule",
        "step",
        "introduce",
        "train",
        "records",
        "callbacks",
        "cli",
        "checkpoint",
        "resume",
        "config_file",
        "report",
        "commands",
        "evaluate",
        "export",
        "bench",
    }


def test_no_file_outgrows_its_room():
    others = (ROOT / name for name in ("kernels", "tests", "benchmarks", "examples"))
    others = [path for room in others for path in room.rglob("*.py")]
    for path in [*files(), *others, *(ROOT / "csrc").rglob("*.*")]:
        assert len(path.read_text().splitlines()) <= 450, path
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 200
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 80


def test_importing_has_no_effect():
    """Nothing beyond torch and numpy, no CUDA, no output, no thread."""
    code = textwrap.dedent("""\
        import sys, threading, dinofast
        from dinofast import DINOLoss, AdamWEMA, vit_small, Config, load_backbone, Model
        import torch
        assert not torch.cuda.is_initialized()
        late = {'PIL', 'triton', 'xformers', 'nvidia.dali', 'torchvision', 'timm'}
        assert late.isdisjoint(sys.modules), late & set(sys.modules)
        assert threading.active_count() == 1
        """)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


def test_plain_import_takes_no_notable_time():
    """It does not even import torch: that waits for the first name that is used."""
    code = "import sys, dinofast; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_scripts_beside_the_clone_find_the_package(tmp_path):
    """A folder named like the package, as a clone is, must not hide it."""
    (tmp_path / "dinofast" / "dinofast").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", "from dinofast import DINOLoss"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (
        f"{done.stderr}: install as the Makefile does, with --config-settings editable_mode=compat"
    )


def test_gpu_tests_are_marked_by_the_fixture_they_use(request):
    """All of this run: with the mark alone a test fails where there is no GPU, with the fixture
    alone it is not run on one."""
    for item in request.session.items:
        assert ("gpu" in item.fixturenames) == (item.get_closest_marker("gpu") is not None), (
            item.nodeid
        )


def test_a_run_of_the_gpu_tests_alone_finds_those_of_attention():
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/nn/test_attention.py",
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = [line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line]
    assert (
        set(found) == {"test_gpu_no_worse_than_eager", "test_gpu_compiled_is_the_same"}
        and len(found) > 80
    ), done.stdout
