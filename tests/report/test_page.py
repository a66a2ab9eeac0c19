"""The page of a run: complete, without network, and as a browser shows it."""

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny import TINY

from dinofast import RunFolder, cli, train

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine & yours"
    cfg = replace(
        TINY,
        data_path=str(photographs),
        output_dir=str(folder),
        batch_size_per_gpu=12,
        epochs=3,
        warmup_epochs=1,
        eval_every=1,
        log_steps=2,
        num_workers=0,
        device="cpu",
    )
    train(cfg)
    return train(replace(cfg, epochs=4))


@pytest.fixture(scope="module")
def page(run):
    assert cli.main(["report", str(run.path), "--device", "cpu"]) == 0
    return run.path / "report.html"


class Tags(HTMLParser):
    """Checks that every tag that is opened is closed, in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_whole_and_needs_nothing_else(page):
    text, tags = page.read_text(), Tags()
    tags.feed(text)
    assert tags.open == []
    assert not [t for t, _ in tags.seen if t in ("script", "link", "iframe")]
    sources = [about["src"] for _, about in tags.seen if "src" in about]
    assert len(sources) == 2 and all(s.startswith("data:image/webp;base64,") for s in sources)
    assert "http" not in re.sub(r"data:image[^\"]*", "", text)


def test_the_page_shows_what_the_run_did(page, run):
    text = page.read_text()
    for title in ("Results", "Scores", "Training", "What it learned", "Options", "Environment"):
        assert f"<h2>{title}</h2>" in text
    assert f"{run.metrics[-1]['train_loss']:.3f}" in text
    assert "mine &amp; yours" in text and "mine & yours" not in text
    assert "epochs: 3 became 4" in text and "after step 12" in text
    assert text.count("<svg") == 3 + 8
    pictures = re.findall(r"data:image/webp;base64,([^\"]+)", text)
    for data in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 500


def test_images_that_are_gone_leave_the_rest(run, tmp_path, capsys):
    shutil.copytree(run.path, tmp_path / "moved")
    path = tmp_path / "moved" / "config.yaml"
    path.write_text(re.sub("data_path: .*", "data_path: /nowhere", path.read_text()))
    assert cli.main(["report", str(tmp_path / "moved"), "--device", "cpu"]) == 0
    assert "no pictures of" in capsys.readouterr().out
    assert "No pictures: " in (tmp_path / "moved" / "report.html").read_text()


def test_several_runs_side_by_side(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "other")
    out = tmp_path / "both.html"
    words = ["report", str(run.path), str(tmp_path / "other"), "-o", str(out), "--pictures", "no"]
    assert cli.main(words) == 0
    text = out.read_text()
    assert text.count("<polyline") == 2 * 11 and "All options are alike" in text
    assert "<img" not in text


def test_a_file_of_another_kind_is_not_replaced(run, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert cli.main(["report", str(run.path), "-o", str(path)]) == 2
    assert "would be lost" in capsys.readouterr().err and path.read_text() == "mine"


def test_a_run_that_has_just_begun_has_a_page_and_a_folder_without_one_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert cli.main(["report", str(folder)]) == 2 and not list(folder.iterdir())
    shutil.copy(run.path / "config.yaml", folder)
    assert cli.main(["report", str(folder), "--pictures", "no"]) == 0
    assert (folder / "report.html").exists() and RunFolder(folder).metrics == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt install chromium)")
def test_a_browser_shows_the_page(page, tmp_path):
    """Every picture is loaded, every chart has a size, and nothing lies beyond the right edge."""
    probe = (
        "<script>onload = () => { const bad = [];"
        "for (const x of document.images) if (!x.complete || !x.naturalWidth) bad.push('img');"
        "for (const x of document.querySelectorAll('svg')) "
        "if (x.getBoundingClientRect().height < 100) bad.push('svg');"
        "if (document.documentElement.scrollWidth > innerWidth) bad.push('wide');"
        "document.title = 'probed ' + document.images.length + ' ' + "
        "document.querySelectorAll('svg').length + ' ' + bad.join(' '); }</script>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
    for width in (400, 1300):
        done = subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                *("--disable-component-update", f"--user-data-dir={tmp_path / str(width)}"),
                *(f"--window-size={width},900", "--dump-dom", probed.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "<title>probed 2 11 </title>" in done.stdout, done.stdout[:300]
