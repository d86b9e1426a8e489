// What is seen and what is meant by it: state, colours, the view, and which card lies where.

const $ = (id) => document.getElementById(id);
const stage = $("stage"), base = $("network"), overlay = $("overlay");

const state = {
  level: levels.length - 1,
  view: { scale: 1, x: 0, y: 0 },
  hover: null, // {card, node} or {group}
  group: null,
  card: null,
  node: null,
  query: "",
  tab: "groups",
};

let colours = {};
const CHIP = { left: 12, top: 37, height: 15, step: 18, inLine: 4, gap: 4 };

function readColours() {
  const style = getComputedStyle(document.documentElement);
  colours = Object.fromEntries(
    ["ground", "surface", "raised", "line", "line-strong", "ink", "muted", "accent", "edge", "fixed", "mark"]
      .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  colours.lightness = Number(style.getPropertyValue("--lightness"));
  colours.chroma = Number(style.getPropertyValue("--chroma"));
}

// Hues a golden angle apart: neighbours in number, which often are neighbours in the network, differ clearly.
function groupColour(number, alpha = 1) {
  if (!groups[number].is_prunable) return colours.fixed;
  const hue = (250 + number * 137.508) % 360;
  return `oklch(${colours.lightness} ${colours.chroma} ${hue.toFixed(1)} / ${alpha})`;
}

function currentLevel() { return levels[state.level]; }

function toScreen(x, y) {
  const { view } = state;
  return [x * view.scale + view.x, y * view.scale + view.y];
}

function toScene(x, y) {
  const { view } = state;
  return [(x - view.x) / view.scale, (y - view.y) / view.scale];
}

function chipRect(card, i) {
  const width = (card.width - CHIP.left - 6 - CHIP.gap * (CHIP.inLine - 1)) / CHIP.inLine;
  return {
    x: card.x + CHIP.left + (i % CHIP.inLine) * (width + CHIP.gap),
    y: card.y + CHIP.top + Math.floor(i / CHIP.inLine) * CHIP.step,
    width, height: CHIP.height,
  };
}

function inside(rect, x, y) {
  return x >= rect.x && x <= rect.x + rect.width && y >= rect.y && y <= rect.y + rect.height;
}

// The card under a point of the screen, and its operator or the tensor that the point means.
function pick(clientX, clientY) {
  const box = overlay.getBoundingClientRect();
  const [x, y] = toScene(clientX - box.left, clientY - box.top);
  const { cards } = currentLevel();
  const card = cards.findIndex((c) => inside(c, x, y));
  if (card < 0) return null;
  const chip = cards[card].chips.findIndex((_, i) => inside(chipRect(cards[card], i), x, y));
  const node = chip >= 0 ? cards[card].chips[chip] : cards[card].nodes.length === 1 ? cards[card].nodes[0] : null;
  return { card, node };
}

// Groups to be shown as they run through the network: those pointed at, else the selected one.
function shownGroups() {
  if (state.hover) return state.hover.group !== undefined ? [state.hover.group] : groupsAt(state.hover);
  return state.group === null ? [] : [state.group];
}

function groupsAt({ card, node }) {
  if (node !== null) return nodes[node].groups;
  const { nodes: run } = currentLevel().cards[card];
  return nodes[run[run.length - 1]].groups;
}

function limit(scale) { return Math.min(3, Math.max(0.02, scale)); }

function zoomAt(x, y, factor) {
  const { view } = state, scale = limit(view.scale * factor);
  view.x = x - (x - view.x) * (scale / view.scale);
  view.y = y - (y - view.y) * (scale / view.scale);
  view.scale = scale;
  requestDraw();
}

function fitTo(cards) {
  const margin = 24, width = stage.clientWidth, height = stage.clientHeight;
  if (!cards.length || !width) return;
  const level = currentLevel(), lanes = cards.length === level.cards.length ? level.width : 0; // of all cards, with their lines
  const left = Math.min(...cards.map((c) => c.x)), right = Math.max(lanes, ...cards.map((c) => c.x + c.width));
  const top = Math.min(...cards.map((c) => c.y)), bottom = Math.max(...cards.map((c) => c.y + c.height));
  const scale = limit(Math.min(1.25, (width - 2 * margin) / (right - left), (height - 2 * margin) / (bottom - top)));
  state.view = { scale, x: (width - (left + right) * scale) / 2, y: (height - (top + bottom) * scale) / 2 };
  requestDraw();
}

function cardsOfGroup(number) {
  const { cards, cardOf } = currentLevel();
  return [...new Set(nodesOfGroup[number].map((n) => cardOf.get(n)).filter((c) => c !== undefined))].map((c) => cards[c]);
}

function reveal(card) {
  const [left, top] = toScreen(card.x, card.y), [right, bottom] = toScreen(card.x + card.width, card.y + card.height);
  if (left >= 0 && top >= 0 && right <= stage.clientWidth && bottom <= stage.clientHeight && state.view.scale > 0.5) return;
  const scale = Math.max(state.view.scale, 0.8);
  state.view = {
    scale,
    x: stage.clientWidth / 2 - (card.x + card.width / 2) * scale,
    y: stage.clientHeight / 2 - (card.y + card.height / 2) * scale,
  };
  requestDraw();
}
