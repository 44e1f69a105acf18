"""Pixle (Pomponi et al. 2022): a black-box attack that copies the pixels of a patch to random places of the image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toughen.attacks.probabilities import probabilities
from toughen.errors import InputError
from toughen.layers.taps import buffers_kept, mode, random_state_kept


@dataclass(frozen=True, kw_only=True)
class Pixle:
    """Search for pixel copies that lower the probability of the true class, by trial; nothing but the output is used.

    This is the random mapping of the paper. A candidate takes a random patch of the original image and copies each of
    its pixels to a random place of the best image so far; ``iterations`` candidates are made from the same best image,
    then the one with the smallest p_y, if it is smaller than ever, becomes the new best image, and so on ``restarts``
    times. The first candidate with another label ends the search of its image.

    Differences from the public port (torchattacks): all images of a chunk are searched at once, each with its own
    patches; without any improvement so far the best image stays, where the port goes on from its last candidate; a
    destination is (row, column) on non-square images too; the last row and column are drawn like all others; of pixels
    copied to one place the last in the patch wins, on every device.

    Args:
        x_dims: Smallest and largest width of the patch in pixels, at least 1; a patch is cut off at the border.
        y_dims: The same for its height.
        restarts: How often the best image is renewed, at least 1.
        iterations: Candidates for each restart, at least 1. (The port's default is 100.)

    Raises:
        InputError: A setting is out of its range.
    """

    x_dims: tuple[int, int] = (2, 10)
    y_dims: tuple[int, int] = (2, 10)
    restarts: int = 20
    iterations: int = 10

    def __post_init__(self) -> None:
        for name, dims in (("x_dims", self.x_dims), ("y_dims", self.y_dims)):
            whole = len(dims) == 2 and all(isinstance(size, int) for size in dims)
            if not (whole and 1 <= dims[0] <= dims[1]):
                raise InputError(
                    f"Pixle {name} is {dims!r}; it must be the smallest and the largest size of the patch, "
                    "two whole numbers of pixels >= 1 in this order"
                )
        for name, value in (("restarts", self.restarts), ("iterations", self.iterations)):
            if value < 1:
                raise InputError(f"Pixle {name} is {value}; it must be at least 1")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return x_adv and leave the model exactly as found.

        Args:
            model: Maps [B, C, H, W] images to [B, K] logits.
            x: [B, C, H, W], float.
            y: [B], int64 labels.
            generator: On the device of ``x``. What is drawn for an image depends on its place in the batch and on the
                size of the batch, not on the other images.

        Returns:
            [B, C, H, W], detached: each pixel is one of the same image. Images that the model gets wrong, and those
            where nothing lowered p_y, are returned as they are.
        """
        with torch.no_grad(), mode(model, training=False), buffers_kept(model), random_state_kept(model):
            return self._search(model, x.detach(), y, generator)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        source = torch.arange(x[0, 0].numel(), device=x.device).repeat(len(x), 1)  # which pixel each place shows
        smallest, fooled = _true_probability(model, x, y)
        best = source.clone()
        for _ in range(self.restarts):
            for _ in range(self.iterations):
                taken, put = self._copies(x, generator)
                left = (~fooled).nonzero().squeeze(1)
                if not len(left):
                    return _shown(x, best)
                candidate = _copied(source[left], taken[left], put[left])
                p, fools = _true_probability(model, _shown(x[left], candidate), y[left])
                better = fools | (p < smallest[left])
                kept = left[better]
                best[kept], smallest[kept], fooled[kept] = candidate[better], p[better], fools[better]
            source = best.clone()
        return _shown(x, best)

    def _copies(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw which pixels to take and where to put them, [B, n] each, n the largest patch; -1 none."""
        height, width = x.shape[-2:]
        n = self.x_dims[1] * self.y_dims[1]
        patch = torch.rand(len(x), 4, 1, generator=generator, device=x.device)
        places = torch.rand(len(x), 2, n, generator=generator, device=x.device)
        row, column = _below(patch[:, 0], height), _below(patch[:, 1], width)  # its upper left corner, [B, 1]
        rows = (self.y_dims[0] + _below(patch[:, 2], self.y_dims[1] - self.y_dims[0] + 1)).minimum(height - row)
        columns = (self.x_dims[0] + _below(patch[:, 3], self.x_dims[1] - self.x_dims[0] + 1)).minimum(width - column)
        inside = torch.arange(n, device=x.device).expand(len(x), -1)  # counts the pixels of a patch row by row
        taken = (row + inside // columns) * width + column + inside % columns
        put = _below(places[:, 0], height) * width + _below(places[:, 1], width)
        return torch.where(inside < rows * columns, taken, -1), put


def _below(uniform: Tensor, n: int) -> Tensor:
    """Turn numbers of [0, 1) into whole ones of 0 to n - 1, equally likely."""
    return (uniform * n).long()


def _copied(source: Tensor, taken: Tensor, put: Tensor) -> Tensor:
    """Return ``source`` [B, H * W] with ``taken`` [B, n] at the places ``put`` [B, n]; the last wins."""
    order = torch.arange(taken.shape[1], device=taken.device).expand_as(taken).where(taken >= 0, -1)
    # a plain scatter leaves open which of several copies to one place wins; a maximum does not
    last = torch.full_like(source, -1).scatter_reduce(1, put, order, "amax")
    return torch.where(last >= 0, taken.gather(1, last.clamp_min(0)), source)


def _shown(x: Tensor, source: Tensor) -> Tensor:
    """Return the images [B, C, H, W] with the pixel ``source[b, place]`` of the same image at each place."""
    return x.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def _true_probability(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return p_y and whether the model errs, [B] each."""
    p = probabilities(model(x))
    return p.gather(1, y[:, None]).squeeze(1), p.argmax(dim=1) != y
