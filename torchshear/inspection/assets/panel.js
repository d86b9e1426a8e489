// Lists and details beside the network. Everything of the model goes in as text, never as markup.

const LIST_LIMIT = 200;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key === "onclick") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function swatch(group) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  if (group !== null) made.style.background = groupColour(group);
  return made;
}

// A name that lines break after its dots, not anywhere.
function breakable(name) {
  return element("span", {}, ...name.split(/(?<=[._])/).flatMap((part, i) => (i ? [element("wbr"), part] : [part])));
}

function row({ group = null, name, number = "", about = "", choose, key }) {
  const made = element("button", { type: "button", class: "row", "data-key": key },
    swatch(group), element("span", { class: "name" }, breakable(name)), element("span", { class: "number" }, String(number)),
    about && element("span", { class: "about" }, about));
  made.addEventListener("click", choose);
  return made;
}

function groupRow(i) {
  const group = groups[i];
  const made = row({ group: i, name: group.name, number: group.width, about: aboutGroup(group), choose: () => selectGroup(i), key: `group-${i}` });
  made.addEventListener("pointerenter", () => point({ group: i }));
  made.addEventListener("pointerleave", () => point(null));
  return made;
}

function aboutGroup(group) {
  const words = [count(group.members.length, "member")];
  if (group.n_blocks > 1) words.push(`${group.n_blocks} balanced blocks`);
  if (group.is_cross_channel) words.push("cross-channel");
  if (group.reason) words.push(group.reason);
  return words.join(" \u00b7 ");
}

function nodeRow(n) {
  const node = nodes[n];
  const about = [node.state ? node.kind : node.module, node.source].filter(Boolean).join(" \u00b7 ");
  return row({ group: node.groups[0] ?? null, name: nodeTitle(node), number: compactShape(node), about, choose: () => selectNode(n), key: `node-${n}` });
}

function fixedRows(numbers) {
  const byReason = new Map();
  for (const i of numbers) byReason.set(fixed[i].reason, [...(byReason.get(fixed[i].reason) || []), i]);
  const made = [];
  for (const [reason, entries] of byReason) {
    made.push(element("p", { class: "note" }, `${reason}:`));
    for (const i of entries) {
      const { name, dim, size } = fixed[i];
      made.push(row({ name: `${name}[${dim}]`, number: size, choose: () => selectNode(stateNode.get(name)), key: `fixed-${i}` }));
    }
  }
  return made;
}

function section(title, items, make, limit = LIST_LIMIT) {
  if (!items.length) return [];
  const rest = items.length > limit ? [element("p", { class: "note" }, `and ${items.length - limit} more`)] : [];
  return [element("h2", {}, `${title} (${items.length})`), ...make(items.slice(0, limit)), ...rest];
}

function showList() {
  const list = $("list"), each = (make) => (items) => items.map(make);
  $("tabs").hidden = Boolean(state.query);
  for (const tab of ["groups", "fixed"]) $(`tab-${tab}`).setAttribute("aria-pressed", String(state.tab === tab));
  let content;
  if (state.query) {
    const found = searchAll(state.query);
    content = [
      ...section("Groups", found.groups, each(groupRow)),
      ...section("Operators and tensors", found.nodes, each(nodeRow)),
      ...section("Fixed", found.fixed, fixedRows),
    ];
    if (!content.length) content = [element("p", { class: "note" }, "Nothing has this in its name, module, operator or source line.")];
  } else if (state.tab === "groups") {
    content = groups.map((_, i) => groupRow(i));
    if (!groups.length) content = [element("p", { class: "note" }, "No dimension of this network can shrink. \u201cFixed\u201d says why.")];
  } else {
    content = fixedRows(fixed.map((_, i) => i));
    if (!fixed.length) content = [element("p", { class: "note" }, "No dimension of a parameter is fixed.")];
  }
  list.replaceChildren(...content);
  markList();
}

function markList() {
  for (const marked of $("list").querySelectorAll("[aria-current]")) marked.removeAttribute("aria-current");
  const key = state.node !== null ? `node-${state.node}` : `group-${state.group}`;
  const current = $("list").querySelector(`[data-key="${key}"]`) || $("list").querySelector(`[data-key="group-${state.group}"]`);
  if (!current) return;
  current.setAttribute("aria-current", "true");
  current.scrollIntoView({ block: "nearest" });
}

function showPanel() {
  const parts = [];
  if (state.node !== null) parts.push(...nodePanel(state.node));
  else if (state.card !== null) parts.push(...cardPanel(state.card));
  if (state.group !== null) parts.push(...groupPanel(state.group));
  $("panel").replaceChildren(...(parts.length ? parts : overviewPanel()));
  $("panel").scrollTop = 0;
}

function overviewPanel() {
  const prunable = groups.filter((group) => group.is_prunable).length;
  return [
    element("h2", {}, "Overview"),
    element("p", { class: "code muted" }, data.model),
    element("table", {}, element("tbody", {},
      ...[["parameters", data.n_params.toLocaleString("en")], ["MACs a sample", data.macs.toLocaleString("en")],
        ["channel groups", String(groups.length)], ["of which can shrink", String(prunable)],
        ["fixed dimensions", String(fixed.length)], ["operators and tensors", nodes.length.toLocaleString("en")]]
        .map(([name, value]) => element("tr", {}, element("td", { class: "muted" }, name), element("td", { class: "number" }, value))))),
    element("h3", {}, "How to read it"),
    element("p", {}, "Each colour is a channel group: units that are cut together, wherever the colour runs. Grey cannot shrink."),
    element("p", {}, "Point at an operator, a tensor or a group to see its way through the network; click to keep it and to read the details here."),
    element("p", {}, "A strip of several colours is a value with several groups, as attention has heads and head dimensions. Lines beside the cards lead to operators further down; a dotted line is a weight that is read again."),
    data.mode === "train" ? element("p", { class: "muted" }, "Drawn as captured in train mode, which reads more of the model than eval mode does.") : "",
  ].filter(Boolean);
}

function groupPanel(i) {
  const group = groups[i];
  return [
    element("div", { class: "title" }, swatch(i), element("h2", {}, breakable(group.name))),
    element("p", { class: "muted" }, `Group ${group.number}: ${count(group.width, "unit")}, of which ${group.max_cut} can go. ` +
      `Its parameters hold ${short(group.n_params)} elements; a unit takes ${short(group.unit_params)} along.`),
    element("div", { class: "tags" }, ...groupTags(group)),
    element("h3", {}, "Constraints"),
    element("ul", {}, ...group.constraints.map((constraint) => element("li", {},
      element("b", {}, `${constraint.kind}: `), constraint.text, ...places(constraint.where)))),
    element("h3", {}, `Members (${group.members.length})`),
    membersTable(group.members),
  ];
}

function groupTags(group) {
  const tag = (text, kind = "") => element("span", { class: `tag ${kind}` }, text);
  return [
    tag(group.role),
    ...group.purposes.map((purpose) => tag(purpose, "muted")),
    group.n_blocks > 1 ? tag(`${group.n_blocks} balanced blocks`, "warn") : "",
    group.is_cross_channel ? tag("cross-channel", "warn") : "",
    group.is_prunable ? "" : tag("cannot shrink", "warn"),
  ].filter(Boolean);
}

function places(where, limit = 6) {
  if (!where.length) return [];
  const rest = where.length > limit ? [element("li", { class: "muted" }, `and ${where.length - limit} more`)] : [];
  return [element("ul", { class: "code muted" }, ...where.slice(0, limit).map((place) => element("li", {}, shortPlace(place))), ...rest)];
}

// "conv2d in layer1.0.conv1 (resnet.py:143)"
function shortPlace(place) {
  return place.replace(/^aten\.(\w+)\.\w+/, "$1").replace(/ in module '(.*?)'/, " in $1");
}

function membersTable(members) {
  const limit = 400, head = ["dimension", "purpose", "positions"];
  const rows = members.slice(0, limit).map((member) => element("tr", {},
    element("td", {}, nodeLink(stateNode.get(member.name), `${member.name}[${member.dim}]`),
      ...member.where.slice(0, 3).map((place) => element("div", { class: "code muted" }, shortPlace(place))),
      member.where.length > 3 ? element("div", { class: "muted" }, `and ${member.where.length - 3} more`) : ""),
    element("td", { class: "purpose" }, ...member.purposes.map((purpose) => element("div", {}, purpose))),
    element("td", { class: "number", title: `unit 0: ${member.first}` }, positions(member))));
  if (members.length > limit) rows.push(element("tr", {}, element("td", { colspan: "3" }, `and ${members.length - limit} more`)));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows));
}

function positions(member) {
  const part = member.n_positions === member.size ? String(member.size) : `${member.n_positions} of ${member.size}`;
  return member.multiplicity > 1 ? `${part}, ${member.multiplicity} a unit` : part;
}

function nodeLink(n, text) {
  return n === undefined ? element("span", {}, text) : element("button", { type: "button", class: "link", onclick: () => selectNode(n) }, breakable(text));
}

function nodePanel(n) {
  const node = nodes[n], facts = [];
  if (node.operator) facts.push(["operator", node.operator]);
  if (node.module) facts.push(["module", node.module]);
  if (node.source) facts.push(["source line", node.source]);
  if (!node.operator) facts.push(["kind", node.kind]);
  return [
    element("h2", {}, breakable(nodeTitle(node))),
    element("table", {}, element("tbody", {}, ...facts.map(([name, value]) =>
      element("tr", {}, element("td", { class: "muted" }, name), element("td", { class: "code" }, value))))),
    node.is_cross_channel ? element("div", { class: "tags" }, element("span", { class: "tag warn" }, "statistic over channels")) : "",
    ...node.tensors.slice(0, 12).flatMap((dimensions, i) => tensorTable(dimensions, node.tensors.length > 1 ? `Tensor ${i}` : "Dimensions")),
    node.tensors.length > 12 ? element("p", { class: "muted" }, `and ${node.tensors.length - 12} more tensors`) : "",
    state.group === null ? "" : element("h3", {}, "Its group"),
  ].filter(Boolean);
}

function tensorTable(dimensions, title) {
  const rows = dimensions.map(([size, along, reason], dim) => element("tr", {},
    element("td", { class: "number muted" }, String(dim)), element("td", { class: "number" }, String(size)),
    element("td", {}, ...alongDimension(size, along, reasons[reason]))));
  if (!rows.length) rows.push(element("tr", {}, element("td", { class: "muted" }, "a single number")));
  return [element("h3", {}, title), element("table", {}, element("tbody", {}, ...rows))];
}

function alongDimension(size, along, reason) {
  const made = along.map((g) => element("div", {}, element("button", {
    type: "button", class: "link", onclick: () => selectGroup(g, true) }, swatch(g), breakable(groups[g].name))));
  if (reason) made.push(element("div", { class: "muted" }, along.length ? `in part fixed: ${reason}` : `fixed: ${reason}`));
  if (!made.length) made.push(element("span", { class: "muted" }, size === 1 ? "of size 1" : "no parameter's channels"));
  return made;
}

function cardPanel(i) {
  const card = currentLevel().cards[i];
  const inner = [...new Set(levels[levels.length - 1].cards
    .filter((other) => card.nodes.includes(other.nodes[0])).flatMap((other) => [...groupsOfCard(other), ...other.chips.flatMap((n) => nodes[n].groups)]))];
  return [
    element("h2", {}, breakable(card.title)),
    element("p", { class: "muted" }, `${count(card.nodes.length, "operator")}: ${card.subtitle}`),
    element("p", {}, element("button", { type: "button", onclick: () => expand(i) }, "Show its operators")),
    element("h3", {}, `Groups in it (${inner.length})`),
    ...inner.map((g) => element("p", {}, element("button", { type: "button", class: "link", onclick: () => selectGroup(g, true) }, swatch(g), breakable(groups[g].name)),
      ` (${groups[g].width})`)),
    state.group === null ? "" : element("h3", {}, "Selected group"),
  ].filter(Boolean);
}
