"""A small classifier of images, which judges completions, or says how far the observed pixels settle the class."""

from torch import Tensor, nn
from torch.nn.functional import dropout

FEATURES, DROPOUT = 64, 0.2


class Classifier(nn.Module):
    """p(class | the pixels of a mask): a convolutional network of 90,000 weights that sees these pixels, others black.

    observed: bool `[height, width]`, True = seen; kept with the weights. num_classes: K.
    """

    observed: Tensor

    def __init__(self, observed: Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("observed", observed)
        self.convolutions = nn.Sequential(
            *(halving(1, 16, 5), halving(16, 32, 3), halving(32, 64, 3)),
            nn.AdaptiveAvgPool2d(4),  # changes nothing of images of 28×28
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * 4 * 4, FEATURES)
        self.last = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees of images `[B, height, width]` in [0, 1]: `[B, FEATURES]`."""
        features: Tensor = self.hidden(self.convolutions((images * self.observed)[:, None])).relu()
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits `[B, K]` of the classes, from the features."""
        logits: Tensor = self.last(dropout(features, DROPOUT, self.training))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K]` of the classes of images `[B, height, width]` in [0, 1]."""
        return self.classify(self.features(images))


def halving(inner: int, outer: int, size: int) -> nn.Sequential:
    """A convolution that halves both sides, normalised over the batch."""
    convolution = nn.Conv2d(inner, outer, size, stride=2, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outer), nn.ReLU())
