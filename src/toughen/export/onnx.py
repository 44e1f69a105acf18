"""ONNX, with the batch size left open, and only if another runtime computes the same."""

import warnings
from pathlib import Path

import torch
from torch import nn

from toughen.errors import InputError, first_line

# logits of two runtimes differ by rounding; weights that were exported wrong differ by far more
_TOLERANCE = 1e-3


def write_onnx(model: nn.Module, file: Path, *, image_shape: tuple[int, int, int]) -> float:
    """Write a network as ONNX: ``images`` [B, C, H, W] in [0, 1] to ``logits`` [B, K].

    Args:
        model: The network.
        file: To write.
        image_shape: Channels, height and width.

    Returns:
        The largest difference between the logits of onnxruntime and torch on random images.

    Raises:
        InputError: The packages are missing, torch can't export the network, or the logits differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it, and its own message takes a page
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; get it with: pip install 'toughen[onnx]'") from None
    model = model.eval()
    device = next(model.parameters()).device
    images = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's about its own exporter
            torch.onnx.export(
                model,
                (images,),
                file,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter stumbles over in anybody's network
        raise InputError(f"torch can't export {type(model).__name__} to ONNX: {first_line(error)}") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    more = torch.cat([images, images.flip(0), images])  # another batch size than it was traced with
    with torch.no_grad():
        own = model(more).cpu()
    (theirs,) = session.run(["logits"], {"images": more.cpu().numpy()})
    difference = float((torch.from_numpy(theirs) - own).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(own.abs().max())):
        raise InputError(
            f"onnxruntime's logits of {file} differ from torch's by {difference:.3g}; do not use that file"
        )
    return difference
