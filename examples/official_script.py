"""The official training script, as it is in your checkout of facebookresearch/dino, with the loss
of dinofast.

    export DINO_OFFICIAL=CHECKOUT
    torchrun --nproc_per_node 8 examples/official_script.py --data_path DIR --output_dir runs

All flags are those of its main_dino.py, which needs torchvision, a GPU and, for its list of names,
the network. Its checkpoints stay as they are, those of before included: DINOLoss has the same
constructor, call and state.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import dinofast


def main() -> None:
    checkout = os.environ.get("DINO_OFFICIAL", "")
    if not Path(checkout, "main_dino.py").is_file():
        sys.exit(
            f"DINO_OFFICIAL is '{checkout}': name a checkout of facebookresearch/dino, the folder "
            "of main_dino.py."
        )
    sys.path.insert(0, checkout)
    import main_dino

    main_dino.DINOLoss = dinofast.DINOLoss  # the one line that matters
    options = argparse.ArgumentParser(parents=[main_dino.get_args_parser()]).parse_args()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    main_dino.train_dino(options)


if __name__ == "__main__":
    main()
