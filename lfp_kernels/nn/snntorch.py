"""Networks of snntorch as :class:`Spiking`.

snntorch itself is not needed: its classes are told by their module and name. So are the spiking
networks of lfprop and of :mod:`lfp_kernels.compat.lfprop`, which are made of the same neurons.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .neurons import LIF
from .spiking import WEIGHTED, Spiking

_OURS = "lfp_kernels.compat.lfprop."
# lfprop's networks that are one chain, and whether they flatten their input first.
_NETWORKS = {"LifMLP": True, "SmallLifMLP": True, "LifCNN": False, "DeeperSNN": False}


def from_snntorch(network: nn.Module, steps: int | None, **options: Any) -> Spiking:
    """``network`` as :class:`Spiking`, with the same parameters (the same objects: training one
    trains the other) and the same spikes as ``steps`` calls of ``network`` after a reset.

    ``snntorch.Leaky`` becomes :class:`LIF`, whatever its reset; a learned beta or threshold is
    shared as well. Its surrogate stays where it is ``atan()`` or ``fast_sigmoid()`` with their
    default slopes, else it is None: only training by plain autograd reads it. Noise of lfprop's
    ``NoisyWrapper`` becomes ``Spiking(noise=...)``: the same law, other draws. Dropout and batch
    norm in training mode see all steps at once.

    Args:
        network: an ``nn.Sequential``, nested or not, of torch layers and ``snntorch.Leaky`` that
            ends with the latter; its ``SpikingLayer`` and ``NoisyWrapper``, ``LifMLP``,
            ``SmallLifMLP``, ``LifCNN`` and ``DeeperSNN`` of lfprop or ``compat.lfprop``.
        steps, options: of :class:`Spiking`.

    Raises:
        TypeError, ValueError: a layer has no counterpart; the message names it and a way out.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"from_snntorch: network: expected an nn.Sequential, got {type(network).__name__}"
        )
    converter = _Converter()
    chain = converter.convert("network", network)
    if not isinstance(chain, nn.Sequential):
        if not isinstance(chain, LIF):  # a layer: a forward that cannot be looked into
            raise _own_forward("network", network)
        chain = nn.Sequential(chain)
    path, last = converter.last
    if not isinstance(last, LIF):
        raise ValueError(
            f"from_snntorch: {path}: expected snntorch.Leaky at the end of the network, got "
            f"{type(last).__name__}, whose output does not spike; end with a Leaky"
        )
    if "noise" not in options:
        options["noise"] = converter.common_noise()
    spiking = Spiking(chain, steps, **options)
    spiking.training = network.training
    return spiking


def peer_class(module: nn.Module) -> tuple[str, str]:
    """("snntorch" or "lfprop", name) of the class a module is, or inherits its forward from;
    ("", "") for any other module."""
    for cls in type(module).__mro__:
        root = "lfprop" if cls.__module__.startswith(_OURS) else cls.__module__.partition(".")[0]
        if root in ("snntorch", "lfprop"):
            if type(module).forward is not getattr(cls, "forward", None):
                return "", ""
            # The neuron that stands in for snntorch's.
            return ("snntorch" if cls.__name__ == "Leaky" else root), cls.__name__
    return "", ""


def leaky_settings(path: str, neuron: Any) -> tuple[str, bool]:
    """(reset, reset_delay) of a ``snntorch.Leaky``.

    Raises:
        ValueError: ``neuron`` is another neuron, or does what :class:`LIF` does not.
    """
    package, name = peer_class(neuron)
    if (package, name) != ("snntorch", "Leaky"):
        raise ValueError(
            f"{path}: expected snntorch.Leaky, got {type(neuron).__name__}, which has no "
            "counterpart; use Leaky"
        )
    factor = getattr(neuron, "graded_spikes_factor", 1.0)
    graded = isinstance(factor, nn.Parameter) or bool((torch.as_tensor(factor) != 1).any())
    for option, given, expected in (
        ("inhibition", bool(getattr(neuron, "inhibition", False)), "False"),
        ("state_quant", bool(getattr(neuron, "state_quant", False)), "False"),
        ("graded_spikes_factor", graded, "1, not learned"),
    ):
        if given:
            raise ValueError(
                f"{path} (Leaky): {option}: expected {expected}, got "
                f"{getattr(neuron, option)!r}; LIF neurons have no such option, leave it out"
            )
    return str(neuron.reset_mechanism), bool(getattr(neuron, "reset_delay", True))


class _Converter:
    def __init__(self) -> None:
        self.last: tuple[str, nn.Module] = ("network", nn.Sequential())
        self.noise: dict[str, float] = {}  # of every layer with a weight matrix
        self._wrapped = 0.0  # noise of the wrapper that is being looked into
        self._neurons: dict[int, str] = {}
        self._spatial = 0  # dimensions behind the channels, as far as layers tell

    def convert(self, path: str, module: nn.Module) -> nn.Module:
        package, name = peer_class(module)
        if package == "snntorch":
            return self._end(path, self._neuron(path, module))
        if package == "lfprop" and name == "SpikingLayer":
            return self._chain(path, module, ("parameterized_layer", "spike_mechanism"))
        if package == "lfprop" and name == "NoisyWrapper":
            return self._noisy(path, module)
        if package == "lfprop" and name in _NETWORKS:
            chain = self._chain(path, module, ("classifier",))
            if _NETWORKS[name]:
                flat = OrderedDict(flatten=nn.Flatten(), **dict(chain.named_children()))
                chain = _like(module, flat)
            return chain
        if type(module).forward is nn.Sequential.forward:
            return self._chain(path, module, tuple(module._modules))
        if not isinstance(module, LIF) and any(_is_neuron(m) for m in module.modules()):
            raise _own_forward(path, module)
        return self._end(path, self._layer(path, module))

    def common_noise(self) -> float:
        sizes = set(self.noise.values())
        if len(sizes) > 1:
            found = ", ".join(f"{path} {size:g}" for path, size in self.noise.items())
            raise ValueError(
                "from_snntorch: network: expected the same noise on the input of every layer with "
                f"a weight matrix, got {found}; pass noise=... for all of them"
            )
        return sizes.pop() if sizes else 0.0

    def _end(self, path: str, module: nn.Module) -> nn.Module:
        self.last = path, module
        return module

    def _chain(self, path: str, module: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
        children = OrderedDict(
            (name, self.convert(f"{path}.{name}", getattr(module, name))) for name in names
        )
        return _like(module, children)

    def _noisy(self, path: str, wrapper: Any) -> nn.Sequential:
        size = float(wrapper.noise_size) if wrapper.apply_noise else 0.0
        if size and not isinstance(wrapper.module, WEIGHTED):
            raise ValueError(
                f"from_snntorch: {path}: expected noise around a layer with a weight matrix, got "
                f"{type(wrapper.module).__name__}; wrap nn.Linear or a convolution"
            )
        self._wrapped = size
        chain = self._chain(path, wrapper, ("module",))
        self._wrapped = 0.0
        return chain

    def _layer(self, path: str, module: nn.Module) -> nn.Module:
        kind = type(module).__name__
        if isinstance(module, WEIGHTED):
            self.noise[path] = self._wrapped
            self._spatial = max(0, module.weight.dim() - 2)  # 0 behind nn.Linear
        elif isinstance(module, nn.Flatten):
            self._spatial = 0
        elif kind.endswith(("2d", "3d", "Pool1d")):
            self._spatial = int(kind[-2])
        return module

    def _neuron(self, path: str, neuron: Any) -> LIF:
        where = f"from_snntorch: {path}"
        reset, delay = leaky_settings(where, neuron)
        before = self._neurons.setdefault(id(neuron), path)
        if before != path:
            raise ValueError(
                f"{where} (Leaky): expected neurons of its own, got those of {before}: two layers "
                "would share one membrane; make a second Leaky"
            )
        values = {name: self._flat(where, name, neuron) for name in ("beta", "threshold")}
        values["beta"] = values["beta"].clamp(0, 1)  # as it acts in snntorch
        try:
            lif = LIF(
                values["beta"], values["threshold"], reset, delay,
                isinstance(neuron.beta, nn.Parameter), isinstance(neuron.threshold, nn.Parameter),
                surrogate=_surrogate(neuron.spike_grad),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where} (Leaky): {error}") from error
        for name in values:
            if isinstance(getattr(neuron, name), nn.Parameter):
                setattr(lif, name, getattr(neuron, name))
        lif.training = neuron.training
        return lif

    def _flat(self, where: str, name: str, neuron: Any) -> Tensor:
        """beta or threshold as one value or [C]; snntorch lets any shape broadcast."""
        value: Tensor = getattr(neuron, name).detach()
        shape = tuple(value.shape)
        learned = isinstance(getattr(neuron, name), nn.Parameter)
        if value.numel() > 1:
            own = shape[1:] if len(shape) == self._spatial + 2 and shape[0] == 1 else shape
            if len(own) != self._spatial + 1 or any(size != 1 for size in own[1:]):
                ones = "".join(", 1" for _ in range(self._spatial)) or ","
                raise ValueError(
                    f"{where} (Leaky): {name}: expected one value, or one per channel in shape "
                    f"(C{ones}), got shape {shape}; use one of them"
                )
            if learned and len(shape) > 1:
                raise ValueError(
                    f"{where} (Leaky): {name}: expected a learned parameter of shape (C,), got "
                    f"shape {shape}, which LIF cannot share; build Spiking with "
                    f"LIF({name}={name}.flatten(), learn_{name}=True)"
                )
            value = value.reshape(-1)
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _like(module: nn.Module, children: OrderedDict[str, nn.Module]) -> nn.Sequential:
    chain = nn.Sequential(children)
    chain.training = module.training
    return chain


def _is_neuron(module: nn.Module) -> bool:
    """Told by the package alone: also of what has a forward of its own."""
    classes = {cls.__name__ for cls in type(module).__mro__ if cls.__module__ != "builtins"}
    peer = any(
        cls.__module__.partition(".")[0] == "snntorch" or cls.__module__.startswith(_OURS)
        for cls in type(module).__mro__
    )
    return isinstance(module, LIF) or (peer and bool(classes & {"SpikingNeuron", "Leaky"}))


def _own_forward(path: str, module: nn.Module) -> TypeError:
    return TypeError(
        f"from_snntorch: {path}: expected an nn.Sequential of layers and snntorch.Leaky, got "
        f"{type(module).__name__}, whose forward this function cannot read; write it as "
        "nn.Sequential, or build lfp_kernels.nn.Spiking from lfp_kernels.nn.LIF"
    )


def _surrogate(spike_grad: Any) -> str | None:
    """The name of a surrogate that LIF has, with the slope that LIF gives it."""
    named = getattr(spike_grad, "surrogate", None)  # of compat.lfprop
    if named is not None:
        return str(named)
    if getattr(spike_grad, "__module__", "") != "snntorch.surrogate":
        return None
    name = getattr(spike_grad, "__qualname__", "").partition(".")[0]
    slopes = [cell.cell_contents for cell in getattr(spike_grad, "__closure__", None) or ()]
    return name if (name, slopes) in (("atan", [2.0]), ("fast_sigmoid", [25])) else None
