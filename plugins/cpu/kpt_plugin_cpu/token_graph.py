"""A captured graph in which what treats every token by itself runs for the tokens that count alone.

Of a padded batch of B rows and S positions T tokens count. Linears, norms and whatever else `token_proofs`
shows to treat tokens apart run on [1, T, ...] in place of [B, S, ...]; around all else, attention above all,
tokens are put back at their places. Padding holds copies of its row's last token there, and zeros in what the
graph returns. What no weight has a part in, masks above all, is computed for padding, too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from kpt.compiling import memories, value_of, written_by
from kpt_plugin_cpu.multihead import written_out
from kpt_plugin_cpu.token_proofs import Axes, Proofs, expression

_library = torch.library.Library("kpt_cpu", "FRAGMENT")
# Marks, in a captured graph, which mask belongs to which tokens, and what has the same batch and length.
# It is taken out again.
_library.define("token_places(Tensor mask, Tensor tokens, Tensor places, Tensor[] like) -> Tensor")
_library.impl("token_places", lambda mask, tokens, places, like: mask.clone(), "CompositeExplicitAutograd")
MARK = torch.ops.kpt_cpu.token_places


@torch.library.register_fake("kpt_cpu::token_places", lib=_library)
def _(
    mask: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, like: list[torch.Tensor]
) -> torch.Tensor:
    for axis in (0, 1):
        for each in (places, *like):
            torch._check(mask.shape[axis] == each.shape[axis])
    return torch.empty_like(mask)


class TokenGraph:
    """The graph pass; ``packed`` counts the operations of all graphs that run packed.

    ``kept`` is what the mask has where a token counts, 1 or 0.
    """

    def __init__(self) -> None:
        self.kept = 1
        self.packed = 0
        self.reason = "no graph was captured with the mask among its inputs"

    def __call__(self, graph: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        marks = [node for node in graph.graph.nodes if node.target in (MARK, MARK.default)]
        if marks:
            graph = written_out(graph, example_inputs)
        for mark in marks[:1]:
            axes = _axes(mark)
            if axes is None:
                self.reason = "the mask has no batch and length of its own in the captured graph"
            else:
                inputs = dict(zip(graph.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
                self.packed += _Rewriting(graph.graph, mark, Proofs(axes, inputs), self).run()
        for mark in marks:
            mark.replace_all_uses_with(mark.args[0])
            graph.graph.erase_node(mark)
        if marks:
            graph.graph.lint()
            graph.recompile()
        return graph


def _axes(mark: fx.Node) -> Axes | None:
    """Batch and length of the mask, or None where they are no sizes of their own."""
    sizes = [expression(size) for size in value_of(mark).shape]
    symbols = [size for size in sizes if not isinstance(size, int)]
    if len(sizes) != 2 or sizes[0] == sizes[1]:
        return None
    if len(symbols) != len(set(symbols)) or not all(size.is_Symbol for size in symbols):
        return None
    return Axes(*sizes)


class _Rewriting:
    """One graph while it is rewritten."""

    def __init__(self, graph: fx.Graph, mark: fx.Node, proofs: Proofs, told: TokenGraph) -> None:
        self.graph, self.mark, self.proofs, self.told = graph, mark, proofs, told
        self.axes = proofs.axes
        self.tokens, self.places = mark.args[1], mark.args[2]
        self.mode = value_of(self.tokens).fake_mode
        self.packable: set[fx.Node] = set()
        #: What weights have a part in.
        self.weighed: set[fx.Node] = set()
        #: Those of them of which a mask decides what padding holds.
        self.masked: set[fx.Node] = set()
        self.forms: dict[fx.Node, fx.Node] = {}
        self.wholes: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[str, Any] = {}

    def run(self) -> int:
        nodes = list(self.graph.nodes)
        written = _written(nodes)
        if written is None:
            self.told.reason = "it is not known what the graph writes to in place"
            return 0
        for node in nodes:
            if not written & _touched(node) and self._may_be_packed(node):
                self.packable.add(node)
        for node in nodes:  # only their elements are put back at their places
            if node in self.packable and isinstance(value_of(node), (tuple, list)):
                if any(user.target is not operator.getitem for user in node.users):
                    self.packable -= {node, *node.users}
        for node in nodes:
            if node.op.startswith("call_") and node is not self.mark and self._weighed(node):
                self.weighed.add(node)
                if self._masked(node):  # in the graph's order: it depends on what was found of inputs
                    self.masked.add(node)
        # What is made of masks and numbers of words alone costs little, and is needed of padding, too.
        self.packable &= self.weighed
        while masked := {node for node in self.packable if self._shows_padding(node)}:
            self.packable -= masked
        parts = _connected(self.packable)
        self.packable = {node for part in parts if any(map(self._multiplies, part)) for node in part}
        if not self.packable:
            self.told.reason = "no product in the graph was shown to treat tokens apart"
            return 0
        with self.graph.inserting_after(max((self.mark, *self._placeholders()), key=nodes.index)):
            self.sizes = {"one": 1, "tokens": self._call("size", self.tokens, 0)}
        for node in nodes:
            if node in self.packable:
                self._pack(node)
            elif node is not self.mark:
                self._unpack_for(node)
        for node in reversed(nodes):
            if node in self.packable and not node.users:
                self.graph.erase_node(node)
        return len(self.packable)

    # -- which

    def _placeholders(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    def _is_tokens(self, value: Any) -> bool:
        parts = tree_leaves(value)
        return bool(parts) and all(self.axes.layout(part) for part in parts)

    def _may_be_packed(self, node: fx.Node) -> bool:
        if not node.op.startswith("call_") or node.op == "call_module" or node is self.mark:
            return False
        if not self._is_tokens(value_of(node)):
            return False
        if node.target is operator.getitem and isinstance(value_of(node.args[0]), (tuple, list)):
            return node.args[0] in self.packable
        inputs = [(each, value_of(each)) for each in node.all_input_nodes]
        if any(isinstance(value, (tuple, list)) for _, value in inputs):
            return False
        tensors = [(each, value) for each, value in inputs if isinstance(value, torch.Tensor)]
        if not any(self.proofs.form(each) in ("rows", "flat") for each, _ in tensors):
            return False
        if node.target is torch.nn.functional.embedding and len(tensors) == 2:
            return not self.proofs.form(tensors[1][0])
        return self.proofs.holds(node)

    def _plain_inputs(self, node: fx.Node) -> list[Any]:
        """The tensors that ``node`` takes besides tokens and what goes with them."""
        found = [(each, value_of(each)) for each in node.all_input_nodes]
        return [v for each, v in found if isinstance(v, torch.Tensor) and not self.proofs.form(each)]

    def _multiplies(self, node: fx.Node) -> bool:
        """Whether ``node`` multiplies tokens with a matrix."""
        if node.target is torch.nn.functional.embedding:
            return False
        matrices = [value for value in self._plain_inputs(node) if value.dim() == 2]
        return any(isinstance(size, int) and size > 1 for value in matrices for size in value.shape)

    def _weighed(self, node: fx.Node) -> bool:
        if not any(isinstance(each, torch.Tensor) for each in tree_leaves(value_of(node))):
            return False  # a size is none of what it is the size of
        return any(each in self.weighed for each in node.all_input_nodes) or self._takes_weights(node)

    def _takes_weights(self, node: fx.Node) -> bool:
        return any(value.dim() > 0 for value in self._plain_inputs(node))

    def _masked(self, node: fx.Node) -> bool:
        """Whether what ``node`` makes of padding is by a mask, for all that is known.

        Tokens were multiplied with one, say, and no weight came in since.
        """
        if self._takes_weights(node):
            return False
        given = [each for each in node.all_input_nodes if self.proofs.form(each) in ("rows", "flat")]
        return any(each not in self.weighed or each in self.masked for each in given)

    def _shows_padding(self, node: fx.Node) -> bool:
        """Whether somebody needs what a mask made of ``node``'s padding; what is returned is zero there."""
        if node not in self.masked:
            return False
        return any(user not in self.packable and user.op != "output" for user in node.users)

    # -- rewriting

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, where the graph is being inserted into, with its fake value."""
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
        self._record(node)
        return node

    def _record(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
        with self.mode:
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _pack(self, node: fx.Node) -> None:
        """Add the packed twin of ``node`` before it."""
        with self.graph.inserting_before(node):
            inputs = {each: self._packed_form(each) for each in node.all_input_nodes}
            twin = self.graph.node_copy(node, inputs.__getitem__)
            self._record(twin)
        self.forms[node] = twin

    def _packed_form(self, node: fx.Node) -> Any:
        """What takes the place of ``node`` in a packed call."""
        if node in self.forms:
            return self.forms[node]
        value = value_of(node)
        if isinstance(value, (int, torch.SymInt)):
            packed = self.axes.packed(value)
            return node if packed is None else self.sizes[packed]
        if isinstance(value, torch.Tensor):
            if form := self.proofs.form(node):
                self.forms[node] = self._gathered(node, form)
                return self.forms[node]
        return node

    def _gathered(self, node: fx.Node, form: str) -> fx.Node:
        if node.target is MARK or node.target is MARK.default:
            node = node.args[0]  # type: ignore[assignment]
        if form == "flat":
            return self._call(torch.index_select, node, 0, self.tokens)
        if form == "across":
            rest = value_of(node).shape[2:]
            sizes = [self._call("size", self.places, axis) for axis in (0, 1)]
            node = self._call("expand", node, *sizes, *([-1] * len(rest)))
        flat = self._call(torch.flatten, node, 0, 1)
        return self._call(torch.unsqueeze, self._call(torch.index_select, flat, 0, self.tokens), 0)

    def _unpack_for(self, node: fx.Node) -> None:
        """Give ``node`` the tokens at their places where it takes what runs packed."""
        for each in node.all_input_nodes:
            if each not in self.packable:
                continue
            with self.graph.inserting_before(node):
                if each not in self.wholes:
                    self.wholes[each] = self._at_places(each)
                whole = self.wholes[each]
                if node.op == "output":
                    whole = self._without_padding(whole, each)
            node.replace_input_with(each, whole)

    def _at_places(self, node: fx.Node) -> fx.Node:
        layout = self.axes.layout(value_of(node))
        places = self._call(torch.flatten, self.places)
        packed = self.forms[node]
        if layout == "flat":
            return self._call(torch.index_select, packed, 0, places)
        found = self._call(torch.index_select, self._call(torch.squeeze, packed, 0), 0, places)
        sizes = [self._call("size", self.places, axis) for axis in (0, 1)]
        return self._call(torch.unflatten, found, 0, tuple(sizes))

    def _without_padding(self, whole: fx.Node, node: fx.Node) -> fx.Node:
        value = value_of(node)
        padding = self._call(torch.ne, self.mark.args[0], self.told.kept)
        if self.axes.layout(value) == "flat":
            padding = self._call(torch.flatten, padding)
        for _ in range(value.dim() - value_of(padding).dim()):
            padding = self._call(torch.unsqueeze, padding, -1)
        return self._call(torch.masked_fill, whole, padding, 0)


def _written(nodes: list[fx.Node]) -> set[int] | None:
    """The memory that operations write to, or None where that is not known."""
    found: set[int] = set()
    for node in nodes:
        for each in written_by(node) if node.op.startswith("call_") else ():
            memory = memories(each) if isinstance(each, fx.Node) else None
            if memory is None:
                return None
            found.update(memory)
    return found


def _touched(node: fx.Node) -> set[int]:
    """The memory of a node's value and of its inputs; a packed form is a copy of it."""
    return {memory for each in (node, *node.all_input_nodes) for memory in memories(each) or ()}


def _connected(nodes: set[fx.Node]) -> list[set[fx.Node]]:
    """The parts of ``nodes`` within which values flow."""
    parts: list[set[fx.Node]] = []
    waiting = set(nodes)
    while waiting:
        part, edge = set(), [waiting.pop()]
        while edge:
            node = edge.pop()
            part.add(node)
            near = {*node.all_input_nodes, *node.users} & waiting
            waiting -= near
            edge += near
        parts.append(part)
    return parts
