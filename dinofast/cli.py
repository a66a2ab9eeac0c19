"""The command line: `dinofast pretrain | knn | show-crops | bench-data | bench-step | sample-data | demo | doctor`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import add_arguments, from_arguments, nearest, parse_bool

USAGE, INTERRUPTED = 2, 128                                   # exit codes; a signal's number is added to the second


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the nearest right word, instead of printing the whole usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")

    def parse_known_args(self, args=None, namespace=None):          # type: ignore[override]
        namespace, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                flag, flags = word.split("=")[0], [name for action in self._actions for name in action.option_strings]
                raise ValueError(f"there is no flag {flag}.{nearest(flag, flags)} See {self.prog} --help.")
        return namespace, unknown


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed midway, 2 a wrong option, path or file, 128 + n ended by signal n."""
    # libgomp's threads spin while they wait. On few cores, or beside anything else that runs, they take the time from each
    # other and from the data workers: 25 instead of 246 images/s in the demo on 2 shared cores (2026-11-23). Torch's import
    # reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        options = vars(_parser().parse_args(argv))
        run: Callable[[dict[str, Any]], None] = options.pop("run")
        run(options)
    except ValueError as error:
        return _say(f"dinofast: {error}", USAGE)
    except (OSError, RuntimeError) as error:
        from .runtime.progress import Diverged
        from .train import WorkerDied

        if not isinstance(error, Diverged | WorkerDied | OSError):
            raise                                                   # a fault of ours, or of torch: the traceback is worth more
        return _say(f"dinofast: {error}", 1)
    except KeyboardInterrupt as error:                               # `Interrupted`, or one in the middle of things
        return _say(str(error) or "dinofast: ended at once; what was last saved stands.",
                    INTERRUPTED + getattr(error, "signum", signal.SIGINT))
    return 0


def _say(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    if rank == "0" or code in (1, USAGE):                           # of an orderly stop one process speaks for all
        print(text if rank == "0" else f"process {rank}: {text}", file=sys.stderr, flush=True)
    return code


def _parser() -> Parser:
    parser = Parser(prog="dinofast", description="DINO pretraining (arXiv 2104.14294), exactly as published and fast.")
    parser.add_argument("--version", action="version", version=f"dinofast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pretrain = commands.add_parser(
        "pretrain", help="train a backbone on a folder of images without labels",
        description="Train a backbone on a folder of images without labels. A run found in --output_dir is resumed.\n\n"
        "recipes:\n"
        "  vanilla    --data_path DIR\n"
        "  boosted    --epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer false\n"
        "  ResNet-50  --arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4\n"
        "             --global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14\n"
        "  small data (thousands of images): --out_dim 4096 --momentum_teacher 0.99 --warmup_teacher_temp 0.03\n\n"
        "several GPUs: torchrun --nproc_per_node N -m dinofast pretrain ...")
    add_arguments(pretrain)
    pretrain.set_defaults(run=_pretrain)

    knn = commands.add_parser("knn", help="k-NN accuracy of a checkpoint on labelled folders",
                              description="Weighted k-NN classification of frozen features, the protocol of the official "
                              "eval_knn.py.")
    knn.add_argument("--pretrained_weights", required=True, metavar="FILE",
                     help="A checkpoint of dinofast or of the official code.")
    knn.add_argument("--data_path", required=True, metavar="DIR",
                     help="Folder with train/ and val/ holding class folders, or class folders alone: "
                     "then every fourth image of a class is held out.")
    knn.add_argument("--checkpoint_key", default="teacher", help="teacher or student (default: teacher)")
    knn.add_argument("--arch", help="Only where the checkpoint does not tell its architecture.")
    knn.add_argument("--patch_size", type=int, help="Likewise.")
    knn.add_argument("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="K", help="(default: 10 20 100 200)")
    knn.add_argument("--temperature", type=float, default=0.07,
                     help="Of the votes, exp(similarity / temperature) (default: 0.07)")
    knn.add_argument("--resize", type=int, help="Shorter side before the centre crop, in pixels (default: 8/7 of --crop)")
    knn.add_argument("--crop", type=int, help="Side of the centre crop, in pixels (default: the global crops' in training, "
                     "224 for official checkpoints)")
    knn.add_argument("--batch_size_per_gpu", type=int, default=128, help="(default: 128)")
    knn.add_argument("--num_workers", type=int, default=10, help="(default: 10, at most one per core)")
    knn.add_argument("--device", choices=("cuda", "cpu"), help="(default: a GPU if there is one)")
    knn.add_argument("--use_cuda", type=parse_bool, help=argparse.SUPPRESS)     # official name, says where features are kept
    knn.set_defaults(run=_knn)

    show = commands.add_parser("show-crops", help="a picture of what the network sees",
                               description="Draw the first images of an epoch and their crops into a PNG, with what was drawn "
                               "for each. Takes the flags of pretrain.")
    show.add_argument("folder", metavar="DIR", help="images, as --data_path of pretrain")
    show.add_argument("-o", dest="sheet", default="crops.png", metavar="FILE", help="(default: crops.png)")
    show.add_argument("--n_images", type=int, default=4, metavar="N", help="(default: 4)")
    show.add_argument("--epoch", type=int, default=0, metavar="N", help="counted from 0 (default: 0)")
    add_arguments(show)
    show.set_defaults(run=_show_crops)

    bench = commands.add_parser("bench-data", help="whether the data keeps up with a GPU",
                                description="Measure the data path alone: images/s, their CPU time by stage, and whether that "
                                "keeps up with a training speed. Takes the flags of pretrain and writes nothing.")
    bench.add_argument("folder", metavar="DIR", help="images, as --data_path of pretrain")
    bench.add_argument("--seconds", type=float, default=10.0, metavar="X", help="of the measurement, at least (default: 10)")
    bench.add_argument("--images_per_second", "--images-per-second", type=float, metavar="X",
                       help="speed of training to keep up with (default: says up to which speed the data would be enough)")
    add_arguments(bench)
    bench.set_defaults(run=_bench_data)

    speed = commands.add_parser("bench-step", help="images/s of a training step here, and the official loop beside it",
                                description="Time the whole training step on random crops, and on images if a folder is given: "
                                "images/s, MFU, where the time goes, and the official loop, in turns. Takes the flags of "
                                "pretrain and writes nothing.")
    speed.add_argument("folder", metavar="DIR", nargs="?", help="images, as --data_path of pretrain, which does as well")
    speed.add_argument("--seconds", type=float, default=30.0, metavar="X", help="of the measurement, at least (default: 30)")
    add_arguments(speed)
    speed.set_defaults(run=_bench_step)

    sample = commands.add_parser("sample-data", help="write a small labelled data set to try things on",
                                 description="Write ordinary JPEG files in class folders: objects of ten kinds on cluttered "
                                 "ground.")
    sample.add_argument("folder", metavar="DIR")
    sample.add_argument("--n_images", type=int, default=4000, help="(default: 4000)")
    sample.add_argument("--size", type=int, default=48, help="Side in pixels (default: 48)")
    sample.add_argument("--seed", type=int, default=0, help="(default: 0)")
    sample.set_defaults(run=_sample_data)

    demo = commands.add_parser("demo", help="pretrain a small ViT on the sample data and show what it learnt")
    demo.add_argument("--output_dir", metavar="DIR", help="(default: runs/demo, or runs/demo-seedN for another seed than 0)")
    demo.add_argument("--seed", type=int, default=0, help="(default: 0)")
    demo.add_argument("--device", choices=("cuda", "cpu"), help="(default: a GPU if there is one)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="what is installed, and which path each part takes")
    doctor.set_defaults(run=_doctor)
    return parser


def _pretrain(given: dict[str, Any]) -> None:
    if "data_path" not in given:
        raise ValueError("--data_path is missing: give a folder of images or .tar shards, or a text file of their paths.")
    cfg = from_arguments(given)
    if not os.path.exists(cfg.data_path) and "{" not in cfg.data_path:  # a pattern; before torch is even imported
        raise ValueError(f"--data_path '{cfg.data_path}' does not exist: give a folder of images or .tar shards, or a text "
                         "file of their paths.")
    if Path(cfg.output_dir).exists() and not Path(cfg.output_dir).is_dir():
        raise ValueError(f"--output_dir '{cfg.output_dir}' is a file: give a folder.")
    from .train import train

    train(cfg)


def _show_crops(given: dict[str, Any]) -> None:
    folder, sheet, n_images, epoch = (given.pop(name) for name in ("folder", "sheet", "n_images", "epoch"))
    for name, value, least in (("n_images", n_images, 1), ("epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"--{name} is {value}: give {least} or more.")
    cfg = from_arguments(given | {"data_path": folder})
    from .show_crops import write

    shown = write(cfg, Path(sheet), n_images, epoch)
    print(f"{shown} image(s) and their {cfg.n_crops} crops each in '{sheet}'")


def _bench_data(given: dict[str, Any]) -> None:
    folder, seconds, wanted = (given.pop(name) for name in ("folder", "seconds", "images_per_second"))
    for name, value in (("seconds", seconds), ("images_per_second", 1.0 if wanted is None else wanted)):
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value:g}: give a number above 0.")
    cfg = from_arguments(given | {"data_path": folder})
    from .bench.data import measure, report

    print(report(measure(cfg, seconds), wanted))


def _bench_step(given: dict[str, Any]) -> None:
    folder, seconds = given.pop("folder") or given.get("data_path"), given.pop("seconds")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds is {seconds:g}: give a number above 0.")
    cfg = from_arguments(given)
    from .bench.step import measure

    print(measure(cfg, folder, seconds, partial(print, flush=True)))


def _knn(options: dict[str, Any]) -> None:
    from .evaluate.knn import knn

    options.pop("use_cuda")
    knn(**options)


def _sample_data(options: dict[str, Any]) -> None:
    from .sample_data import write

    write(**options)
    folder = options["folder"]
    print(f"{options['n_images']} images in '{folder}': train/ and val/ with class folders, masks/ of the objects; "
          f"pretrain --data_path {os.path.join(folder, 'train')}, then knn --data_path {folder}")


def _demo(options: dict[str, Any]) -> None:
    from .demo import run

    run(**options)


def _doctor(options: dict[str, Any]) -> None:
    from .doctor import report

    with contextlib.suppress(BrokenPipeError):
        print(report())
