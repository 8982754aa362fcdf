"""Variables whose value of the caller a chat template may see, from its syntax tree."""

from collections.abc import Sequence

from jinja2 import meta, nodes
from jinja2.visitor import NodeTransformer


def variables_read(tree: nodes.Template) -> frozenset[str]:
    """Variables that the template looks up before it sets them. The tree is changed."""
    _SetBefore().visit(tree)
    return frozenset(meta.find_undeclared_variables(tree))


class _SetBefore(NodeTransformer):
    """jinja looks up what an if sets, also where all of its branches do: what they set before they
    read it gets a value in front of the if.
    """

    def visit_If(self, node: nodes.If) -> list[nodes.Node]:  # jinja calls it
        self.generic_visit(node)
        branches = [node.body, *(other.body for other in node.elif_), node.else_]
        names = frozenset.intersection(*map(_set_in, branches))
        if names:
            tests: list[nodes.Node] = [nodes.Output([part.test]) for part in (node, *node.elif_)]
            names = names.difference(*(_looked_up(part, node) for part in (tests, *branches)))
        none = nodes.Const(None)
        sets = [nodes.Assign(nodes.Name(name, "store"), none) for name in sorted(names)]
        return [*(one.set_lineno(node.lineno) for one in sets), node]


def _set_in(body: Sequence[nodes.Node]) -> frozenset[str]:
    """Names that the statements of a branch set; what its own ifs set stands in front of them."""
    targets = [part.target for part in body if isinstance(part, nodes.Assign | nodes.AssignBlock)]
    return frozenset(target.name for target in targets if isinstance(target, nodes.Name))


def _looked_up(body: Sequence[nodes.Node], node: nodes.Node) -> set[str]:
    """Names that these parts of the node look up."""
    assert node.environment is not None, "a parser sets it"
    template = nodes.Template(list(body))
    template.set_environment(node.environment)
    return meta.find_undeclared_variables(template)
