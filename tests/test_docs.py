"""The pages tell the truth: commands parse, code compiles and runs, links lead somewhere, quoted
messages exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_house
import torch
from PIL import Image
from tiny import TINY
from torch import nn
from torch.utils.data import DataLoader

import dinofast
from dinofast import Config, DINOHead, RunFolder, cli, vit_nano
from dinofast.callbacks import HOOKS
from dinofast.commands import linear
from dinofast.commands.export import FORMATS
from dinofast.data.items import KEYS
from dinofast.presets import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "examples" / "README.md"]
SHELL = ("", "bash", "sh")
PLACEHOLDERS = {"N": "1", "X": "1", "DIR": ".", "FILE": "file", "CHECKOUT": "."}
TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_endpoint"}
# flags of programs that are not ours
OTHERS = TORCHRUN | {"--shm-size", "--save-results", "--runs", "--rehearse", "--dump_features"}
BRITISH = re.compile(
    r"\w*(?:centre|colour|grey|optimis|normalis|initialis|synchronis|solaris|behaviour|licence|labell|"
    r"materialis|neighbour|recognis|serialis|favour|learnt)\w*",
    re.IGNORECASE,
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), flags=re.S | re.M)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


# ---- commands
COMMANDS = [
    pytest.param(words, id=f"{name(page)}: {line[:60].strip()}")
    for page in PAGES
    for block in blocks(page, *SHELL)
    for line in block.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]


def parse(words: list[str]) -> None:
    """Through the real parser."""
    assert cli.parser(words[0] if words[0] in cli.COMMANDS else None).parse_args(words)


def check(words: list[str]) -> None:
    """Fail unless a command is one that somebody could give here."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    program, rest = words[0], words[1:]
    if program == "dinofast" or (program in ("python", "torchrun") and "dinofast" in rest):
        ours = rest if program == "dinofast" else rest[rest.index("dinofast") + 1 :]
        parse(ours)
        launcher = [] if program == "dinofast" else rest[: rest.index("dinofast")]
        assert {word.split("=")[0] for word in launcher if word.startswith("--")} <= TORCHRUN
    # of the official code: the same flags
    elif any(word.endswith("main_dino.py") for word in rest):
        parse(
            [
                "pretrain",
                *rest[
                    next(i for i, word in enumerate(rest) if word.endswith("main_dino.py")) + 1 :
                ],
            ]
        )
    elif program in ("python", "torchrun") and rest[0] == "-c":
        check_python(rest[1])
    elif program in ("python", "torchrun"):
        files = [
            word
            for word in rest
            if word.endswith(".py") or word.split("/")[0] in ("benchmarks", "docs", "examples")
        ]
        assert files and all(
            (ROOT / file).exists() for file in files if not file.startswith("./")
        ), files
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(
            re.search(f"^{target}:", makefile, flags=re.M) for target in rest if "=" not in target
        )
    elif program == "pip":
        assert rest[0] == "install"
    else:
        assert program == "source" and rest == [".venv/bin/activate"], (
            f"nothing is known of '{program}'"
        )


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one_that_can_be_given(words):
    check(words)


@cache
def flags() -> set[str]:
    """Of all commands of ours."""
    parsers = [
        cli.parser(command)._subparsers._group_actions[0].choices[command]
        for command in cli.COMMANDS
    ]
    return {
        flag for parser in parsers for action in parser._actions for flag in action.option_strings
    }


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_flags_and_commands_in_the_text_exist(page):
    code = re.findall(r"`([^`\n]+)`", prose(page))
    mentioned = {flag for words in code for flag in re.findall(r"(?<![\w-])--[\w-]+", words)}
    assert mentioned - OTHERS <= flags(), mentioned - OTHERS - flags()
    for words in code:
        if found := re.match(r"dinofast ([a-z][a-z-]*)", words):
            assert found[1] in cli.COMMANDS, words
        if found := re.match(r"make (\w+)", words):
            check(["make", found[1]])


# ---- code
def check_python(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dinofast":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_uses_what_exists(page):
    for block in blocks(page, "python"):
        check_python(block)


def migrating(words: str) -> str:
    """The one block of the page that has these words."""
    (block,) = (b for b in blocks(ROOT / "docs" / "migrating.md", "python") if words in b)
    return block


def test_the_loss_of_the_page_drops_in():
    names = {
        "student_output": torch.randn(20, 65536, requires_grad=True),
        "teacher_output": torch.randn(4, 65536),
        "epoch": 3,
    }
    exec(migrating("nepochs=100"), names)  # noqa: S102 - our own page
    names["loss"].backward()
    assert names["student_output"].grad.abs().sum() > 0 and names["dino_loss"].center.any()


def test_optimizer_and_average_of_the_page_run():
    student, teacher, start = (nn.Linear(3, 2) for _ in range(3))
    for copy in (teacher, start):
        copy.load_state_dict(student.state_dict())
    student(torch.ones(1, 3)).sum().backward()
    for words in ("optimizer.step(momentum=0.996)  #", "import ema_"):
        exec(migrating(words), {"student": student, "teacher": teacher})  # noqa: S102 - our own page
    for s, t, old in zip(
        student.parameters(), teacher.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(t - old, (1 - 0.996**2) * (s - old), rtol=0.02, atol=1e-7)


def test_the_accelerate_loop_of_the_page_runs():
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")
    crops = [[torch.randn(3, side, side) for side in (16, 16, 8, 8)] for _ in range(4)]
    student = nn.Sequential(vit_nano(), DINOHead(64, 16, hidden_dim=16, bottleneck_dim=8))
    names = {
        "student": student,
        "out_dim": 16,
        "ncrops": 4,
        "epochs": 2,
        "loader": DataLoader(crops, batch_size=2),
    }
    before = student[0].cls_token.detach().clone()
    exec(migrating("Accelerator()"), names)  # noqa: S102 - our own page
    assert not torch.equal(student[0].cls_token, before) and names["dino_loss"].center.any()
    assert not torch.equal(names["teacher"][0].cls_token, before)


class MyBackbone(nn.Module):
    """As docs/own_data.md names one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with what the page has: images, labeled images and an array; each of its runs is a
    small one."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in [f"{place}/{kind}" for place in ("images", "labeled") for kind in ("a", "b")]:
        (folder / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.jpg")
    np.save(folder / "slide.npy", rng.integers(0, 256, (300, 280, 3), dtype=np.uint8))
    few = {"epochs": 1, "warmup_epochs": 0, "batch_size_per_gpu": 8, "num_workers": 1}
    tiny = TINY.to_dict() | few | {"device": "cpu", "log_steps": 1, "eval_every": 1}
    for name in ("image_mean", "image_std", "preset", "config"):
        tiny.pop(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(dinofast, "Config", lambda **options: Config(**(tiny | options)))
        yield {"MyBackbone": MyBackbone}


OWN = blocks(ROOT / "docs" / "own_data.md", "python")


@pytest.mark.parametrize("block", OWN, ids=range(len(OWN)))
def test_code_of_the_page_on_data_of_one_s_own_runs(block, here, tmp_path):
    """Block by block in one namespace, into folders that are new."""
    if "from datasets" in block:
        pytest.importorskip("datasets", reason="datasets of Hugging Face is not installed")
    here.pop("features", None)
    exec(re.sub(r"runs/(?=\w)", f"{tmp_path}/", block), here)  # noqa: S102 - our own page
    assert here["run"].metrics and here["run"].metrics[-1]["train_loss"] > 0
    if "features = " in block:
        assert here["features"].shape == (100, 64)
    if "knn(" in block:
        assert set(here["accuracies"]) == {10, 20}
    if "trained = " in block:
        assert torch.equal(here["trained"].conv.weight, here["run"].teacher.conv.weight)


def test_names_of_the_page_on_data_of_one_s_own_are_those_of_the_code():
    text = prose(ROOT / "docs" / "own_data.md")
    assert set(re.findall(r"^\| `(on_\w+)\(", text, flags=re.M)) == set(HOOKS)
    assert ", ".join(f"`{key}`" for key in KEYS[:-1]) + f" or `{KEYS[-1]}`" in text
    for name in re.findall(r"`run\.(\w+)`", text):
        assert hasattr(RunFolder, name) or name == "path", name


def test_presets_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "training.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", page, flags=re.M))
    for name, options in PRESETS.items():
        given = re.findall(r"--(\w+)((?: [\d.]+)+)", rows[name])
        found = {key: tuple(map(float, values.split())) for key, values in given}
        wanted = {k: v if isinstance(v, tuple) else (v,) for k, v in options.items()}
        assert found == wanted, name


def test_formats_and_protocols_of_the_pages_are_those_of_the_code():
    exporting = (ROOT / "docs" / "exporting.md").read_text()
    assert re.findall(r"^dinofast export .*--format (\S+)", exporting, flags=re.M) == [*FORMATS]
    evaluating = (ROOT / "docs" / "evaluating.md").read_text()
    (protocol,) = (f for f in fields(linear.Options) if f.name == "protocol")
    for name in protocol.metadata["choices"]:
        assert re.search(rf"^\| `{name}`", evaluating, flags=re.M), name


def test_no_page_is_long():
    for page in DOCS:
        assert len(page.read_text().splitlines()) <= 370, page.name


def test_excerpts_of_the_kernel_page_are_those_of_the_code():
    files = [
        ROOT / "kernels" / "normalize.py",
        ROOT / "dinofast" / "ops" / "_normalize.py",
        ROOT / "dinofast" / "reference.py",
    ]
    code = {line.strip() for file in files for line in file.read_text().splitlines()}
    for block in blocks(ROOT / "docs" / "adding_a_kernel.md", "python"):
        for line in block.splitlines():
            assert line.strip() in code, line


def test_places_of_the_kernel_page_exist():
    text = prose(ROOT / "docs" / "adding_a_kernel.md")
    for path in re.findall(r"`((?:dinofast|kernels|csrc|tests|benchmarks)/[\w/.]+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    tests = (ROOT / "tests" / "ops" / "test_normalize.py").read_text()
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test


def test_the_map_of_the_code_is_that_of_the_package():
    page = ROOT / "docs" / "architecture.md"
    tree, order = (
        block for block in blocks(page, "text") if "dinofast/" in block or " > " in block
    )
    for line in tree.splitlines():
        folder = ROOT / "dinofast" if line.startswith("  ") else ROOT
        for path in re.findall(r"^\S+|[\w]+\.py\b|[\w]+/(?=,|$)", line.strip()):
            assert (folder / path.rstrip(",")).exists(), line
    layers = [set(layer.split(", ")) for layer in order.strip().split(" > ")]
    unnamed = {"__main__", "_C"}
    assert layers == [layer - unnamed for layer in reversed(test_house.LAYERS) if layer - unnamed]


# ---- links
def slug(heading: str) -> str:
    """As GitHub makes it of a heading."""
    words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)), (
                target
            )


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in DOCS:
        assert page.stem == "index" or (
            f"({page.name})" in index and f"\n{page.stem}\n" in index
        ), page.name


# ---- words
@pytest.mark.parametrize("page", [*DOCS, *sorted((ROOT / "examples").iterdir())], ids=name)
def test_spelling_is_american(page):
    if page.is_file():
        assert not BRITISH.findall(page.read_text())


@cache
def words_of_the_code() -> list[str]:
    """All string literals of the package; of an f-string what stands between its values."""
    found = []
    for path in (ROOT / "dinofast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "\0".join(
                        part.value if isinstance(part, ast.Constant) else "" for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    # options, as the command line shows them
    return [re.sub(r"`(\w+)`", r"--\1", text) for text in found]


@pytest.mark.parametrize(
    "message",
    re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M),
)
def test_messages_that_are_explained_exist(message):
    pieces = [piece.strip(" '") for piece in message.split("...")]
    assert any(all(piece in text for piece in pieces) for text in words_of_the_code()), message


# ---- the site
def test_the_site_builds(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install '.[docs]')")
    build = subprocess.run(
        (sys.executable, "-m", "sphinx", "-q", "-b", "html", ROOT / "docs", tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0 and not build.stderr, build.stderr
    api = (tmp_path / "api.html").read_text()
    for what in ("dinofast.DINOLoss", "dinofast.ops.normalize", "dinofast.reference.dino_loss"):
        assert f'id="{what}"' in api, what
