"""FID's Inception in the packages pytorch-fid and torch-fidelity, with given weights."""

from pathlib import Path
from unittest import mock

import numpy as np
import torch

try:
    import torchvision
except RuntimeError:
    # PyPI's is compiled for CUDA. Beside a torch without it, its own operators do not load, and
    # its import misses these two; nobody here calls them.
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)
    import torchvision

import pytorch_fid.inception
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

Arrays = dict[str, np.ndarray]


def random_state() -> dict[str, torch.Tensor]:
    """Weights such that activations neither vanish nor explode, and no part is without effect."""
    # FID's differs from torchvision's network in its poolings only.
    network = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    rng = np.random.default_rng(0)

    def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("num_batches_tracked"):
            return tensor
        if tensor.ndim > 1:  # convolutions and the head
            x = rng.normal(0, np.sqrt(2 / tensor[0].numel()), tensor.shape)
        elif name.endswith(("bn.weight", "running_var")):
            x = rng.uniform(0.5, 1.5, tensor.shape)
        else:
            x = rng.normal(0, 0.2, tensor.shape)
        return torch.tensor(x, dtype=torch.float32)

    return {name: draw(name, tensor) for name, tensor in network.state_dict().items()}


def torch_fidelity_resized(images: np.ndarray) -> np.ndarray:
    """From (B, h, w, channels) to 299 x 299."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    return x.permute(0, 2, 3, 1).numpy()


def torch_fidelity_network(path: Path) -> FeatureExtractorInceptionV3:
    names = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=path)


def torch_fidelity_features(network: FeatureExtractorInceptionV3, images: np.ndarray) -> Arrays:
    """Of uint8 images (B, h, w, 3): pooled, logits without bias, and ADM's spatial features."""
    maps = []
    hook = lambda module, x, y: maps.append(y)
    with network.Mixed_6d.branch1x1.register_forward_hook(hook), torch.no_grad():
        pooled, logits = network(torch.tensor(images).permute(0, 3, 1, 2))
    spatial = maps[0].permute(0, 2, 3, 1)[..., :7].flatten(1)
    return {"pooled": pooled.numpy(), "spatial": spatial.numpy(), "logits": logits.numpy()}


def pytorch_fid_pooled(state: dict[str, torch.Tensor], images: np.ndarray) -> np.ndarray:
    """Of uint8 images (B, 299, 299, 3)."""
    load = lambda *_, **__: state
    with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", load):
        network = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False)
    # The original's scale: pytorch-fid itself maps 0 to 255 onto -1 to 1 instead.
    x = (torch.tensor(images).permute(0, 3, 1, 2).float() - 128) / 128
    with torch.no_grad():
        return network.eval()(x)[0].flatten(1).numpy()
