"""A page about a run, or several side by side: curves, scores, what the network looks at and takes
for alike before and after, options, bad files. One HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from ..config import option
from ..runtime.terminal import say
from ..validation import check_output


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tuple[str, ...] = option(
        MISSING,
        "Folders of runs, as `output_dir` of pretrain named them.",
        metavar="RUN",
        positional=True,
        nargs="*",
    )
    page: str | None = option(
        None,
        "The page.",
        flags=("-o",),
        metavar="FILE",
        shown="report.html in the folder of the first run",
    )
    pictures: bool = option(
        True, "Also pictures of the training images before and after, where the images are."
    )
    device: str | None = option(
        None, "Where features are computed.", choices=("cuda", "cpu"), shown="a GPU if there is one"
    )


def run(options: Options) -> None:
    from ..report.page import page as page_of
    from ..run_folder import RunFolder
    from .results import write_text

    runs = [RunFolder(path) for path in options.runs]
    path = options.page or str(runs[0].path / "report.html")
    check_output("page", path)
    text = page_of(runs, options.pictures, options.device, log=say)
    write_text(path, text)
    say(f"wrote '{path}' ({len(text) / 1e6:.1f} MB): open it in a browser")
