"""What torch.compile records."""

import torch


def recorded_calls(function, *arguments, dynamic: bool) -> list[str]:
    """The targets of the nodes of the one program that a call of the compiled `function` makes."""
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*arguments)
    return calls
