"""The critic of adversarial training: real or reconstructed, judged patch by patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("group", "batch")
_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """PatchGAN (P. Isola et al., "Image-to-image translation with conditional adversarial networks", 2017).

    Strided 4 x 4 convolutions, each output a judgement of a patch of 70 x 70 pixels with three of them.

    Args:
        in_channels: image channels.
        channels: width of the first layer; each further one doubles it, up to eight times.
        num_layers: layers of stride 2.
        norm: "group", in which pictures do not see each other, so that a batch may be split over processes; or "batch",
            as in the official training.

    Shapes: (B, in_channels, H, W) in [-1, 1] -> (B, 1, h, w), positive for real.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3, norm: str = "group"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, num_layers + 1):
            before, width = width, channels * min(2**number, 8)
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(min(_GROUPS, width), width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


class PatchCritic:
    """A discriminator in training: what the loop trains beside a model, and against it.

    Attributes:
        network: the discriminator.
        learning_rate, betas: of its Adam; the rate follows the run's schedule.
    """

    betas = (0.5, 0.9)

    def __init__(self, network: PatchDiscriminator, learning_rate: float):
        self.network, self.learning_rate = network, learning_rate

    def loss(self, network: nn.Module, output: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the network descends, "critic_loss", and what it thinks of real and made pictures on average.

        Args:
            network: the discriminator as it was prepared for this run.
            output: (B, C, H, W), of the model, without gradient.
            batch: with the pictures as `pixel_values`.
        """
        real, fake = network(batch["pixel_values"]), network(output.float())
        return {"critic_loss": hinge_loss(real, fake), "critic_real": real.mean(), "critic_fake": fake.mean()}

    def opinion(self, output: Tensor) -> Tensor:
        """Mean judgement (), higher for what looks real, of pictures (B, C, H, W); only they get a gradient."""
        self.network.requires_grad_(False)
        judged = self.network(output).float().mean()
        self.network.requires_grad_(True)
        return judged


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic descends: (mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: nn.Parameter, mean) -> Tensor:
    """How much the adversarial loss must count to pull as hard on the last layer as the reconstruction loss.

    The ratio of the two gradients' norms at that layer, at most 10^4 (P. Esser, R. Rombach and B. Ommer, "Taming
    transformers for high-resolution image synthesis", 2021, equation 7).

    Args:
        reconstruction_loss, adversarial_loss: of one batch.
        last_layer: the weight that gives the picture; the ratio is 1 if it is not trained.
        mean: averages a tensor over the processes, so that they all take the ratio of the whole batch.

    Returns: () float32 without gradient.
    """
    if not last_layer.requires_grad:
        return torch.ones((), device=last_layer.device)
    losses = (reconstruction_loss, adversarial_loss)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in losses]
    ours, theirs = (mean(gradient).norm() for gradient in gradients)
    return (ours / (theirs + 1e-4)).clamp(max=1e4)
