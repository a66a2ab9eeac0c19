"""Completion in real shells."""

import shutil
import subprocess

import pytest

from dinofast import cli


def script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words, found",
    [
        ("dinofast pre", {"pretrain"}),
        ("dinofast ", set(cli.COMMANDS)),
        ("dinofast knn --check", {"--checkpoint_key"}),
        ("dinofast knn --checkpoint_key ", {"teacher", "student", "untrained"}),
        ("dinofast pretrain --preset t", {"tiny"}),
        ("dinofast pretrain --exif f", {"false"}),
        ("dinofast pretrain fold", set()),
    ],
)
def test_bash_completes(words, found, capsys):
    bash = shutil.which("bash")
    given = words.split(" ")
    quoted = " ".join(f"'{word}'" for word in given)
    code = (
        f"{script('bash', capsys)}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(given) - 1}; _dinofast; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "-c", code], capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) == found, done.stderr


def test_zsh_takes_the_script_of_bash(capsys):
    said = script("zsh", capsys)
    assert "\nautoload -U +X bashcompinit && bashcompinit\n" in said
    if zsh := shutil.which("zsh"):
        done = subprocess.run([zsh, "-fc", said], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here (apt install fish)")
def test_fish_completes(capsys):
    code = script("fish", capsys) + '\ncomplete -C "dinofast knn --checkpoint_key "'
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, timeout=60)
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} >= {"teacher", "student"}


def test_fish_lines_are_quoted(capsys):
    lines = script("fish", capsys).splitlines()
    assert all(line.startswith("complete -c dinofast ") for line in lines if line)
    assert all(line.replace("\\'", "").count("'") % 2 == 0 for line in lines)


def test_another_shell_is_refused(capsys):
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
