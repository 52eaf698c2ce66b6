"""``get_model``: lfprop's networks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import activations, model_definitions, spiking_networks

MODEL_MAP: dict[str, Callable[..., nn.Module]] = {
    "lenet": model_definitions.LeNet,
    "cifar-vgglike": model_definitions.CifarVGGLike,
    "cifar-vgglike-bn": model_definitions.CifarVGGLikeBN,
    "dense-only": model_definitions.DenseOnly,
    "toydata-dense": model_definitions.ToyDataDense,
}
SPIKING_MODEL_MAP: dict[str, Callable[..., nn.Module]] = {
    "lifmlp": spiking_networks.LifMLP,
    "smalllifmlp": spiking_networks.SmallLifMLP,
    "lifcnn": spiking_networks.LifCNN,
    "deepersnn": spiking_networks.DeeperSNN,
    "lifresnetlike": spiking_networks.ResNet,
}
# What these names need is not a dependency of this package.
_ELSEWHERE = {
    **dict.fromkeys(("vgg16", "vgg16bn", "resnet18", "resnet34", "customresnet18"), "torchvision"),
    "vit": "transformers",
}

_SIZES = {"n_channels": 3, "n_outputs": 1000}
_NEURONS = {
    "beta": 0.9, "reset_mechanism": "subtract", "surrogate_disable": False, "spike_grad": "step",
    "apply_noise": False, "noise_size": 1e-6, "n_linear_inputs": None,
}  # fmt: skip
ACTIVATION_MAP: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leakyrelu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "step": activations.Step,
    "negtanh": activations.NegTanh,
    "negrelu": activations.NegReLU,
    "neginnerrelu": activations.NegInnerReLU,
    "negstep": activations.NegStep,
}


def normal_pos(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """``|tensor|``, in place."""
    tensor.data = tensor.data.abs()


def normal_neg(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
    """``-|tensor|``, in place."""
    tensor.data = -tensor.data.abs()


INIT_FUNCS: dict[str, Callable[..., None]] = {"positive": normal_pos, "negative": normal_neg}


def init_model_weights(model: nn.Module, init_func: Callable[..., None]) -> None:
    """Run ``init_func`` on weights and biases of the model's Linear, Conv2d and Conv3d layers."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            init_func(module.weight)
            if module.bias is not None:
                init_func(module.bias)


def forward_fn_default(
    batch: Any, model: nn.Module, device: Any, lfp_step: bool = True, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, labels, outputs) of one batch; the inputs require grad with ``lfp_step``."""
    inputs, labels = batch
    inputs, labels = inputs.to(device), torch.as_tensor(labels).to(device)
    if lfp_step:
        inputs = inputs.detach().requires_grad_(True)
    return inputs, labels, model(inputs)


def forward_fn_spiking(
    batch: Any,
    model: nn.Module,
    device: Any,
    lfp_step: bool = True,
    n_steps: int = 15,
    is_huggingface_data: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, labels, spikes [T, N, C]) of one batch: ``n_steps`` calls with the same inputs.

    Args:
        batch: (inputs, labels), or with ``is_huggingface_data`` a dict of "pixel_values", "labels".
        model: steps; ``model(inputs)`` returns (spikes, membrane).
    """
    if is_huggingface_data:
        batch = batch["pixel_values"], batch["labels"]
    inputs, labels = batch
    inputs, labels = inputs.to(device), torch.as_tensor(labels).to(device)
    if lfp_step:
        inputs = inputs.detach().requires_grad_(True)
    return inputs, labels, torch.stack([model(inputs)[0] for _ in range(n_steps)])


def get_model(model_name: str, device: Any, **kwargs: Any) -> nn.Module:
    """A network by name, on ``device``.

    Args:
        model_name: a key of MODEL_MAP or SPIKING_MODEL_MAP. device: where it goes.
        n_channels (3), n_outputs (1000): its sizes. activation ("relu"): a key of ACTIVATION_MAP.
        beta (0.9), reset_mechanism ("subtract"), surrogate_disable (False), spike_grad ("step"),
        apply_noise (False), noise_size (1e-6), n_linear_inputs: of a spiking network.
        init_func ("default"): a key of INIT_FUNCS that changes the initial weights.

    Raises:
        ValueError: no such name; the message lists the names.
    """
    names = (*MODEL_MAP, *SPIKING_MODEL_MAP)
    if model_name not in names:
        needs = _ELSEWHERE.get(model_name)
        why = f"; {model_name} is made by {needs}, take it from there" if needs else ""
        raise ValueError(f"get_model: expected one of {', '.join(names)}, got {model_name!r}{why}")
    options = {name: kwargs.get(name, default) for name, default in _SIZES.items()}
    if model_name in MODEL_MAP:
        activation = _choose("activation", ACTIVATION_MAP, kwargs.get("activation", "relu"))
        model = MODEL_MAP[model_name](**options, activation=activation)
        model.forward_fn = forward_fn_default  # type: ignore[assignment]
    else:
        options.update({name: kwargs.get(name, default) for name, default in _NEURONS.items()})
        model = SPIKING_MODEL_MAP[model_name](**options)
        model.forward_fn = forward_fn_spiking  # type: ignore[assignment]
    model.is_huggingface = False  # type: ignore[assignment]
    init = kwargs.get("init_func", "default")
    if init != "default":
        init_model_weights(model, _choose("init_func", INIT_FUNCS, init))
    return model.to(device)


def _choose(what: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"get_model: {what}: expected one of {', '.join(table)}, got {name!r}")
    return table[name]


def list_layers(model: nn.Module) -> list[nn.Module]:
    """Every module of the model except containers."""
    containers = (nn.Sequential, model_definitions.LeNet, model_definitions.CifarVGGLike,
                  model_definitions.DenseOnly)  # fmt: skip
    return [module for module in model.modules() if type(module) not in containers]
