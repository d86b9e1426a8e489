// Search by name, module, operator and source line, over everything; words may stand in any order.

const groupTexts = groups.map((group) => [
  group.name, group.purposes.join(" "), ...group.members.flatMap((m) => [`${m.name}[${m.dim}]`, ...m.where]), ...group.where,
  group.is_cross_channel ? "cross-channel" : "", group.n_blocks > 1 ? "balanced" : "", group.reason || "",
].join("\n").toLowerCase());
const nodeTexts = nodes.map((node) => [node.name, node.state, node.operator, node.module, node.source].join("\n").toLowerCase());
const fixedTexts = fixed.map((entry) => `${entry.name}[${entry.dim}]\n${entry.reason}`.toLowerCase());

function matches(texts, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  texts.forEach((text, i) => { if (words.every((word) => text.includes(word))) found.push(i); });
  return found;
}

function searchAll(query) {
  const drawn = levels[levels.length - 1].cardOf;
  return {
    groups: matches(groupTexts, query),
    nodes: matches(nodeTexts, query).filter((n) => drawn.has(n)),
    fixed: matches(fixedTexts, query),
  };
}
