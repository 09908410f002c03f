"""Where a model computes an op, and how a kernel is put there.

A `Hypothesis` says, in Python expressions over the names that a forward sees, how its arguments and
the module's own parameters become the arguments of an op, and how the op's result becomes what the
forward returns. Expressions keep every reference live: ``self.weight`` is read on each call, so an
optimizer step or ``load_state_dict`` needs no notice. From one hypothesis a `Binding` compiles plain
functions. The proof runs the same functions that serve later, with the reference as their kernel.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Names with a meaning inside generated code, which a forward's parameters therefore may not have.
RESERVED = frozenset({"_kernel", "_otherwise", "_same", "_only", "result", "torch"})


class SiteMismatch(RuntimeError):
    """A call differs from what was proved, so that no kernel may serve it."""


@dataclass(frozen=True)
class Hypothesis:
    """A claim that a site computes ``op``.

    ``arguments`` maps the op's parameters to expressions over the forward's parameter names,
    ``self`` (the module) and ``torch``; parameters left out keep their defaults. ``output`` builds
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

    def describe(self) -> str:
        inner = ", ".join(f"{name}={expression}" for name, expression in self.arguments.items())
        return f"{self.op}({inner})"


@dataclass(frozen=True)
class Example:
    """What a site saw: each tensor's dtype name, shape and stride by the forward's parameter names.

    ``values`` are the other arguments of the call that are plain: numbers, strings, flags, None; ``callers``
    the names of those that are a module, as attention functions are given the one that calls them.
    """

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    device: str
    values: Mapping[str, Any] = field(default_factory=dict)
    callers: tuple[str, ...] = ()


class Anything:
    """Stands for a value that the proof showed to be without influence."""


def _shown(value: Any) -> str:
    return "given" if value is Anything else repr(value)


def _only(given: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    for name in given:
        if name not in known:
            return False
        if known[name] is not Anything and not _same(given[name], known[name]):
            return False
    return True


def _same(value: Any, expected: Any) -> bool:
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

    def _call(self, kernel: str) -> str:
        return f"{kernel}({', '.join(f'{name}=({text})' for name, text in self.arguments.items())})"

    def source(self) -> str:
        """The Python that serves this site, for people to read."""
        declared, passed = self._parameters({})
        condition = self._condition({})
        lines = [f"def forward(self, {declared}):"]
        if condition:
            lines += [f"    if not ({condition}):", f"        return _otherwise(self, {passed})"]
        lines += [f"    result = {self._call('_kernel')}", f"    return {self.hypothesis.output}", ""]
        return "\n".join(lines)

    def _build(self, kind: str, names: dict[str, Any]) -> Callable[..., Any]:
        import torch

        namespace: dict[str, Any] = {
            "torch": torch,
            "_same": _same,
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


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a model that was proved to compute ``op``.

    ``kind`` is ``"module"`` (the forward of the module at ``path``), ``"function"`` (a function that
    this module's ``attribute`` calls, by the name ``callee``), ``"call"`` (a named torch call or an
    entry of a function table) or ``"graph"`` (``nodes`` of a captured graph, from ``inputs`` to
    ``outputs``). ``modes`` and ``dtypes`` are those it was proved for, ``examples`` what it saw when
    the model ran. ``others`` are the same place for calls that the examples do not show, each with a
    proof and a binding of its own; they serve what the site's own binding does not.
    """

    op: str
    path: str
    kind: str
    module: torch.nn.Module
    binding: Binding
    examples: tuple[Example, ...] = ()
    devices: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("inference", "training")
    dtypes: tuple[str, ...] = ()
    callee: str = ""
    attribute: str = "forward"
    original: Callable[..., Any] | None = None
    nodes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    others: tuple[Site, ...] = ()

    @property
    def name(self) -> str:
        """A name unique in the model, for receipts."""
        return f"{self.path or '(root)'}{':' + self.callee if self.callee else ''}"

    def arguments(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The op's arguments, by its reference's parameter names, for a call of this site.

        Raises `SiteMismatch` for a call unlike those that were proved.
        """
        return self.binding.collect(self.module, *args, **kwargs)

    def run(self, kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Serve a call with ``kernel`` and return what the site itself would have returned."""
        return self.binding.run(self.module, kernel, *args, **kwargs)

    def weights(self) -> dict[str, Any]:
        """The op's arguments that do not depend on the call: live parameters, epsilon, activation."""
        names = set(self.binding.signature.parameters)
        known: dict[str, Any] = {}
        for name, text in self.binding.arguments.items():
            code = compile(text, f"<kpt site {self.op}>", "eval")
            if not names.intersection(code.co_names):
                import torch

                known[name] = eval(code, {"torch": torch, "self": self.module})
        return known

    def forward(
        self, kernel: Callable[..., Any], otherwise: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A forward that calls ``kernel``, to be set on a module instance as a bound method.

        ``otherwise(self, *args, **kwargs)`` serves calls outside the proof; the class's own forward
        by default.
        """
        return self.binding.forward(kernel, otherwise or type(self.module).forward)

    def at(self, root: torch.nn.Module) -> Site:
        """The same site in another copy of the model."""
        others = tuple(other.at(root) for other in self.others)
        return replace(self, module=root.get_submodule(self.path), others=others)

    def changed(self) -> str | None:
        """Why the proof no longer covers the module, or None while it does."""
        for path, expected in self.binding.guards.items():
            value: Any = self.module
            for part in path.split("."):
                value = getattr(value, part, None)
            if not _same(value, expected):
                return f"{path} is {value!r}, and was {expected!r} when {self.op} was proved"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The site as plain data, for a receipt."""
        return {
            "op": self.op,
            "path": self.path,
            "kind": self.kind,
            "callee": self.callee,
            "modes": list(self.modes),
            "dtypes": list(self.dtypes),
            "binding": self.binding.to_dict(),
        }


def install(root: torch.nn.Module, site: Site, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Let ``kernel`` serve ``site`` inside ``root`` (a workspace); return what undoes it.

    Only attributes of the module instance at ``site.path`` change.
    """
    module = root.get_submodule(site.path)
    if site.kind == "module":
        current = module.forward
        own = getattr(current, "__func__", None) if getattr(current, "__self__", None) is module else None
        bound: Any = types.MethodType(site.binding.forward(kernel, own or type(module).forward), module)
    elif site.callee.startswith("self."):
        return _install_held(module, site, kernel)
    elif site.kind in ("function", "call"):
        from kpt.ops.rebind import bind_function

        bound = bind_function(module, site, kernel)
    else:
        raise ValueError(f"a site of kind {site.kind!r} is installed with kpt.ops.substitute, not install")
    before = module.__dict__.get(site.attribute)
    had = site.attribute in module.__dict__
    module.__dict__[site.attribute] = bound

    def undo() -> None:
        if had:
            module.__dict__[site.attribute] = before
        else:
            module.__dict__.pop(site.attribute, None)

    return undo


def _install_held(module: torch.nn.Module, site: Site, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Replace a function that the module holds as an attribute, through its property if it has one."""
    name = site.callee.removeprefix("self.")
    assert site.original is not None
    before = dict(module.__dict__)
    function = site.binding.function(kernel, site.original, module)
    setattr(module, name, function)
    changed = [key for key, value in module.__dict__.items() if key not in before or before[key] is not value]

    def undo() -> None:
        for key in changed:
            if key in before:
                module.__dict__[key] = before[key]
            else:
                module.__dict__.pop(key, None)

    if getattr(module, name) is not function:
        undo()
        raise ValueError(f"{site.path or 'the root'} does not let {name} be replaced")
    return undo
