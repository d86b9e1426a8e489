// What people do: pointer, keys, buttons, and the address of the page.

function announce(text) { $("announce").textContent = text; }

function update() {
  showPanel();
  markList();
  writeAddress();
  requestDraw(1);
}

function selectGroup(i, keep = false) {
  state.group = i;
  if (!keep) { state.node = null; state.card = null; }
  state.hover = null;
  update();
  if (!keep) { fitTo(cardsOfGroup(i)); announce(`Group ${i}, ${groups[i].name}, ${count(groups[i].width, "unit")}`); }
}

function selectNode(n) {
  if (n === undefined) return;
  if (currentLevel().cardOf.get(n) === undefined) setLevel(levels.length - 1);
  state.node = n;
  state.card = currentLevel().cardOf.get(n) ?? null;
  if (!nodes[n].groups.includes(state.group)) state.group = nodes[n].groups[0] ?? null;
  state.hover = null;
  update();
  if (state.card !== null) reveal(currentLevel().cards[state.card]);
  announce(`${nodeTitle(nodes[n])}, ${nodes[n].module}, ${nodes[n].groups.map((g) => groups[g].name).join(", ") || "no group"}`);
}

function selectCard(i) {
  const card = currentLevel().cards[i];
  if (card.nodes.length === 1) { selectNode(card.nodes[0]); return; }
  state.card = i;
  state.node = null;
  state.group = groupsOfLast(card)[0] ?? null;
  update();
  reveal(card);
  announce(`${card.title}, ${count(card.nodes.length, "operator")}`);
}

function clearSelection() {
  Object.assign(state, { group: null, node: null, card: null, hover: null });
  update();
}

function expand(i) {
  const inner = new Set(currentLevel().cards[i].nodes);
  setLevel(levels.length - 1);
  state.card = null;
  update();
  fitTo(currentLevel().cards.filter((card) => inner.has(card.nodes[0])));
}

function setLevel(i) {
  if (i < 0 || i >= levels.length || i === state.level) return;
  state.level = i;
  state.hover = null;
  state.card = state.node === null ? null : currentLevel().cardOf.get(state.node) ?? null;
  findCards();
  [...$("levels").children].forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
  showPanel();
  writeAddress();
  fitTo(state.group !== null && cardsOfGroup(state.group).length ? cardsOfGroup(state.group) : currentLevel().cards);
}

function findCards() {
  state.found = new Set(state.query ? matches(nodeTexts, state.query).map((n) => currentLevel().cardOf.get(n)) : []);
  state.found.delete(undefined);
}

function setQuery(text) {
  state.query = text.trim();
  findCards();
  showList();
  requestDraw(1);
}

function point(hover) {
  const same = JSON.stringify(hover) === JSON.stringify(state.hover);
  state.hover = hover;
  if (!same) requestDraw(1);
}

function showTip(event, hit) {
  const tip = $("tip");
  tip.hidden = !hit;
  if (!hit) { tip.dataset.key = ""; return; }
  const key = `${state.level}.${hit.card}.${hit.node}`;
  if (tip.dataset.key !== key) { tip.dataset.key = key; tip.replaceChildren(...tipLines(hit)); }
  const box = stage.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const left = x + 16 + tip.offsetWidth > box.width ? Math.max(4, x - tip.offsetWidth - 12) : x + 16;
  const top = y + 16 + tip.offsetHeight > box.height ? Math.max(4, y - tip.offsetHeight - 12) : y + 16;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

function tipLines({ card, node }) {
  const line = (text) => element("div", { class: "line" }, text);
  const along = groupsAt({ card, node }), lines = [];
  if (node === null) {
    const shown = currentLevel().cards[card];
    lines.push(element("b", {}, shown.title), line(`${count(shown.nodes.length, "operator")}: ${shown.subtitle}`));
  } else {
    const own = nodes[node], where = [own.state ? own.kind : own.module, own.source].filter(Boolean).join(" \u00b7 ");
    lines.push(element("b", {}, nodeTitle(own)), where && line(where), ...own.tensors.slice(0, 4).map((t) => line(shapeText(t) || "a single number")));
  }
  const names = along.slice(0, 6).map((g) => element("div", { class: "group" }, swatch(g), element("span", {}, `${groups[g].name} (${groups[g].width})`)));
  if (along.length > 6) names.push(line(`and ${along.length - 6} more groups`));
  return [...lines.filter(Boolean), ...(names.length ? names : [line("nothing of it can shrink")])];
}

let drag = null;
overlay.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  overlay.setPointerCapture(event.pointerId);
  drag = { x: event.clientX, y: event.clientY, view: { ...state.view }, moved: false };
});
overlay.addEventListener("pointermove", (event) => {
  if (drag) {
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    drag.moved ||= Math.hypot(dx, dy) > 4;
    if (!drag.moved) return;
    overlay.classList.add("dragging");
    showTip(event, null);
    state.hover = null;
    state.view = { ...drag.view, x: drag.view.x + dx, y: drag.view.y + dy };
    requestDraw();
    return;
  }
  const hit = pick(event.clientX, event.clientY);
  overlay.classList.toggle("pointing", Boolean(hit));
  point(hit);
  showTip(event, hit);
});
overlay.addEventListener("pointerup", (event) => {
  const wasClick = drag && !drag.moved;
  drag = null;
  overlay.classList.remove("dragging");
  if (!wasClick) return;
  const hit = pick(event.clientX, event.clientY);
  showTip(event, null);
  if (!hit) clearSelection();
  else if (hit.node === null) { state.hover = null; selectCard(hit.card); } else selectNode(hit.node);
});
overlay.addEventListener("pointercancel", () => { drag = null; overlay.classList.remove("dragging"); });
overlay.addEventListener("pointerleave", (event) => { if (!drag) { point(null); showTip(event, null); } });
overlay.addEventListener("dblclick", (event) => {
  const hit = pick(event.clientX, event.clientY);
  if (hit && hit.node === null) expand(hit.card);
});
overlay.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = overlay.getBoundingClientRect(), step = event.deltaMode === 1 ? event.deltaY * 16 : event.deltaY;
  zoomAt(event.clientX - box.left, event.clientY - box.top, Math.exp(-Math.max(-240, Math.min(240, step)) * 0.0022));
}, { passive: false });

// The next card in a direction: the nearest, where what lies aside counts double.
function moveSelection(dx, dy) {
  const { cards } = currentLevel();
  if (state.card === null) { if (cards.length) selectCard(0); return; }
  const from = cards[state.card], middle = (c) => [c.x + c.width / 2, c.y + c.height / 2], [x, y] = middle(from);
  let best = null, least = Infinity;
  cards.forEach((card, i) => {
    const [cx, cy] = middle(card), ahead = (cx - x) * dx + (cy - y) * dy, aside = Math.abs((cx - x) * dy) + Math.abs((cy - y) * dx);
    if (ahead > 2 && ahead + 2 * aside < least) { least = ahead + 2 * aside; best = i; }
  });
  if (best !== null) selectCard(best);
}

function stepGroup(by) {
  if (!groups.length) return;
  selectGroup(state.group === null ? (by > 0 ? 0 : groups.length - 1) : (state.group + by + groups.length) % groups.length);
}

function moveInList(from, by) {
  const rows = [...$("list").querySelectorAll(".row")], at = rows.indexOf(from);
  if (at + by < 0) { $("search").focus(); return; }
  if (rows[at + by]) rows[at + by].focus();
}

function fitShown() { fitTo(state.group === null ? currentLevel().cards : cardsOfGroup(state.group)); }

function zoomMiddle(factor) { zoomAt(stage.clientWidth / 2, stage.clientHeight / 2, factor); }

const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
const keys = {
  "/": () => $("search").focus(), f: fitShown, n: () => stepGroup(1), p: () => stepGroup(-1), d: () => switchTheme(),
  "+": () => zoomMiddle(1.3), "=": () => zoomMiddle(1.3), "-": () => zoomMiddle(1 / 1.3), "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const target = event.target, typing = target.id === "search", inList = target.closest && target.closest("#list");
  if (event.key === "Escape") {
    $("search").value = "";
    setQuery("");
    clearSelection();
    if (typing) target.blur();
  } else if (typing && event.key === "Enter") {
    const first = $("list").querySelector(".row");
    if (first) first.click();
  } else if ((typing && event.key === "ArrowDown") || (inList && (event.key === "ArrowDown" || event.key === "ArrowUp"))) {
    moveInList(inList ? target : null, event.key === "ArrowDown" ? 1 : -1);
  } else if (typing) {
    return;
  } else if (target === overlay && arrows[event.key]) {
    moveSelection(...arrows[event.key]);
  } else if (target === overlay && event.key === "Enter") {
    if (state.card !== null && currentLevel().cards[state.card].nodes.length > 1) expand(state.card);
  } else if (/^[1-9]$/.test(event.key)) {
    setLevel(Number(event.key) - 1);
  } else if (keys[event.key.toLowerCase()]) {
    keys[event.key.toLowerCase()]();
  } else {
    return;
  }
  event.preventDefault();
});

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  readColours();
  showList();
  showPanel();
  requestDraw();
}

function switchTheme() { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); }

function writeAddress() {
  const parts = [`level=${state.level + 1}`];
  if (state.group !== null) parts.push(`group=${state.group}`);
  try { history.replaceState(null, "", `#${parts.join("&")}`); } catch { /* an address that may not change still shows the page */ }
}

// "#level=2&group=5&theme=dark"; what does not fit this network is left aside.
function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1)), number = (name) => Number(wanted.get(name) ?? NaN);
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  setTheme(["light", "dark"].includes(wanted.get("theme")) ? wanted.get("theme") : system.matches ? "dark" : "light");
  if (levels[number("level") - 1]) setLevel(number("level") - 1); else setLevel(firstLevel());
  if (groups[number("group")]) selectGroup(number("group"));
}

// The finest level whose cards can still be read together on a screen.
function firstLevel() {
  const readable = levels.map((level) => level.cards.length <= 130).lastIndexOf(true);
  return readable < 0 ? 0 : readable;
}

function start() {
  const name = data.model.split(".").pop(), prunable = groups.filter((group) => group.is_prunable).length;
  document.title = `${name}: channel groups`;
  $("model").textContent = name;
  $("counts").textContent = `${prunable} of ${count(groups.length, "group")} can shrink \u00b7 ${short(data.n_params)} parameters \u00b7 ${short(data.macs)} MACs`;
  $("empty").hidden = currentLevel().cards.length > 0;
  $("levels").append(...levels.map((level, i) => {
    const title = i === levels.length - 1 ? "Operators" : i === 0 ? "Modules" : `Depth ${level.depth}`;
    const button = element("button", { type: "button", "aria-pressed": "false", title: `${count(level.cards.length, "card")} (${i + 1})` }, title);
    button.addEventListener("click", () => setLevel(i));
    return button;
  }));
  $("levels").children[state.level].setAttribute("aria-pressed", "true");
  $("search").addEventListener("input", (event) => setQuery(event.target.value));
  for (const tab of ["groups", "fixed"]) $(`tab-${tab}`).addEventListener("click", () => { state.tab = tab; showList(); });
  $("fit").addEventListener("click", fitShown);
  $("zoom-in").addEventListener("click", () => zoomMiddle(1.3));
  $("zoom-out").addEventListener("click", () => zoomMiddle(1 / 1.3));
  $("theme").addEventListener("click", switchTheme);
  $("help-button").addEventListener("click", () => $("help").showModal());
  fitTo(currentLevel().cards);
  readAddress();
  new ResizeObserver(() => requestDraw()).observe(stage);
}

// For scripts that drive the page: where a node is on the screen, and what is shown.
window.inspection = {
  data,
  state,
  place(name) {
    const n = nodes.findIndex((node) => node.name === name), i = currentLevel().cardOf.get(n);
    if (i === undefined) return null;
    const card = currentLevel().cards[i], chip = card.chips.indexOf(n), rect = chip >= 0 ? chipRect(card, chip) : { ...card, height: 30 };
    const [x, y] = toScreen(rect.x + rect.width / 2, rect.y + rect.height / 2), box = overlay.getBoundingClientRect();
    return { x: x + box.left, y: y + box.top };
  },
};

start();
