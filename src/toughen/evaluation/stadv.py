"""StAdv (Xiao et al. 2018): every pixel is fetched from a place nearby, along a flow field that is to be smooth."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toughen.attacks import Margin
from toughen.attacks.probabilities import at_least_float32
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients


@dataclass(frozen=True, kw_only=True)
class StAdv:
    """Find, for each image, the smoothest flow that the model errs on; it is bounded by distance, not by pixel values.

    Minimises max(z_y - max_{j != y} z_j, -kappa) + tau * L_flow (the paper's, untargeted) over the flow,
    from zero. The paper runs L-BFGS on one image after the other and bounds the flow by its smoothness alone. Here a
    whole batch is searched at once by projected Adam, as in later ports: it works on each coordinate by itself, so
    that no sample depends on another, and clamping is the exact projection onto the bound. L_flow has a kink where
    neighbours agree, which holds Adam at the start where L-BFGS gets away; therefore the flow is searched as a shift of
    the whole image, which costs no L_flow, plus a rest, the weight of L_flow grows from 0 to tau over the first half
    of the steps, and the step size falls along half a cosine.

    Of all flows on the way, the one kept is that with the smallest L_flow (what the eye sees) among those with a wrong
    logit more than kappa above the true one; where there is none, the one that comes closest to that. A minimum of the
    published objective may well be an image that the model gets right, since with tau = 0.05 the flow term easily
    outweighs the margin; the flows on the way to it are therefore part of the attack.

    Args:
        tau: Weight of L_flow, >= 0; at 0 the bound alone limits the flow, which breaks most images.
        kappa: By how much a wrong logit is to exceed the true one, >= 0.
        bound: Largest |u| and |v|, > 0, as a share of half the image: 0.05 is 0.05 * (W - 1) / 2 pixels, 0.8 at
            32x32. None is the paper's, without bound.
        steps: Gradient steps, at least 1.
        step_size: Of the first step, > 0, in the units of ``bound``.

    Raises:
        InputError: A setting is out of its range.
    """

    tau: float = 0.05
    kappa: float = 0.0
    bound: float | None = 0.05
    steps: int = 200
    step_size: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("tau", self.tau), ("kappa", self.kappa)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"StAdv {name} is {value!r}; it must be a finite number >= 0")
        if self.bound is not None and not (math.isfinite(self.bound) and self.bound > 0):
            raise InputError(
                f"StAdv bound is {self.bound!r}; it must be a finite number > 0, as a share of half the image, or None"
            )
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise InputError(
                f"StAdv step_size is {self.step_size!r}; it must be a finite number > 0, as a share of half the image"
            )
        if self.steps < 1:
            raise InputError(f"StAdv steps is {self.steps}; it must be at least 1")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return x_adv and leave the model exactly as found.

        Args:
            model: Maps [B, C, H, W] images to [B, K] logits.
            x: [B, C, H, W], float, in [0, 1].
            y: [B], int64 labels.
            generator: Not drawn from: the search begins at zero and is deterministic.

        Returns:
            [B, C, H, W], detached, in [0, 1]: the images along ``flow``.
        """
        return warp(x.detach(), self.flow(model, x, y))

    def flow(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the flow found for each image, [B, 2, H, W], in pixels: (u, v) to the right and down."""
        with (
            without_weight_gradients(model),
            mode(model, training=False),
            buffers_kept(model),
            random_state_kept(model),
        ):
            return self._search(model, x.detach(), y)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        margin_of = Margin().bind(ModelView(model), x, y)
        height, width = x.shape[-2:]
        half = at_least_float32(x).new_tensor([(width - 1) / 2, (height - 1) / 2]).view(2, 1, 1)  # in pixels
        shift = half.new_zeros(len(x), 2, 1, 1).requires_grad_(True)  # as a share of half
        rest = half.new_zeros(len(x), 2, height, width).requires_grad_(True)
        optimizer = torch.optim.Adam([shift, rest])
        best, best_margin, best_roughness = torch.zeros_like(rest), *half.new_tensor([[-math.inf], [math.inf]])
        for step in range(self.steps + 1):
            weight = self.tau * min(1.0, 2 * step / self.steps)
            with torch.enable_grad():
                flow = (shift + rest) * half
                margin, roughness = margin_of(warp(x, flow)), flow_loss(flow)
                loss = (-margin).clamp_min(-self.kappa) + weight * roughness
            smoother = (margin > self.kappa) & (roughness < best_roughness)
            better = torch.where(best_margin > self.kappa, smoother, margin > best_margin)
            best = torch.where(better.view(-1, 1, 1, 1), flow, best).detach()
            best_margin = torch.where(better, margin, best_margin).detach()
            best_roughness = torch.where(better, roughness, best_roughness).detach()
            if step < self.steps:
                optimizer.param_groups[0]["lr"] = self.step_size * (1 + math.cos(math.pi * step / self.steps)) / 2
                self._descend(optimizer, shift, rest, loss)
        return best

    def _descend(self, optimizer: torch.optim.Optimizer, shift: Tensor, rest: Tensor, loss: Tensor) -> None:
        for part, gradient in zip((shift, rest), torch.autograd.grad(loss.sum(), (shift, rest)), strict=True):
            part.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a model that overflows must not send pixels nowhere
        optimizer.step()
        if self.bound is not None:
            with torch.no_grad():
                rest.copy_((shift + rest).clamp(-self.bound, self.bound) - shift)


def flow_loss(flow: Tensor) -> Tensor:
    """Measure how much neighbouring pixels flow apart: L_flow, the sum over p and its 4 neighbours q of |f_p - f_q|.

    Each pair counts twice, as in the paper. |d| is sqrt(d^2 + 1e-8) less its value at 0, so that a flow which is the
    same everywhere costs nothing; the constant has no effect on the search.

    Args:
        flow: [B, 2, H, W], in pixels.

    Returns:
        [B], >= 0, differentiable everywhere.
    """
    floor = 1e-8
    total = flow.new_zeros(len(flow))
    for apart in (flow.diff(dim=2), flow.diff(dim=3)):
        square = apart.square().sum(dim=1)
        # sqrt(d^2 + floor) - sqrt(floor), without its loss of digits for small d
        total = total + 2 * (square / ((square + floor).sqrt() + math.sqrt(floor))).sum(dim=(1, 2))
    return total


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Fetch each pixel of the images from (column + u, row + v), bilinearly, and from the border if that lies outside.

    Unlike ``grid_sample``, whose grid in [-1, 1] rounds, this is exact: zero flow gives the image itself, a whole pixel
    gives a shift, and the derivative there is the one to the right and down (in the last line, to the left and up).

    Args:
        x: [B, C, H, W].
        flow: [B, 2, H, W], (u, v) in pixels.

    Returns:
        [B, C, H, W], of the type of ``x``, differentiable by the flow; no value leaves the range of ``x``.
    """
    height, width = x.shape[-2:]
    columns, rows = (torch.arange(size, device=x.device, dtype=flow.dtype) for size in (width, height))
    left, right, to_right = _between(columns + flow[:, 0], width)
    above, below, to_below = _between(rows[:, None] + flow[:, 1], height)
    pixels = x.to(flow.dtype).flatten(2)  # [B, C, H * W]

    def at(row: Tensor, column: Tensor) -> Tensor:
        place = (row * width + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
        return pixels.gather(2, place).view_as(x)

    upper = torch.lerp(at(above, left), at(above, right), to_right)
    lower = torch.lerp(at(below, left), at(below, right), to_right)
    return torch.lerp(upper, lower, to_below).to(x.dtype)


def _between(place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two lines of pixels that a place [B, H, W] lies between, and its way to the second, [B, 1, H, W]."""
    # at the border itself the derivative is kept: a bare clamp may drop it there, and with it the way into the image
    place = torch.where((place < 0) | (place > size - 1), place.detach().clamp(0, size - 1), place)
    first = place.detach().floor().clamp_max(max(size - 2, 0))
    second = (first + 1).clamp_max(size - 1)
    return first.long(), second.long(), (place - first)[:, None]
