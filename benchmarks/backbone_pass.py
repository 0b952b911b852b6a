"""The child of `benchmarks.finetune`: one pass of a backbone over a folder of pictures, timed.

Reads and decodes every picture and computes its features, as a job does, and keeps nothing. Prints
the seconds; what came before, such as imports, does not count.
"""

import sys
import time
from pathlib import Path

import torch

from training.backbone import find_backbone
from training.config import DataConfig
from training.datasets import open_dataset
from training.features import features_of
from training.learner import Learner
from training.methods import FineTuneRequest
from training.progress import drive


def main(home: Path, pictures: Path, threads: int) -> None:
    """Print the seconds."""
    torch.set_num_threads(threads)
    base = "torchvision/mobilenet_v2"
    backbone = find_backbone(base, home)
    config = DataConfig.of(dataset=str(pictures), validation_fraction=0.0, test_fraction=0.0)
    request = FineTuneRequest.of(base=base, dataset=str(pictures))
    began = time.perf_counter()
    dataset = drive(open_dataset(config, backbone.preprocessing))
    learner = Learner(request, request.settings, backbone, dataset, home, lambda: False)
    network = learner.network()
    drive(features_of(network, dataset, torch.device("cpu")))
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
