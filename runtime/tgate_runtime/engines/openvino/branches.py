"""Graphs that read the same weights as branches of one model, in which they are packed once.

OpenVINO packs weights for the processor when it compiles a model, and keeps a packed copy for each constant. Within one
compiled model, bodies of ``If`` among it, constants of the same memory share that copy. What it makes of a constant
before it packs it, such as its numbers in the precision of the computation, has memory of its own: so constants come
here in that precision already, with a conversion behind them that is marked as one that decompresses, and which
OpenVINO leaves to the packing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from tgate_engine.dtypes import DTYPES, decode, encode, storage

BRANCH = "branch"
"""The input that says which graph runs, a number from 0."""
_DECOMPRESSION = "decompression_0"
"""OpenVINO's mark on a conversion that stays where it is."""

_Key = tuple[str, str, str]
"""What is one input or output of the whole: a tensor's name, its shape (sizes of a bundle differ in it) and dtype."""


@dataclass(frozen=True)
class Ports:
    """Where a graph is found in a compiled model: its branch, or None where the model is that graph alone, and the
    model's inputs and outputs by the names of the graph's tensors."""

    branch: int | None
    names: Mapping[str, str]


def which_share(models: Sequence[Any], weights: Collection[str]) -> list[bool]:
    """Of each model, whether it reads one of the ``weights`` that another one reads, too."""
    read = [{node.get_friendly_name() for node in constants(model)}.intersection(weights) for model in models]
    readers = Counter(name for names in read for name in names)
    return [any(readers[name] > 1 for name in names) for names in read]


def share_weights(models: Sequence[Any], weights: Collection[str], precision: str) -> list[Any]:
    """Have the models read one constant of each of ``weights``, in ``precision``, one of a bundle's dtypes.

    What is given back holds their memory: it is to live as long as the models, and whatever is compiled of them.
    """
    shared: dict[str, Any] = {}
    memory = []
    for model in models:
        for constant in constants(model):
            name, dtype = constant.get_friendly_name(), constant.get_element_type()
            if name not in weights or not dtype.is_real():
                continue
            if name not in shared:
                shared[name], owner = _in(constant, precision)
                memory.append(owner)
            value = ov.op.Constant(shared[name], True)
            value.set_friendly_name(name)
            if dtype != value.get_element_type():
                value = ops.convert(value, dtype.get_type_name())
                value.get_rt_info()[_DECOMPRESSION] = ""
            put(constant.output(0), value)
    return memory


def join(models: Sequence[Any], names: Sequence[Collection[str]]) -> tuple[Any, list[Ports]]:
    """One model that runs one of ``models``, and where each of them is in it. ``names``: what each one's inputs and
    outputs are called by whoever runs it, where they have several names.

    The models are taken apart. Inputs of the same name, shape and dtype become one, and so do outputs; a branch leaves
    inputs of others unread, and gives others' outputs without a single number.
    """
    bodies = []
    for model, known in zip(models, names, strict=True):
        _plain_norms(model)
        results = zip(model.outputs, model.get_results(), strict=True)
        bodies.append(
            _Body(
                {_key(port, known): port.get_node() for port in model.inputs},
                {_key(port, known): result for port, result in results},
            )
        )
    ports = [Ports(number, body.port_names()) for number, body in enumerate(bodies)]
    kinds = {key: result for body in bodies for key, result in body.results.items()}
    for body in bodies:
        body.results = {key: body.results.get(key) or _nothing(result) for key, result in kinds.items()}
    whole, choice = _choice(bodies, 0)
    _call(choice, BRANCH)
    for nodes, kind in ((whole.inputs, "in"), (whole.results, "out")):
        for key, node in nodes.items():
            _call(node, _port_name(kind, key))
    return ov.Model([*whole.results.values()], [choice, *whole.inputs.values()], "branches"), ports


@dataclass
class _Body:
    """The inputs and results of a graph, or of a choice between graphs."""

    inputs: dict[_Key, Any]
    results: dict[_Key, Any]

    def model(self, choice: Any = None) -> Any:
        """The body as a model, with the input that it chooses by where it does."""
        choices = [] if choice is None else [choice]
        return ov.Model([*self.results.values()], [*choices, *self.inputs.values()], "body")

    def port_names(self) -> dict[str, str]:
        """Of the whole's inputs and outputs, by the tensors' own names."""
        inputs = {key[0]: _port_name("in", key) for key in self.inputs}
        return inputs | {key[0]: _port_name("out", key) for key in self.results}


def _choice(bodies: Sequence[_Body], first: int) -> tuple[_Body, Any]:
    """A body of all, the first of which has the number ``first``, and the input that chooses, None where there is but
    one. A tree, since whatever goes in and out is copied at each level."""
    if len(bodies) == 1:
        return bodies[0], None
    middle = len(bodies) // 2
    then, then_choice = _choice(bodies[:middle], first)
    other, other_choice = _choice(bodies[middle:], first + middle)
    choice = ops.parameter([], np.int32)
    either = ops.if_op(ops.less(choice, ops.constant(np.int32(first + middle))).output(0))
    models = then.model(then_choice), other.model(other_choice)
    either.set_then_body(models[0])
    either.set_else_body(models[1])
    if then_choice is not None or other_choice is not None:
        either.set_input(choice.output(0), then_choice, other_choice)
    inputs = {}
    for key in then.inputs | other.inputs:
        inner = then.inputs.get(key), other.inputs.get(key)
        one: Any = inner[0] or inner[1]
        inputs[key] = ops.parameter(one.get_partial_shape(), one.get_element_type())
        either.set_input(inputs[key].output(0), *inner)
    pairs = zip(models[0].get_results(), models[1].get_results(), strict=True)
    results = {key: ops.result(either.set_output(*pair)) for key, pair in zip(then.results, pairs, strict=True)}
    return _Body(inputs, results), choice


def _nothing(result: Any) -> Any:
    """A result of as many dimensions without a number in it."""
    value, dtype = result.input_value(0), result.get_element_type()
    return ops.result(ov.op.Constant(ov.Tensor(dtype, ov.Shape([0] * value.get_partial_shape().rank.get_length()))))


def _plain_norms(model: Any) -> None:
    """Write group normalisations in plainer operators: in a body of ``If`` OpenVINO has no kernel for them."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        values, scale, bias = node.input_values()
        settings = node.get_attributes()
        rank = values.get_partial_shape().rank.get_length()
        of_channels = ops.constant(np.array([1, -1] + [1] * (rank - 2), np.int64))
        grouped = ops.reshape(values, ops.constant(np.array([0, settings["num_groups"], -1], np.int64)), True)
        axis = ops.constant(np.array([2], np.int64))
        normal = ops.mvn(grouped, axis, True, settings["epsilon"], "inside_sqrt")
        scaled = ops.multiply(
            ops.reshape(normal, ops.shape_of(values, "i64"), False), ops.reshape(scale, of_channels, False)
        )
        put(node.output(0), ops.add(scaled, ops.reshape(bias, of_channels, False)))


def _in(constant: Any, precision: str) -> tuple[Any, Any]:
    """A constant's numbers as a tensor in that precision, and what holds its memory."""
    own = constant.get_tensor_view()
    short = own.element_type.get_type_name()
    dtype = next(name for name, each in DTYPES.items() if each.short == short)
    if dtype == precision:
        return own, constant
    bits = np.frombuffer(own.data, storage(dtype))
    values = encode(decode(bits, dtype), precision)
    return ov.Tensor(values, own.shape, getattr(ov.Type, DTYPES[precision].short)), values


def constants(model: Any) -> list[Any]:
    """The constants of a model."""
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]


def put(old: Any, new: Any) -> None:
    """Have whatever reads the output ``old`` read that of the node ``new``."""
    for reader in old.get_target_inputs():
        reader.replace_source_output(new.output(0))


def name_of(port: Any, names: Collection[str]) -> str:
    """What a port is called: of several names, which it has where the engine left out what changes nothing between
    them, the one in ``names``."""
    return next((name for name in sorted(port.names) if name in names), str(port.any_name))


def _call(node: Any, name: str) -> None:
    node.output(0).get_tensor().set_names({name})


def _port_name(kind: str, key: _Key) -> str:
    return ":".join((kind, *key))


def _key(port: Any, known: Collection[str]) -> _Key:
    return name_of(port, known), str(port.get_partial_shape()), port.get_element_type().get_type_name()
