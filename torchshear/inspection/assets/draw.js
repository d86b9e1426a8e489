// Two canvases: the network below, which fades while something is pointed at or selected, and that alone above.

const FONT = getComputedStyle(document.body).fontFamily;
const fonts = { title: `600 12px ${FONT}`, small: `10.5px ${FONT}`, chip: `9.5px ${FONT}` };
const fitted = new Map();
let wanted = 0; // 1: the upper canvas must be drawn again, 2: both

function requestDraw(what = 2) {
  if (!wanted) requestAnimationFrame(draw);
  wanted = Math.max(wanted, what);
}

function draw() {
  const both = wanted === 2;
  wanted = 0;
  if (both) paint(base, drawNetwork);
  const shown = shownGroups(), found = state.query ? state.found : null;
  base.classList.toggle("faded", shown.length > 0 || Boolean(found && found.size) || state.card !== null);
  paint(overlay, (context) => drawShown(context, shown, found));
}

function paint(canvas, content) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(stage.clientWidth * ratio), height = Math.round(stage.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const context = canvas.getContext("2d"), { view } = state;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, height);
  context.setTransform(view.scale * ratio, 0, 0, view.scale * ratio, view.x * ratio, view.y * ratio);
  content(context);
}

function isVisible(card) {
  const [left, top] = toScreen(card.x, card.y), { scale } = state.view;
  return left < stage.clientWidth && top < stage.clientHeight && left + card.width * scale > 0 && top + card.height * scale > 0;
}

function drawNetwork(context) {
  const level = currentLevel();
  level.lines ??= linesOf(level.edges.filter((edge) => !edge[4]));
  level.sharedLines ??= linesOf(level.edges.filter((edge) => edge[4]));
  // From afar lanes run into one another; they must not outshine the cards.
  const alpha = Math.min(1, Math.max(0.4, 2 * state.view.scale));
  strokeLines(context, level.lines, colours.edge, 1.2, alpha);
  context.setLineDash([3, 4]);
  strokeLines(context, level.sharedLines, colours.edge, 1.2, alpha);
  context.setLineDash([]);
  for (const card of level.cards) if (isVisible(card)) drawCard(context, card, []);
}

function drawShown(context, shown, found) {
  const level = currentLevel();
  shown.forEach((number, i) => drawGroupLines(context, level, number, shown.slice(0, i)));
  const lit = new Set(found && !shown.length ? found : []);
  for (const number of shown) for (const n of nodesOfGroup[number]) lit.add(level.cardOf.get(n));
  const pointed = state.hover && state.hover.card !== undefined ? state.hover.card : null;
  for (const card of [state.card, pointed]) if (card !== null) lit.add(card);
  lit.delete(undefined);
  for (const i of lit) if (isVisible(level.cards[i])) drawCard(context, level.cards[i], shown);
  if (state.card !== null) drawFrame(context, level.cards[state.card], colours.accent);
  if (pointed !== null) drawFrame(context, level.cards[pointed], colours.ink);
}

// Where another group runs along as well, lines have both colours in turns.
function drawGroupLines(context, level, number, earlier) {
  level.groupLines ??= new Map();
  const key = [number, ...earlier].join();
  if (!level.groupLines.has(key)) {
    const own = level.edges.filter((edge) => edge[2].includes(number)), isShared = (edge) => edge[2].some((g) => earlier.includes(g));
    level.groupLines.set(key, [linesOf(own.filter((edge) => !isShared(edge))), linesOf(own.filter(isShared))]);
  }
  const [alone, shared] = level.groupLines.get(key);
  strokeLines(context, alone, groupColour(number), 2.4);
  if (!earlier.length) return;
  context.setLineDash([9, 9]);
  context.lineDashOffset = 6 * (earlier.length - 1);
  strokeLines(context, shared, groupColour(number), 2.4);
  context.setLineDash([]);
}

// All lines as one path, and the heads of the arrows as another.
function linesOf(edges) {
  const lines = new Path2D(), heads = new Path2D();
  for (const edge of edges) {
    const points = edge[3], last = points.length - 2, x = points[last], y = points[last + 1];
    lines.moveTo(points[0], points[1]);
    for (let i = 2; i < last; i += 2) {
      const room = Math.min(distance(points, i - 2), distance(points, i)) / 2;
      lines.arcTo(points[i], points[i + 1], points[i + 2], points[i + 3], Math.min(5, room));
    }
    lines.lineTo(x, y);
    heads.moveTo(x, y);
    heads.lineTo(x - 3, y - 6);
    heads.lineTo(x + 3, y - 6);
    heads.closePath();
  }
  return { lines, heads };
}

function distance(points, i) {
  return Math.abs(points[i + 2] - points[i]) + Math.abs(points[i + 3] - points[i + 1]);
}

function strokeLines(context, { lines, heads }, colour, width, alpha = 1) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = Math.max(width, 0.7 / state.view.scale);
  context.globalAlpha = alpha;
  context.stroke(lines);
  context.globalAlpha = 1;
  if (state.view.scale > 0.3) context.fill(heads);
}

function drawFrame(context, card, colour) {
  context.strokeStyle = colour;
  context.lineWidth = Math.max(2, 1.5 / state.view.scale);
  context.beginPath();
  context.roundRect(card.x - 2, card.y - 2, card.width + 4, card.height + 4, 7);
  context.stroke();
}

function drawCard(context, card, shown) {
  const { scale } = state.view;
  const marks = shown.length ? card.groups.filter((g) => shown.includes(g)) : card.groups;
  const own = shown.length ? marks : groupsOfLast(card);
  const colour = own.length ? groupColour(own[0]) : colours.fixed;
  if (scale < 0.42) {
    context.fillStyle = colour;
    context.fillRect(card.x, card.y, card.width, card.height);
    if (scale > 0.26) drawFarTitle(context, card);
    return;
  }
  context.fillStyle = colours.surface;
  context.strokeStyle = shown.length && own.length ? colour : colours["line-strong"];
  context.lineWidth = shown.length && own.length ? 1.8 : 1;
  context.beginPath();
  context.roundRect(card.x, card.y, card.width, card.height, 5);
  context.fill();
  context.stroke();
  drawStrip(context, card, own);
  drawText(context, card);
  card.chips.forEach((chip, i) => drawChip(context, chipRect(card, i), nodes[chip], shown));
}

// From afar the title alone, as large as the screen needs.
function drawFarTitle(context, card) {
  const size = Math.round(9 / state.view.scale), font = `far${size}`;
  fonts[font] ??= `600 ${size}px ${FONT}`;
  if (fitted.size > 30000) fitted.clear();
  context.fillStyle = colours.surface;
  context.textBaseline = "alphabetic";
  write(context, card.title, card.x + 8, card.y + Math.min(card.height, 38) / 2 + size * 0.36, card.width - 14, font, card.nodes.length > 1);
}

function groupsOfLast(card) {
  return nodes[card.nodes[card.nodes.length - 1]].groups;
}

// The groups that run through a card, as a strip at its left.
function drawStrip(context, card, own) {
  const parts = own.length ? own.slice(0, 6).map((g) => groupColour(g)) : [colours.fixed];
  const height = (card.height - 6) / parts.length;
  parts.forEach((colour, i) => {
    context.fillStyle = colour;
    context.fillRect(card.x + 3, card.y + 3 + i * height, 5, height);
  });
}

function drawText(context, card) {
  const alone = card.nodes.length === 1 ? nodes[card.nodes[0]] : null;
  const shape = alone ? compactShape(alone) : "";
  context.textBaseline = "alphabetic";
  context.fillStyle = colours.muted;
  const room = card.width - 20, shapeText = fit(context, shape, room * 0.62, "small", false);
  context.font = fonts.small;
  const shapeWidth = alone ? context.measureText(shapeText).width : drawDots(context, card);
  context.fillText(shapeText, card.x + card.width - 7 - shapeWidth, card.y + 16);
  write(context, card.subtitle, card.x + 13, card.y + 30, room, "small", Boolean(alone));
  context.fillStyle = colours.ink;
  write(context, card.title, card.x + 13, card.y + 16, room - shapeWidth - (shapeWidth ? 8 : 0), "title", !alone);
}

// All groups inside a module, at the right of its title; gives the width that they take.
function drawDots(context, card) {
  const most = 9, size = 7, step = 9, right = card.x + card.width - 7;
  card.groups.slice(0, most).forEach((group, i) => {
    context.fillStyle = groupColour(group);
    context.fillRect(right - size - i * step, card.y + 9, size, size);
  });
  context.fillStyle = colours.muted;
  return Math.min(card.groups.length, most) * step;
}

function drawChip(context, rect, node, shown) {
  const marks = shown.length ? node.groups.filter((g) => shown.includes(g)) : node.groups;
  context.fillStyle = colours.raised;
  context.strokeStyle = marks.length ? groupColour(marks[0]) : colours.line;
  context.lineWidth = marks.length && shown.length ? 1.6 : 1;
  context.beginPath();
  context.roundRect(rect.x, rect.y, rect.width, rect.height, 3);
  context.fill();
  if (marks.length && shown.length) { context.fillStyle = groupColour(marks[0], 0.28); context.fill(); }
  context.stroke();
  context.fillStyle = colours.ink;
  const label = node.state.split(".").pop().replace("running_", "");
  write(context, label, rect.x + 3, rect.y + 11, rect.width - 6, "chip", false);
}

function write(context, text, x, y, width, font, atFront) {
  const shown = fit(context, text, width, font, atFront);
  context.font = fonts[font];
  context.fillText(shown, x, y);
}

// Text cut to a width; at its front where the end tells more, as in names of modules.
function fit(context, text, width, font, atFront) {
  const key = `${font}|${Math.round(width)}|${atFront}|${text}`;
  let known = fitted.get(key);
  if (known === undefined) {
    context.font = fonts[font];
    known = cut(context, text, width, atFront);
    fitted.set(key, known);
  }
  return known;
}

function cut(context, text, width, atFront) {
  const letters = [...text];
  if (context.measureText(text).width <= width) return text;
  let low = 0, high = letters.length;
  const shortened = (n) => (atFront ? `\u2026${letters.slice(letters.length - n).join("")}` : `${letters.slice(0, n).join("")}\u2026`);
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (context.measureText(shortened(middle)).width <= width) low = middle; else high = middle - 1;
  }
  return low ? shortened(low) : "";
}
