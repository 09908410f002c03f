"""What a site is said to compute, and the functions that this claim compiles to.

A `Hypothesis` says, in Python expressions over the names that a forward sees, how its arguments and
the module's own parameters become the arguments of an op, and how the op's result becomes what the
forward returns. Expressions keep every reference live: ``self.weight`` is read on each call, so an
optimizer step or ``load_state_dict`` needs no notice. From one hypothesis a `Binding` compiles plain
functions. The proof runs the same functions that serve later, with the reference as their kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: Names with a meaning inside generated code, which a forward's parameters therefore may not have.
RESERVED = frozenset({"_kernel", "_otherwise", "_same", "_only", "result", "torch"})


class SiteMismatch(RuntimeError):
    """A call differs from what was proved, so that no kernel may serve it."""


@dataclass(frozen=True)
class Hypothesis:
    """A claim that a site computes ``op``.

    ``arguments`` maps the op's parameters to expressions over the forward's parameter names,
    ``self`` (the module) and ``torch``; parameters left out keep their defaults. ``values`` are named
    expressions computed once, in their order, before the arguments, which may use these names (a product
    of which one half is the gate). ``output`` builds
    the forward's return value from ``result``. ``conditions`` are expressions that must be true
    for a call to be served by a kernel. ``scales`` are magnitudes of input at which the claim is to
    be tested besides the usual ones (the square root of an epsilon, for instance), and ``integers``
    the range ``[low, high)`` of integer inputs, which else are drawn from the values seen only.
    """

    op: str
    arguments: Mapping[str, str]
    output: str = "result"
    conditions: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    integers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def claim(self) -> tuple[Hashable, ...]:
        """All that is said about what is computed, to tell one hypothesis from another."""
        items = tuple(self.arguments.items()), tuple(self.values.items())
        return self.op, *items, self.output, self.conditions

    def describe(self) -> str:
        inner = ", ".join(f"{name}={expression}" for name, expression in self.arguments.items())
        where = ", ".join(f"{name} = {expression}" for name, expression in self.values.items())
        return f"{self.op}({inner})" + (f" with {where}" if where else "")


class Anything:
    """Stands for a value that the proof showed to be without influence."""


def _shown(value: Any) -> str:
    return "given" if value is Anything else repr(value)


def _only(given: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    for name in given:
        if name not in known:
            return False
        if known[name] is not Anything and not same(given[name], known[name]):
            return False
    return True


def same(value: Any, expected: Any) -> bool:
    """Whether ``value`` is what was proved: the same object, or an equal one of the same type."""
    return value is expected or (type(value) is type(expected) and value == expected)


@dataclass(frozen=True, eq=False)
class Binding:
    """A proved hypothesis, compiled against one signature.

    ``constants`` are the non-tensor arguments that every proof ran with; a call with other values is
    a mismatch. ``guards`` are the module's primitive attributes at the time of the proof.
    """

    hypothesis: Hypothesis
    signature: inspect.Signature
    constants: Mapping[str, Any] = field(default_factory=dict)
    guards: Mapping[str, Any] = field(default_factory=dict)
    _functions: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def op(self) -> str:
        return self.hypothesis.op

    @property
    def arguments(self) -> Mapping[str, str]:
        return self.hypothesis.arguments

    def to_dict(self) -> dict[str, Any]:
        """The binding as plain data, for a receipt."""
        return {
            "op": self.op,
            "arguments": dict(self.arguments),
            **({"values": dict(self.hypothesis.values)} if self.hypothesis.values else {}),
            "output": self.hypothesis.output,
            "conditions": [
                *self.hypothesis.conditions,
                *(f"{name} is {_shown(value)}" for name, value in self.constants.items()),
            ],
        }

    # ---- generated code -----------------------------------------------------------------------

    def _parameters(self, namespace: dict[str, Any]) -> tuple[str, str]:
        """The parameter list and the list that passes the same arguments on."""
        declared: list[str] = []
        passed: list[str] = []
        keyword_only = False
        for name, parameter in self.signature.parameters.items():
            if name in RESERVED or name.startswith("_default_"):
                raise ValueError(f"the parameter name {name!r} is reserved by kpt's generated code")
            if parameter.kind is parameter.VAR_POSITIONAL:
                declared.append(f"*{name}")
                passed.append(f"*{name}")
                keyword_only = True
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                declared.append(f"**{name}")
                passed.append(f"**{name}")
                continue
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                declared.append("*")
                keyword_only = True
            default = ""
            if parameter.default is not parameter.empty:
                namespace[f"_default_{name}"] = parameter.default
                default = f"=_default_{name}"
            declared.append(name + default)
            passed.append(f"{name}={name}" if parameter.kind is parameter.KEYWORD_ONLY else name)
        return ", ".join(declared), ", ".join(passed)

    def _condition(self, namespace: dict[str, Any]) -> str:
        terms = list(self.hypothesis.conditions)
        for name, value in self.constants.items():
            if self.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                namespace[f"_constant_{name}"] = value
                terms.append(f"_only({name}, _constant_{name})")
            elif value is Anything:
                terms.append(f"{name} is not None")
            elif value is None or isinstance(value, bool):
                terms.append(f"{name} is {value}")
            else:
                namespace[f"_constant_{name}"] = value
                terms.append(f"_same({name}, _constant_{name})")
        return " and ".join(f"({term})" for term in terms)

    def _values(self) -> list[str]:
        for name in self.hypothesis.values:
            if name in RESERVED or name in self.signature.parameters or not name.isidentifier():
                raise ValueError(f"{name!r} cannot name a value: it is no name, or has a meaning already")
        return [f"    {name} = ({text})" for name, text in self.hypothesis.values.items()]

    def _call(self, kernel: str) -> str:
        return f"{kernel}({', '.join(f'{name}=({text})' for name, text in self.arguments.items())})"

    def source(self) -> str:
        """The Python that serves this site, for people to read."""
        declared, passed = self._parameters({})
        condition = self._condition({})
        lines = [f"def forward(self, {declared}):"]
        if condition:
            lines += [f"    if not ({condition}):", f"        return _otherwise(self, {passed})"]
        lines += self._values()
        lines += [f"    result = {self._call('_kernel')}", f"    return {self.hypothesis.output}", ""]
        return "\n".join(lines)

    def _build(self, kind: str, names: dict[str, Any]) -> Callable[..., Any]:
        namespace: dict[str, Any] = {
            "torch": torch,
            "_same": same,
            "_only": _only,
            "__builtins__": __builtins__,
            **names,
        }
        declared, passed = self._parameters(namespace)
        condition = self._condition(namespace)
        declared = f", {declared}" if declared else ""
        if kind == "function":  # stands in for a plain function: no module is passed
            lines = [f"def site({declared[2:]}):"]
            otherwise = f"_otherwise({passed})"
        elif kind == "forward":
            lines = [f"def site(self{declared}):"]
            otherwise = f"_otherwise(self, {passed})"
        else:
            lines = [f"def site(self, _kernel{declared}):"]
            otherwise = "_otherwise()"
        if condition:
            lines += [f"    if not ({condition}):", f"        return {otherwise}"]
        lines += self._values()
        if kind == "arguments":
            items = ", ".join(f"{name!r}: ({text})" for name, text in self.arguments.items())
            lines.append(f"    return {{{items}}}")
        else:
            lines += [f"    result = {self._call('_kernel')}", f"    return {self.hypothesis.output}"]
        exec(compile("\n".join(lines), f"<kpt site {self.op}>", "exec"), namespace)
        built: Callable[..., Any] = namespace["site"]
        return built

    def run(self, module: Any, kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call ``kernel`` with what the forward of ``module`` would have computed with."""
        function = self._functions.get("run")
        if function is None:
            function = self._functions["run"] = self._build("run", {"_otherwise": _refuse})
        return function(module, kernel, *args, **kwargs)

    def collect(self, module: Any, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The op's arguments for this call; tensors are the live ones or views of them."""
        function = self._functions.get("arguments")
        if function is None:
            function = self._functions["arguments"] = self._build("arguments", {"_otherwise": _refuse})
        collected: dict[str, Any] = function(module, None, *args, **kwargs)
        return collected

    def forward(self, kernel: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """A function with the forward's own signature (``self`` first) that calls ``kernel``.

        ``otherwise`` gets the very same arguments when a condition does not hold.
        """
        return self._build("forward", {"_kernel": kernel, "_otherwise": otherwise})

    def function(
        self, kernel: Callable[..., Any], otherwise: Callable[..., Any], module: Any
    ) -> Callable[..., Any]:
        """As `forward`, for a plain function called by ``module``, which expressions see as ``self``."""
        return self._build("function", {"_kernel": kernel, "_otherwise": otherwise, "self": module})


def _refuse() -> Any:
    raise SiteMismatch("the call differs from the ones that were proved; run the original forward instead")
