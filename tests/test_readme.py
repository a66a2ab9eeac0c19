"""README tells the truth: tables are those of the results, commands and names exist."""

import ast
import re
from pathlib import Path

import pytest
import report
import tables

import dinofast
from dinofast import cli

ROOT = Path(__file__).parent.parent
# a command may go on in the next line
TEXT = (ROOT / "README.md").read_text().replace("\\\n", "")


def test_tables_and_chart_are_rendered_from_the_results():
    pages = {page: (ROOT / page).read_text() for page in report.PAGES}
    assert report.render(pages) == pages, "run python benchmarks/report.py"
    assert report.bars() == (tables.RESULTS / "images_per_s.svg").read_text(), (
        "run python benchmarks/report.py"
    )


def test_each_table_stands_once():
    with pytest.raises(ValueError, match="have 0 places for the table 'headline'"):
        report.render(dict.fromkeys(report.PAGES, ""))


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    "line", re.findall(r"^(?:torchrun .* -m )?dinofast (.*?)(?: +#.*)?$", TEXT, flags=re.M)
)
def test_commands_parse(line):
    line = re.sub(r"DIR|runs/mine\S*", ".", line)
    assert cli.parser(line.split()[0]).parse_args(line.split())


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", TEXT, flags=re.M)):
        assert re.search(f"^{target}:", makefile, flags=re.M), target


def test_python_examples_use_what_exists():
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "dinofast":
                assert all(hasattr(dinofast, a.name) for a in node.names)


def test_drop_in_of_the_readme_runs():
    import torch

    block = next(
        b for b in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S) if "= DINOLoss(" in b
    )
    names = {
        "student_output": torch.randn(20, 65536, requires_grad=True),
        "teacher_output": torch.randn(4, 65536),
        "epoch": 3,
        "device": "cpu",
    }
    exec(block, names)  # noqa: S102 - our own README
    names["loss"].backward()
    assert names["student_output"].grad.abs().sum() > 0 and names["dino_loss"].center.any()


def test_optimizer_of_the_readme_runs():
    import copy

    import torch

    (block,) = (b for b in re.findall(r"```python\n(.*?)```", TEXT, flags=re.S) if "AdamWEMA" in b)
    student = torch.nn.Linear(3, 2)
    teacher, start = copy.deepcopy(student), copy.deepcopy(student)
    student(torch.ones(1, 3)).sum().backward()
    names = {"student": student, "teacher": teacher}
    exec(block, names)  # noqa: S102 - our own README
    assert [group["weight_decay"] for group in names["optimizer"].param_groups] == [0.04, 0.0]
    for s, t, old in zip(
        student.parameters(), teacher.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(t - old, (1 - 0.996) * (s - old), rtol=0.02, atol=1e-7)


def test_the_front_page_is_short():
    assert len(TEXT.split()) <= 900
