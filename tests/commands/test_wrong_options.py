"""What is typed wrong: one sentence, with the value and the way out; nothing is written."""

import os
import re

import pytest

from dinofast import cli
from dinofast.config import Config


@pytest.mark.parametrize(
    "line, words",
    [
        ("--epcohs 3", "there is no flag --epcohs. Did you mean --epochs?"),
        ("--epochs three", "--epochs: 'three' is not a whole number. See dinofast pretrain"),
        ("--epochs 1e2", "'1e2' is not a whole number: write 100."),
        ("--epochs 2.5", "'2.5' is not a whole number. "),
        ("--lr 0,001", "--lr: '0,001' is not a number: write 0.001."),
        ("--device cuda:1", "CUDA_VISIBLE_DEVICES=1 before the command chooses it"),
        (
            "--precision bfloat16",
            "invalid choice: 'bfloat16' (choose from bf16, fp16, fp32). Did you",
        ),
        ("--batchsize 64", "there is no flag --batchsize. Did you mean --batch_size_per_gpu?"),
        ("--gpus 8", "torchrun --nproc_per_node=8 -m dinofast pretrain ..."),
        ("--gpus=8", "torchrun --nproc_per_node=8 -m dinofast pretrain ..."),
        ("--devices 0,2", "CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc_per_node=2 -m dinofast"),
        ("--world-size", "torchrun --nproc_per_node=N -m dinofast pretrain ..."),
        ("--gpu 3", "CUDA_VISIBLE_DEVICES=3 before the command"),
        ("--temperature 0.1", "The temperatures are --student_temp and --teacher_temp."),
        (
            "--pretrained x.pth",
            "Weights to begin with are given by --init FILE; a run in --output_dir is gone on with",
        ),
        ("--weights x.pth", "Weights to begin with are given by --init FILE"),
        ("--config c.yaml", "--config 'c.yaml' cannot be read (No such file or directory)"),
        ("--num-heads 3", "The size of a ViT comes with its --arch"),
        ("--scheduler cosine", "The learning rate follows the official schedule: --warmup_epochs"),
        ("--eps 1e-8", "The rest of the optimizer is as in the official code"),
        ("--overwrite", "A run in --output_dir is resumed: give another folder"),
        ("--num_classes 10", "Labeled images to score on while training are given by --eval_data"),
        ("\u2014lr 1", "'\u2014lr' begins with a long dash, as text editors write it: type --lr."),
        ("\u2013-epochs 1", "begins with a long dash, as text editors write it: type --epochs."),
        ("-- base", "'-- base' has a space after the dashes, and there is no file 'base'"),
        ("-- lr 1", "write a flag as one word. Did you mean --lr?"),
        ("--epochs 5 --warmup_epochs 6", "--warmup_epochs is 6 but --epochs is only 5"),
        (
            "--epochs 20 --warmup_teacher_temp_epochs 30",
            "--warmup_teacher_temp_epochs is 30 but --epochs is only 20",
        ),
        ("--epochs 0", "--epochs is 0: it must be at least 1"),
        ("--norm_last_layer maybe", "'maybe' is not a boolean"),
        ("--optimizer adam", "invalid choice: 'adam'"),
        (
            "--global_crops_size 225",
            "--global_crops_size 225 is not a multiple of --patch_size 16: take 224 or 240",
        ),
        ("--local_crops_size 8", "take 16"),
        ("--patch_size 0", "--patch_size is 0"),
        ("--local_crops_number -1", "--local_crops_number is -1"),
        ("--global_crops_scale 0.5", "expected 2 arguments"),
        ("--global_crops_scale 1 0.4", "--global_crops_scale is 1.0 0.4"),
        ("--teacher_temp 0", "--teacher_temp is 0.0: it must be above 0"),
        ("--momentum_teacher 1.5", "--momentum_teacher is 1.5"),
        ("--drop_path_rate 1", "--drop_path_rate is 1.0"),
        ("--lr nan", "--lr is nan"),
        ("--arch vit_smal", "--arch 'vit_smal' is not known"),
        (
            "--epochs 2000000000 --warmup_epochs 0",
            "--epochs is 2000000000: it must be at most 1000000",
        ),
        ("--out_dim 99999999999", "--out_dim is 99999999999"),
        ("stray", "stray and --data_path"),
        ("--batch_size 8", "there is no flag --batch_size. Did you mean --batch_size_per_gpu?"),
        ("--learning-rate 1", "Did you mean --lr?"),
        ("--image_size 96", "Did you mean --global_crops_size?"),
        ("--resume x.pth", "A run in --output_dir is resumed by the same command, without a flag."),
        ("--use_fp16", "--use_fp16 stands alone: write true or false behind it."),
        ("--lr", "--lr stands alone: write a value behind it."),
        ("--out_dim 1", "--out_dim is 1: it must be at least 2"),
        ("--lr -1e-3", "--lr is -0.001: it must not be negative"),
    ],
)
def test_what_cannot_be_right_is_said_in_one_sentence(line, words, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    assert (
        cli.main(
            [
                "pretrain",
                "--data_path",
                str(folder),
                "--output_dir",
                str(tmp_path / "out"),
                *line.split(),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("dinofast: ")
    assert not (tmp_path / "out").exists()  # nothing was allocated or written


@pytest.mark.parametrize(
    "line, words",
    [
        ("knn D", "--pretrained_weights is missing: a run's folder, or weights: of dinofast"),
        ("knn D", "Usage: dinofast knn DIR --pretrained_weights FILE [flags]\n"),
        ("knn D D/list.txt", "write --pretrained_weights "),
        ("knn D D/run", "write --pretrained_weights /"),
        ("knn D E", "DIR is '/"),
        ("knn D --pretrained_weights x --dump_features y", "Features are computed anew each time"),
        (
            "knn D --pretrained_weights https://x.com/y.pth",
            "is an address: download the file first",
        ),
        ("show-crops D --output x.png", "The picture is written to -o FILE."),
        ("embed D --output x.npz --pretrained_weights x", "The result is written to -o FILE."),
        ("embed D --pretrained_weights x -o x.csv", "--features is 'x.csv': let its name end in"),
        ("retrieve D --pretrained_weights x --queries y", "--queries: there is no file 'y'"),
        ("extract-features D", "dinofast embed writes the features of images into a file."),
        ("search D", "dinofast retrieve draws nearest neighbors."),
        ("visualize_attention D", "dinofast segment draws attention and patches"),
        ("eval_video_segmentation D", "dinofast davis segments the videos of DAVIS 2017."),
        ("pretrain D out=runs", "'out=runs': options are written with dashes, --name value."),
        ("knn D --weights x", "Did you mean --pretrained_weights?"),
        ("knn --nb_knn 1 2 D --pretrained_weights x", "a folder stands before the flags"),
        ("pretrain D D E", "' and 1 more cannot be taken as well: DIR is '"),
        ("pretrain D lr=0.1", "'lr=0.1' is a flag without its dashes: write --lr 0.1."),
        ("pretrain D epochs 5", "'epochs' is a flag without its dashes: write --epochs."),
        ("pretrain D --output_dir=", "--output_dir is an empty word, as a variable that is not"),
        ("knn D --pretrained_weights=", "--pretrained_weights is an empty word"),
        ("pretrain |", "DIR is an empty word, as a variable that is not set gives one."),
        ("pretrain ~/none", "the shell left its ~ alone; write /"),
        ("pretrain s3://bucket/x", "only files of this machine are read"),
        ("pretrain D/*.jpg", "give the folder itself; all images below it are found"),
        ("pretrain D/lsit.txt", "/list.txt'?"),
        ("doctor x", "'x' is too much: dinofast doctor takes flags alone"),
        ("D", "' is a path, not a command: dinofast pretrain /"),
        ("infer D", "there is no command infer. dinofast embed writes the features"),
        ("onnx D", "there is no command onnx. dinofast export RUN writes a trained backbone"),
        ("export D", "--format is missing: what to write. Usage: dinofast export RUN --format"),
        ("export D --format onnx --out x", "The result is written to -o FILE."),
        ("--lr 1 pretrain D", "the command comes first: dinofast pretrain ... --lr ..."),
        ("show_crops D", "Did you mean show-crops?"),
        ("sample-data D/list.txt", "is a file: give a folder."),
        ("demo --output_dir D/list.txt/x", "is a file: give a folder."),
        ("pretrain D --output_dir D/list.txt", "is a file: give a folder."),
        ("show-crops D -o D/none/x.png", "but there is no folder '"),
        ("knn D --pretrained_weights x --json D/none/x.json", "but there is no folder '"),
        ("knn D --pretrained_weights x --json D", ", a folder: name a file in it."),
        ("knn D --pretrained_weights x --json /proc/x.json", ", which cannot be written (No such"),
    ],
)
def test_a_command_line_as_strangers_type_it(tmp_path, capsys, line, words):
    """`|`: an empty word."""
    (tmp_path / "list.txt").write_text("a.jpg\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").touch()
    given = [re.sub("^D", str(tmp_path), word.strip("|")) for word in line.split()]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("dinofast: ")
    assert sorted(os.listdir(tmp_path)) == ["list.txt", "run"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample-data {} --n_images 3", "--n_images is 3: take at least 40"),
        ("sample-data {} --size 3", "--size is 3 pixels"),
        ("check-data {} --delete_list {}", "--delete_list is '"),
    ],
)
def test_messages_of_other_commands_name_their_flags(line, words, tmp_path, capsys):
    assert cli.main([word.format(tmp_path) for word in line.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": "3"}, "`epochs` is '3': give a whole number"),
        ({"lr": "0.1"}, "`lr` is '0.1': give a number"),
        ({"global_crops_scale": 0.4}, "`global_crops_scale` is 0.4: give 2 numbers"),
        ({"out_dim": 64.0}, "`out_dim` is 64.0"),
        ({"norm_last_layer": 1}, "`norm_last_layer` is 1: give True or False"),
        ({"precision": 16}, "`precision` is 16: give a word"),
    ],
)
def test_options_of_the_wrong_type(options, words):
    with pytest.raises(ValueError, match=words.replace(".", "[.]")):
        Config(**options).check()
    assert Config(global_crops_scale=[0.4, 1], lr=1).check().global_crops_scale == (0.4, 1)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--temperature nan", "--temperature is nan"),
        ("--crop 0", "--crop is 0"),
        ("--nb_knn 0", "--nb_knn is 0"),
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu is 0"),
        ("--num_workers -1", "--num_workers is -1"),
    ],
)
def test_knn_options_that_cannot_be_right(line, words, capsys, tmp_path):
    assert (
        cli.main(
            ["knn", "--data_path", str(tmp_path), "--pretrained_weights", "none.pth", *line.split()]
        )
        == 2
    )
    assert words in capsys.readouterr().err
