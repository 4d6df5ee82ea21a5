"""Networks of other packages, cut into stages from outside with torch.fx (Reed et al., MLSys 2022)."""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from sakd.errors import ConfigError, did_you_mean
from sakd.imports import find
from sakd.networks.layouts import LayoutName
from sakd.networks.staged import StagedNet
from sakd.networks.tracing import LayerTracer
from sakd.ranges import Text

STAGE = (r"^\w+\.", "")  # a weight's name without it is the one that it has uncut
MODES = {True: "train", False: "eval"}


def foreign(
    build: str,
    arguments: Mapping[str, object],
    passes: Mapping[str, Text],
    family: Text,
    cuts: Mapping[str, Text],
    num_classes: int,
    in_channels: int,
    image_size: int,
    layouts: Mapping[str, LayoutName] | None = None,
    output: Text | int | None = None,
) -> StagedNet:
    """Build another package's network by its import path, as a StagedNet of the very same parameters.

    ``build`` is the import path, called with ``arguments``. ``passes`` says which of num_classes, in_channels
    and image_size are arguments of ``build`` too, and under what name. ``cuts`` says where ``stem, stage1 …
    stageN, embedding`` end; the logits are the rest. A cut is a module's path (``layer1``, ``features.3``),
    which stands for its output, or the name of a torch.fx node (``flatten``).

    ``layouts`` says of stages whose output is no map with its channels first what it is: ``NHWC``, as Swin's,
    or ``tokens``, as a ViT's (a square grid's, behind those of classes and registers). ``output`` says which
    are the logits of a network that returns several tensors: a key, or a place; or a module's path, whose
    output they are, and what they do not depend on is left out.

    The network does in training and in evaluation what it did uncut, operation for operation.

    Raises ConfigError if there is no such network, torch.fx cannot trace it, it cannot be cut there, or a map
    there has its channels last.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for key in passes:
        if key not in sizes:
            raise ConfigError(
                f"passes.{key}: no such key; expected some of {', '.join(sizes)}.{did_you_mean(key, sizes)}"
            )
    if "in_channels" not in passes and in_channels != 3:
        raise ConfigError(
            f"in_channels: found {in_channels}, {build} takes 3 (`passes` names no argument for them)"
        )
    network = _call(build, {**arguments, **{argument: sizes[key] for key, argument in passes.items()}})
    stages = cut(network, cuts, build, output)
    for stage in layouts or {}:
        if stage not in stages:
            near = did_you_mean(stage, stages)
            raise ConfigError(f"layouts.{stage}: no such stage; expected some of {', '.join(stages)}.{near}")
    staged = StagedNet(stages, family, (in_channels, image_size, image_size), [STAGE], layouts)
    if staged.classes != num_classes:
        raise ConfigError(
            f"num_classes: found {num_classes}, {build} has {staged.classes} outputs (see `passes`)"
        )
    _check_axes(staged, build)
    _keep_inputs(staged)
    return staged


def _call(path: str, arguments: Mapping[str, object]) -> nn.Module:
    try:
        build = find(path)
    except ImportError as error:
        raise ConfigError(f"build: {error}") from error
    if not callable(build):
        raise ConfigError(f"build: found {path}, a {type(build).__name__}, expected a function or a class")
    try:
        network = build(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        named = [name for name in arguments if f"'{name}'" in str(error)]
        key = f"arguments.{named[0]}" if len(named) == 1 else "arguments"
        raise ConfigError(f"{key}: {path} does not take {dict(arguments)} ({error})") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"build: {path} made a {type(network).__name__}, expected a network")
    return network


def cut(
    network: nn.Module, cuts: Mapping[str, str], name: str, output: str | int | None = None
) -> dict[str, nn.Module]:
    """Cut ``network`` into stages, by name; modules and parameters are shared with it.

    ``output`` as in ``foreign``; ``name`` is for errors. Raises ConfigError as ``foreign`` does.
    """
    for stage in cuts:
        if not re.fullmatch(r"stem|stage\d+|embedding", stage):
            raise ConfigError(f"cuts.{stage}: no such stage, expected stem, stage1, stage2, …, embedding")
    names = ["stem", *(f"stage{number}" for number in range(1, len(cuts) - 1)), "embedding"]
    if cuts.keys() != set(names) or len(names) < 3:
        raise ConfigError(
            f"cuts: found {', '.join(cuts) or 'none'}, expected stem, stage1, stage2, …, embedding"
        )
    cuts = {stage: cuts[stage] for stage in names}
    passes = {}
    for mode in MODES:
        trace = _Trace(network.train(mode), name, output)
        passes[mode] = trace.split(
            {stage: trace.find(place, f"cuts.{stage}") for stage, place in cuts.items()}
        )
    stages = {
        stage: Stage(network, {mode: graphs[stage] for mode, graphs in passes.items()})
        for stage in (*cuts, "logits")
    }
    owner: dict[str, str] = {}
    for stage, module in stages.items():
        for key in module.state_dict():
            if owner.setdefault(key, stage) != stage:
                raise ConfigError(
                    f"cuts: {key} would belong to {owner[key]} and {stage}; expected weights of one "
                    "stage each"
                )
    for key in network.state_dict():
        if key not in owner:  # nothing uses it, but files hold it
            _adopt(stages["logits"], network, key)
    return stages


class _Trace(LayerTracer):
    """The graph of a network in its present mode, and what each module returned."""

    def __init__(self, network: nn.Module, name: str, output: str | int | None):
        super().__init__()
        self.name = f"{name} (in {MODES[network.training]} mode)"
        self.returned: dict[str, list[fx.Node]] = {}
        self.whole: dict[str, Exception] = {}
        before, random = _writes(network), torch.get_rng_state()
        try:
            graph = self.trace(network)
        except Exception as error:  # a forward may fail on a symbolic tensor with any kind
            raise ConfigError(f"build: torch.fx cannot trace {self.name}: {error}") from error
        after = _writes(network)
        changed = [
            key
            for key, (value, writes) in before.items()
            if after[key][0] is not value or after[key][1] != writes
        ]
        # Tracing did it once, and the graph never would.
        if changed or not torch.equal(torch.get_rng_state(), random):
            what = f"changes {changed[0]}" if changed else "draws random numbers"
            raise ConfigError(
                f"build: torch.fx cannot trace {self.name}: a forward that is no layer's {what} by itself"
            )
        self._know(graph)
        graph.output_node().args = (self._logits(output),)
        if output is not None:
            graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
            self._know(graph)

    def _know(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        kept = {path: [node for node in nodes if node in self.place] for path, nodes in self.returned.items()}
        self.returned = {path: nodes for path, nodes in kept.items() if nodes}

    def _logits(self, output: str | int | None) -> fx.Node:
        """The logits in what is returned. Raises ConfigError unless ``output`` says which they are."""
        returned = self.nodes[-1].args[0]
        if isinstance(returned, fx.Node):  # logits alone, perhaps in one of the modes
            return self.find(output, "output") if output in self.returned else returned
        try:
            chosen = returned[output]
        except (LookupError, TypeError):
            chosen = None
        if not isinstance(chosen, fx.Node):
            key, expected = ("build", "or `output`, which of them they are")
            if output is not None:
                key, expected = ("output", f"found {output!r}, which is none of them")
            raise ConfigError(f"{key}: {self.name} returns {returned}; expected logits alone, {expected}")
        return chosen

    def create_args_for_root(
        self, forward: Callable, is_module: bool, concrete_args: object = None
    ) -> tuple[Callable, list]:
        """Make images the only input; other arguments of ``forward`` have their defaults."""
        return forward, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Trace into a module, as fx.Tracer does; but one that cannot be traced stays whole."""
        path, recorded, stack = self.path_of_module(module), len(self.graph.nodes), self.module_stack.copy()
        try:
            output = super().call_module(module, forward, args, kwargs)
        except Exception as error:  # of any kind, as above
            for node in reversed(list(self.graph.nodes)[recorded:]):
                self.graph.erase_node(node)
            self.module_stack = stack
            output = self.create_proxy("call_module", path, args, kwargs)
            self.whole[path] = error
        nodes: list[fx.Node] = []
        fx.node.map_aggregate(
            output, lambda value: nodes.append(value.node) if isinstance(value, fx.Proxy) else None
        )
        self.returned.setdefault(path, []).extend(nodes)
        return output

    def find(self, place: str, key: str) -> fx.Node:
        """The node that users call ``place``. Raises ConfigError, naming ``key``, unless there is one."""
        found = dict.fromkeys(
            [*self.returned.get(place, []), *(node for node in self.nodes if node.name == place)]
        )
        if len(found) > 1:
            raise ConfigError(f"{key}: '{place}' stands for several tensors: {', '.join(map(str, found))}")
        for path, error in self.whole.items():
            if place.startswith(f"{path}."):
                raise ConfigError(f"{key}: '{place}' lies in '{path}', which torch.fx cannot trace ({error})")
        if not found:
            own = [
                node.name
                for node in self.nodes
                if node.op == "call_function" and not node.meta.get("nn_module_stack")
            ]
            near = did_you_mean(place, [*self.returned, *(node.name for node in self.nodes)])
            listed = [path for path in self.returned if path.count(".") < 2] + own
            raise ConfigError(
                f"{key}: {self.name} has no '{place}'.{near} Some that it has: {', '.join(listed)}"
            )
        return next(iter(found))

    def split(self, ends: Mapping[str, fx.Node]) -> dict[str, fx.Graph]:
        """A graph for each stage, from one tensor to one tensor; run in order, they are the whole graph.

        Raises ConfigError where a cut at ``ends`` would not leave such graphs.
        """
        *_, output = self.nodes
        stages = {**ends, "logits": output}
        for (stage, end), (following, following_end) in pairwise(stages.items()):
            last = self.place[end]
            if last >= self.place[following_end] or end is output.args[0]:
                rest = f"'{following_end}'" if following != "logits" else "the logits"
                raise ConfigError(f"cuts.{stage}: '{end}' does not run before {rest}, where {following} ends")
            crossing = [
                node.name for node in self.nodes[:last] if any(self.place[user] > last for user in node.users)
            ]
            if crossing:
                raise ConfigError(
                    f"cuts.{stage}: more than one tensor runs through a cut behind '{end}': "
                    f"{', '.join([*crossing, end.name])}"
                )
        graphs, start = {}, self.nodes[0]
        for stage, end in stages.items():
            graphs[stage] = graph = fx.Graph()
            copies = {start: graph.placeholder("x")}
            for node in self.nodes[self.place[start] + 1 : self.place[end] + 1]:
                copies[node] = graph.node_copy(node, copies.__getitem__)
            if end is not output:
                graph.output(copies[end])
            start = end
        return graphs


def _writes(network: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Parameters and buffers by name, each with how often it was written."""
    return {
        key: (value, value._version) for key, value in (*network.named_parameters(), *network.named_buffers())
    }


class Stage(nn.Module):
    """Part of a network: its modules and weights under their own names, and its forward in either mode.

    It is no torch.fx.GraphModule: that has one graph, whatever the mode.
    """

    def __init__(self, network: nn.Module, graphs: Mapping[bool, fx.Graph]):
        super().__init__()
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    _adopt(self, network, node.target)
        self._forward = {mode: type(fx.GraphModule(network, graph)).forward for mode, graph in graphs.items()}
        self._overwrites = False

    def forward(self, x: Tensor) -> Tensor:
        return self._forward[self.training](self, x.clone() if self._overwrites else x)


def _adopt(stage: nn.Module, network: nn.Module, path: str) -> None:
    """Make what is at ``path`` of ``network`` one of ``stage``, under the same path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in stage._modules:
            stage.add_module(parent, nn.Module())
        stage, network = getattr(stage, parent), getattr(network, parent)
    value = getattr(network, name)
    if isinstance(value, nn.Module):
        stage.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        stage.register_parameter(name, value)
    else:  # a buffer, or a constant that tracing found
        persistent = name in network._buffers and name not in network._non_persistent_buffers_set
        stage.register_buffer(name, value, persistent)


# Which axes of a map are height and width: for a square image they are as long as each other, and the
# channels mostly of another length. Where that leaves a doubt, a larger image tells, since its maps are
# larger. A network that takes images of one size alone is judged by lengths: where all are equal, it passes.
def _check_axes(staged: StagedNet, name: str) -> None:
    """Raise ConfigError for a stage whose maps are not channels, height, width."""
    shapes = {stage: shape for stage, shape in staged.shapes.items() if len(shape) == 3}
    doubtful = {stage: (c, h, w) for stage, (c, h, w) in shapes.items() if h != w or c == h}
    larger = _shapes_of_a_larger_image(staged) if doubtful else {}
    for stage, (c, h, w) in doubtful.items():
        if stage not in larger:
            wrong = h != w
        elif larger[stage] == (c, h, w):  # pooled to this size
            wrong = c == h != w
        else:
            wrong = larger[stage][0] != c or larger[stage][2] == w
        if wrong:
            raise ConfigError(
                f"cuts.{stage}: found maps of {c}x{h}x{w} in {name}, not channels x height x width; expected "
                "the channels first, as convolutions have them"
            )


def _shapes_of_a_larger_image(staged: StagedNet) -> dict[str, tuple[int, ...]]:
    """Shapes of all stages' outputs for an image of twice the size; none if the network does not take it."""
    channels, height, width = staged.input_shape
    training = staged.training
    try:
        with torch.no_grad():
            outputs = staged.eval().features(torch.zeros(1, channels, 2 * height, 2 * width))
    except Exception:  # of any kind: it is another package's
        return {}
    finally:
        staged.train(training)
    return {stage: tuple(output.shape[1:]) for stage, output in outputs.items()}


@torch.no_grad()
def _keep_inputs(staged: StagedNet) -> None:
    """Let stages that begin in place copy their input: no stage overwrites the output of the one before.

    Tensors count how often they were written, which tells those stages. No buffer is moved by this, and no
    random stream.
    """
    training = staged.training
    with torch.random.fork_rng(devices=[]):
        for mode in MODES:
            staged.train(mode)
            before_stages = {None: staged.input_shape, **staged.shapes}
            for stage, (before, shape) in zip(staged, before_stages.items(), strict=False):
                x = torch.zeros(2, *shape)
                if before in staged.layouts:
                    x = staged.layouts[before](x).contiguous()
                writes = x._version
                functional_call(stage, {name: buffer.clone() for name, buffer in stage.named_buffers()}, (x,))
                stage._overwrites |= x._version != writes
    staged.train(training)
