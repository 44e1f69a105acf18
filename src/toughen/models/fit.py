"""Whether a model takes the images that it is given, asked before hours are spent."""

import torch
from torch import Tensor, nn

from toughen.errors import InputError, first_line


def check_fit(model: nn.Module, *, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Refuse a model that cannot classify such images.

    Args:
        model: Run once on a grey image, in eval mode; left as found.
        image_shape: Channels, height and width.
        num_classes: How many logits are wanted.

    Raises:
        InputError: The forward fails, or yields something else than one row of so many logits.
    """
    channels, height, width = image_shape
    size = f"{width}x{height} images with {channels} channels"
    parameter = next(model.parameters(), torch.empty(0))
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model.eval()(torch.full((1, *image_shape), 0.5, device=parameter.device))
    except InputError:
        raise
    except Exception as error:  # whatever a network says when its input does not suit it
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"the model {type(model).__name__} fails on {size}: {reason.rstrip('.')}; if it is for other images, set"
            " data.image_size (or --image-size) or another model, else mend its forward"
        ) from error
    finally:
        for module, flag in flags:
            module.training = flag
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model returns {found} for one image; it must return logits [1, {num_classes}]")
    if logits.shape[1] != num_classes:
        raise InputError(
            f"the model has {logits.shape[1]} classes and the data {num_classes}; build it with"
            f" num_classes={num_classes}, or choose the data that it was trained for"
        )
