"""What every peer computes, written as a user of plain PyTorch writes it.

Imported by the server scripts beside it, inside the peers' environments: nothing of the project is
there. Weights come as a state_dict; the variable `PEER_WEIGHTS` names its file.
"""

import io
import os

import torch
from PIL import Image
from torch import Tensor, nn

NUM_CLASSES = 1000
TOP_K = 5


class Perceptron(nn.Module):
    """784-128-64-10."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 784]` to logits `[N, 10]`."""
        return self.head(self.body(x))


def perceptron() -> nn.Module:
    """With the weights that were named."""
    return _with_weights(Perceptron())


def resnet() -> nn.Module:
    """ResNet-18 with the weights that were named."""
    import torchvision

    return _with_weights(torchvision.models.resnet18(num_classes=NUM_CLASSES))


class Preprocessing:
    """The transforms that torchvision documents for its networks."""

    def __init__(self) -> None:
        from torchvision import transforms

        self._transform = transforms.Compose(
            [
                transforms.Resize(256),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, picture: "bytes | Image.Image") -> Tensor:
        """An encoded or decoded picture to float32 `[3, 224, 224]`."""
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        return self._transform(image.convert("RGB"))


@torch.inference_mode()
def classify(network: nn.Module, batch: Tensor) -> list[dict[str, list]]:
    """`[N, 3, 224, 224]` to the five best classes of each picture."""
    best = network(batch).softmax(1).topk(TOP_K, dim=1)
    return [
        {"classes": classes, "probabilities": probabilities}
        for classes, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _with_weights(network: nn.Module) -> nn.Module:
    network.load_state_dict(torch.load(os.environ["PEER_WEIGHTS"], weights_only=True))
    return network.eval()
