"""What the networks of this package have in common, so that features can be taken and stages shared."""

from __future__ import annotations

from torch import Tensor, fx, nn


@fx.wrap  # one node of a trace: torch.fx cannot look into a comparison of shapes
def checked_images(x: Tensor, in_channels: int, name: str) -> Tensor:
    """`x`, or ValueError in the name of the network where it is not (N, in_channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"{name}: input has shape {tuple(x.shape)}, expected (N, {in_channels}, H, W)")
    return x


class Backbone(nn.Module):
    """A chain of named stages, pooled to one vector per image, and a linear classifier.

    Attributes:
        features: the stages, in the order in which they run.
        first_stage: name of the last of them before the resolution first falls inside the network's body: what peers
            share by default (`pyext.distill.peers`).
        classifier: from the pooled features to the classes.
        in_channels: channels of the images.

    Shape: (N, in_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: images of another shape.
    """

    features: nn.Sequential
    classifier: nn.Linear
    first_stage: str
    in_channels: int = 3

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return self.classifier.in_features

    def prepare(self, x: Tensor) -> Tensor:
        """Images as the first stage takes them; ValueError where they are not (N, in_channels, H, W)."""
        return checked_images(x, self.in_channels, type(self).__name__)

    def pool(self, maps: Tensor) -> Tensor:
        """(N, num_features) from the last stage's maps: their mean over positions."""
        return maps.mean(dim=(2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, num_features): what the classifier sees."""
        return self.pool(self.features(self.prepare(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.forward_features(x))
