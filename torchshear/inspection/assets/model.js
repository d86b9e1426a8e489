// The data of the page and what is looked up in it often.

const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, groups, fixed, reasons, levels } = data;

for (const group of groups) {
  group.members = group.members.map(([tensor, dim, purposes, size, n_positions, multiplicity, first]) => (
    { ...data.tensors[tensor], dim, purposes, size, n_positions, multiplicity, first }));
}

for (const node of nodes) {
  node.groups = [...new Set(node.tensors.flat().flatMap((dimension) => dimension[1]))];
}

const stateNode = new Map(); // qualified name of a tensor of the model -> number of its node
nodes.forEach((node, i) => { if (node.state) stateNode.set(node.state, i); });

for (const level of levels) {
  level.cardOf = new Map();
  level.cards.forEach((card, i) => { for (const n of [...card.nodes, ...card.chips]) level.cardOf.set(n, i); });
  for (const card of level.cards) card.groups = groupsOfCard(card);
  // Tensors of the model have no place of their own where their operators are drawn together.
  for (const card of levels[levels.length - 1].cards) {
    for (const chip of card.chips) if (!level.cardOf.has(chip)) level.cardOf.set(chip, level.cardOf.get(card.nodes[0]));
  }
}

function groupsOfCard(card) {
  return [...new Set([...[...card.nodes].reverse(), ...card.chips].flatMap((n) => nodes[n].groups))];
}

const nodesOfGroup = groups.map(() => []);
nodes.forEach((node, i) => { for (const group of node.groups) nodesOfGroup[group].push(i); });

function shortOperator(node) {
  const parts = node.operator.split(".");
  return parts.length > 1 ? parts[1] : node.operator;
}

function nodeTitle(node) {
  if (node.state) return node.state;
  return node.kind === "operator" ? shortOperator(node) : node.kind === "input" ? `input ${node.name}` : "output";
}

function shapeText(dimensions) {
  return dimensions.map((dimension) => dimension[0]).join(" \u00d7 ");
}

// Without the batch, which is the same everywhere and would fill the cards.
function compactShape(node) {
  if (node.tensors.length !== 1) return node.tensors.length ? `${node.tensors.length} tensors` : "";
  return node.tensors[0].map((dimension) => dimension[0]).filter((size) => size !== "batch").join("\u00d7");
}

function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

function short(number) {
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (number >= size) return `${(number / size).toPrecision(3)} ${letter}`;
  }
  return String(Math.round(number));
}
