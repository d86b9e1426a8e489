"""Draw the group graphs of docs/how-it-works.md: `python docs/draw_groups.py`."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn import functional

import torchshear

PALETTE = ("#1b6ca8", "#d1495b", "#edae49", "#3a7d44", "#7b4b94")
FIXED = "#c9ced6"


class Residual(nn.Module):
    """The residual example of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """The attention example of the page."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


def draw(axes: plt.Axes, model: nn.Module, x: Tensor, title: str) -> None:
    """Draw one network: operators and weights as nodes, coloured by their groups, execution from left to right."""
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    network = groups.to_networkx()
    network.remove_nodes_from([name for name in list(network) if name.endswith("_bias") or name.startswith("sym_size")])
    colours = {group.name: PALETTE[i % len(PALETTE)] for i, group in enumerate(groups)}
    layers = list(nx.topological_generations(nx.DiGraph(network)))
    depth = {node: i for i, layer in enumerate(layers) for node in layer}
    for node in network:
        if network.in_degree(node) == 0:
            depth[node] = max(0, min(depth[user] for user in network.successors(node)) - 1)
    columns: dict[int, list[str]] = {}
    for node in network:
        columns.setdefault(depth[node], []).append(node)
    place = {
        node: (level, ((len(column) - 1) / 2 - row) + (0.35 if level % 2 else -0.35))
        for level, column in columns.items()
        for row, node in enumerate(sorted(column, key=lambda n: network.nodes[n]["kind"] == "operator"))
    }
    nx.draw_networkx_edges(network, place, ax=axes, edge_color="#8a93a0", arrowsize=9, node_size=1500, width=0.9)
    for node, (left, height) in place.items():
        names = json.loads(network.nodes[node]["groups"])
        shape = "round,pad=0.35" if network.nodes[node]["kind"] == "operator" else "square,pad=0.35"
        fill = colours[names[0]] if names else FIXED
        edge = colours[names[1]] if len(names) > 1 else fill
        dark = bool(names) and fill != "#edae49"
        style = {"boxstyle": shape, "fc": fill, "ec": edge, "lw": 2.5 if len(names) > 1 else 0.5}
        ink = "white" if dark else "#222"
        label = node.replace("scaled_dot_product_attention", "attention").replace("_weight", "\nweight")
        axes.text(left, height, label, ha="center", va="center", fontsize=7.5, bbox=style, color=ink)
    square = {"marker": "s", "ls": "", "ms": 9}
    keys = [Line2D([], [], color=colours[g.name], label=f"{g.name}  ({g.width})", **square) for g in groups]
    keys.append(Line2D([], [], color=FIXED, label="fixed", **square))
    if any(len(json.loads(network.nodes[node]["groups"])) > 1 for node in network):
        keys.append(Line2D([], [], mfc="white", mec="#444", mew=2, label="border: second group", **square))
    axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncol=5, frameon=False, fontsize=9)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlim(-0.7, max(depth.values()) + 0.7)
    axes.set_ylim(min(y for _, y in place.values()) - 0.6, max(y for _, y in place.values()) + 0.6)
    axes.axis("off")


def main() -> None:
    """Write docs/images/groups.png."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(13, 7.5), layout="constrained")
    draw(top, Residual(), torch.randn(2, 3, 8, 8), "A residual block: the sum ties stem and two")
    draw(
        bottom, Attention(), torch.randn(2, 5, 24), "Attention: heads and head dimensions are two groups of one weight"
    )
    target = Path(__file__).parent / "images" / "groups.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
