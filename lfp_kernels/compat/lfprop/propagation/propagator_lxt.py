"""Composites and rules under lfprop's names.

A layer map says which layers get which rule: keys are module types (or tuples of them) or names of
children, values :class:`RuleGenerator` objects or rule classes; the first key that fits counts.
What no key fits, functions called outside the mapped layers included, runs as plain autograd, which
then acts on the reward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .... import rules
from ....autograd import IdentityReward
from ....composites import Attachment
from ..model.activations import Step
from ..model.custom_resnet import Sum
from .feedback import LayerMode, OneRule, Reverse

ACTIVATIONS = (
    nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid,
    nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
AVERAGE_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
LINEAR_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class WrapModule(nn.Module):
    """Base of rules of your own: a module that takes the place of ``self.module`` meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Rule(WrapModule):
    """A rule that runs inside its layer: the layer stays where it is, with its hooks."""

    run: Callable[..., Any]
    whole = False  # the rule is that of the layer's children too: they get none of their own

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # What runs the layer; a composite puts the layer's own forward here (see _install).
        self.__dict__["run"] = module


class IdentityRule(_Rule):
    """The reward passes unchanged."""

    def forward(self, input: Tensor) -> Tensor:
        return IdentityReward.apply(input, self.run, False)


class _LayerRule(_Rule):
    """A rule of :mod:`lfp_kernels.rules` around one layer."""

    rule: Attachment

    def __init__(self, module: nn.Module, rule: rules.Rule) -> None:
        super().__init__(module)
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            self.__dict__["weight"] = module.weight  # an alias, not a parameter of its own
        self.__dict__["rule"] = Attachment(OneRule(rule), module)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with LayerMode(self.rule):
            return self.run(*inputs, **options)


class LFPEpsilon(_LayerRule):
    """LFP-epsilon: ``s = r / stab(z)``, ``r_in = x * (s W)``, feedback ``|W| * (s^T x)``.

    Args:
        module: the layer.
        epsilon: stabilizer of the denominator; 0 gives LFP-0 with ``0 / 0 := 0``.
        inplace: without effect.
        hebbian: feedback ``|W| * ((r z)^T x)`` instead; the input reward stays.
        use_oja: with hebbian, Oja's decay of the weights.
        reverse_pos, reverse_neg: the reward of positive (negative) outputs changes sign first.
    """

    def __init__(
        self,
        module: nn.Module,
        epsilon: float = 1e-6,
        inplace: bool = True,
        hebbian: bool = False,
        use_oja: bool = False,
        reverse_pos: bool = False,
        reverse_neg: bool = False,
    ) -> None:
        rule: rules.Rule = rules.Zero() if epsilon == 0 else rules.Epsilon(epsilon)
        if hebbian and _has_parameters(module):
            rule = rules.Separate(rule, rules.Oja() if use_oja else rules.Hebbian())
        super().__init__(module, rule)
        self.epsilon, self.inplace = epsilon, inplace
        self.hebbian, self.use_oja = hebbian, use_oja
        self.reverse_pos, self.reverse_neg = reverse_pos, reverse_neg

    def forward(self, *inputs: Any, **options: Any) -> Any:
        out = super().forward(*inputs, **options)
        if self.reverse_pos or self.reverse_neg:
            out = Reverse.apply(out, self.reverse_pos, self.reverse_neg)
        return out


class LFPGamma(_LayerRule):
    """LFP-gamma for the input reward, LFP-epsilon for the feedback of the parameters.

    This is the gamma rule as its literature has it (contributions of the output's own sign count
    ``1 + gamma``, :class:`lfp_kernels.rules.Gamma`). lfprop 1.0.0 differs: by a slip of operator
    precedence its input reward does not depend on the reward that arrives at all.

    Args:
        module: the layer. epsilon: stabilizer, > 0. gamma: >= 0. inplace: without effect.
    """

    def __init__(
        self,
        module: nn.Module,
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        inplace: bool = True,
    ) -> None:
        rule: rules.Rule = rules.Epsilon(epsilon)
        if _has_parameters(module):  # without weights, gamma raises nothing
            rule = rules.Separate(rules.Gamma(epsilon, gamma), rule)
        super().__init__(module, rule)
        self.epsilon, self.gamma, self.inplace = epsilon, gamma, inplace


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


class RuleGenerator:
    """A rule with its settings: ``RuleGenerator(LFPEpsilon, epsilon=1e-3)``, called with a layer.

    Args:
        rule: a rule class, ``rule(module, **kwargs)``. kwargs: its settings.
    """

    def __init__(self, rule: Callable[..., nn.Module], **kwargs: Any) -> None:
        self.rule = rule
        self.rule_kwargs = kwargs

    def __call__(self, module: nn.Module) -> nn.Module:
        return self.rule(module, **self.rule_kwargs)


class DummyCompositeContext:
    """Registers the composite on entry, returns the module, and removes the composite on exit."""

    def __init__(
        self,
        module: nn.Module,
        composite: ParameterizableComposite,
        verbose: bool,
        **register_kwargs: Any,
    ) -> None:
        self.module = module
        self.composite = composite
        self.verbose = verbose
        self.register_kwargs = register_kwargs

    def __enter__(self) -> nn.Module:
        self.composite.register(self.module, verbose=self.verbose, **self.register_kwargs)
        return self.module

    def __exit__(self, *exception: Any) -> None:
        self.composite.remove()


class ParameterizableComposite:
    """Rules for the layers of a model, by a layer map.

    Args:
        layer_map: {module type, tuple of types or name of a child: rule}; see this module's text.
        canonizers: objects whose ``apply(model)`` changes the model and returns what ``remove()``s
            the change.
        zennit_composite: must be None.

    Raises:
        TypeError, ValueError: a key or value of another kind.
    """

    def __init__(
        self, layer_map: dict[Any, Any], canonizers: Any = (), zennit_composite: Any = None
    ) -> None:
        owner = type(self).__name__
        if zennit_composite is not None:
            raise ValueError(
                f"{owner}: zennit_composite: expected None; write its rules into layer_map"
            )
        for key in layer_map:
            types = key if isinstance(key, tuple) else (key,)
            if not isinstance(key, str) and not all(isinstance(t, type) for t in types):
                raise TypeError(
                    f"{owner}: layer_map: expected module types or names of children as keys, got "
                    f"{key!r} (rules of functions never took effect in lfprop)"
                )
        self.layer_map = layer_map
        self.canonizers = canonizers
        self._undo: list[Callable[[], None]] = []
        self._warned = False

    def register(
        self,
        parent: nn.Module,
        dummy_inputs: Any = None,
        tracer: Any = None,
        verbose: bool = False,
        no_grad: bool = False,
    ) -> None:
        """Attach the rules to ``parent``; undo with :meth:`remove`.

        Args:
            parent: the model, changed in place. It keeps its structure and its state_dict's keys.
            dummy_inputs, tracer: without effect; nothing is traced.
            verbose: print every layer and its rule.
            no_grad: freeze every parameter meanwhile, so that only the input reward is computed.

        Raises:
            ValueError: this composite or this model is registered already.
        """
        if self._undo:
            raise ValueError("register: parent: this composite is registered already; remove() it")
        try:
            for canonizer in self.canonizers:
                for instance in canonizer.apply(parent):
                    self._undo.append(instance.remove)
            if no_grad:
                for parameter in parent.parameters():
                    self._set_attribute(parameter, "requires_grad", False)
            self._attach(parent, verbose)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the model back exactly as it was."""
        while self._undo:
            self._undo.pop()()

    def context(
        self, module: nn.Module, verbose: bool = False, **register_kwargs: Any
    ) -> DummyCompositeContext:
        """:meth:`register` on entry of the block, :meth:`remove` at its end."""
        return DummyCompositeContext(module, self, verbose, **register_kwargs)

    def _attach(self, model: nn.Module, verbose: bool) -> None:
        # Every module once, however often the model holds it; listed before any is replaced.
        modules = dict(model.named_modules())
        left: list[str] = []
        covered: set[nn.Module] = set()
        for path, module in modules.items():
            owner, _, name = path.rpartition(".")
            if hasattr(module, "inplace"):
                self._set_attribute(module, "inplace", False)
            if module in covered:
                continue
            rule = self._rule_of(name, module)
            if isinstance(rule, _Rule) and rule.whole:
                covered.update(module.modules())
            if verbose:
                print(f"{path or type(model).__name__}: {type(rule).__name__ if rule else '-'}")
            if rule is None and isinstance(module, _MAX_POOLS):
                rule = _LayerRule(module, rules.Gradient())  # autograd's numbers by faster kernels
            if rule is not None:
                self._install(modules[owner] if path else None, name, module, rule)
            trains = any(p.requires_grad for p in module.parameters(recurse=False))
            if trains and (rule is None or isinstance(rule, IdentityRule)):
                left.append(f"{path or 'the model itself'} ({type(module).__name__})")
        if left and not self._warned:
            self._warned = True
            warnings.warn(
                f"lfp_kernels: {', '.join(left)}: parameters without a rule get no .feedback; the "
                "plain gradient acts on the reward there. Freeze them or map their layer",
                stacklevel=4,
            )

    def _rule_of(self, name: str, module: nn.Module) -> nn.Module | None:
        for key, rule in self.layer_map.items():
            fits = key == name if isinstance(key, str) else isinstance(module, key)
            if not fits:
                continue
            if not isinstance(rule, RuleGenerator) and not (
                isinstance(rule, type) and issubclass(rule, WrapModule)
            ):
                raise ValueError(
                    f"layer_map: {key!r}: expected a RuleGenerator or a rule class such as "
                    f"LFPEpsilon, got {rule!r}"
                )
            return rule(module)
        return None

    def _install(
        self, parent: nn.Module | None, name: str, module: nn.Module, rule: nn.Module
    ) -> None:
        if not isinstance(rule, _Rule):  # a wrapper of the user's own takes the layer's place
            if parent is None:
                raise ValueError(f"register: parent: {type(rule).__name__} needs a model around it")
            self._undo.append(lambda: setattr(parent, name, module))
            setattr(parent, name, rule)
            return
        before = module.__dict__.get("forward")
        if isinstance(getattr(before, "__self__", None), _Rule):
            raise ValueError(
                "register: parent: is registered with another composite already; remove() that "
                "one first"
            )
        rule.__dict__["run"] = module.forward
        if before is None:
            self._undo.append(lambda: module.__dict__.pop("forward"))
        else:
            self._undo.append(lambda: module.__dict__.update(forward=before))
        module.__dict__["forward"] = rule.forward

    def _set_attribute(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)


def _layer_map(linear: RuleGenerator, other: RuleGenerator) -> dict[Any, Any]:
    return {
        ACTIVATIONS: IdentityRule,
        Step: IdentityRule,
        Sum: other,
        AVERAGE_POOLS: other,
        LINEAR_LAYERS: linear,
        BATCH_NORMS: other,
    }


class LFPEpsilonComposite(ParameterizableComposite):
    """LFP-epsilon for layers with weights, sums and average pools; identity for activations.

    Args:
        epsilon: stabilizer of every denominator.
    """

    def __init__(self, epsilon: float = 1e-6) -> None:
        rule = RuleGenerator(LFPEpsilon, epsilon=epsilon)
        super().__init__(_layer_map(rule, rule))


class LFPHebbianEpsilonComposite(ParameterizableComposite):
    """As :class:`LFPEpsilonComposite`, with Hebbian feedback (lfprop's authors: it "does not
    perform that well in practice").

    Args:
        epsilon: stabilizer of the input reward. use_oja: Oja's decay of the weights.
    """

    def __init__(self, epsilon: float = 1e-6, use_oja: bool = False) -> None:
        rule = RuleGenerator(LFPEpsilon, epsilon=epsilon, hebbian=True, use_oja=use_oja)
        super().__init__(_layer_map(rule, rule))


class LFPGammaComposite(ParameterizableComposite):
    """LFP-gamma for the input reward of linear and convolution layers, LFP-epsilon for the rest.

    The correct rule, not lfprop's numbers: see :class:`LFPGamma`.

    Args:
        epsilon: stabilizer of every denominator. gamma: what favours contributions of z's own sign.
    """

    def __init__(self, epsilon: float = 1e-6, gamma: float = 0.25) -> None:
        super().__init__(
            _layer_map(
                RuleGenerator(LFPGamma, epsilon=epsilon, gamma=gamma),
                RuleGenerator(LFPEpsilon, epsilon=epsilon),
            )
        )
