// root: the panel of explorer.html.j2; data: plots.explorer(...).data(). Resolves when everything is drawn.
async function interpExplorer(root, data) {
  "use strict";
  const started = performance.now();
  const DARK = ["#1c222b", "#1f4468", "#2f74aa", "#74aede", "#e3f1ff"], SHARE = "share of attention";
  const LEFT = 48, TOP = 6, RIGHT = 8, BOTTOM = 30, LEAST = 4, AROUND = 16;
  const { tokens, block, layers, heads, k, chosen, mapped, about } = data;
  const n = tokens.length, blocks = Math.ceil(n / block), cells = (blocks * (blocks + 1)) / 2;
  const marks = Object.entries(data.marks), ranges = marks.flatMap(([, list]) => list);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const canvas = part("map"), grid = part("grid"), select = part("summary"), queryBox = part("queries"), keyBox = part("keys");
  const night = window.matchMedia("(prefers-color-scheme: dark)");

  const make = (kind, look = "", text = "", attributes = {}) => {
    const made = document.createElement(kind);
    if (look) made.className = look;
    made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };
  const say = (name, text) => { part(name).textContent = text; };
  const on = (target, events) => Object.entries(events).forEach(([event, act]) => target.addEventListener(event, act));
  const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
  const count = (x) => Math.round(x).toLocaleString("en");
  const number = (x) => {
    if (Number.isNaN(x)) return "–";
    return x >= 100 ? count(x) : x === 0 || x >= 0.1 ? x.toFixed(2) : x >= 0.001 ? x.toFixed(3) : x.toPrecision(1);
  };
  const span = (at) => [at * block, Math.min(n, (at + 1) * block)];
  const said = (at) => { const [a, b] = span(at); return b - a > 1 ? `${count(a)}–${count(b - 1)}` : count(a); };
  const text = (i, line = "↵") => tokens[i].replaceAll("\n", line) || "∅";
  const marksOf = (a, b) => marks.filter(([, list]) => list.some(([from, to]) => from < b && to > a)).map(([name]) => name);

  // arrays come as base64 of zlib, bytes of equal rank together
  const unpack = async (packed, Kind) => {
    const signs = atob(packed), bytes = new Uint8Array(signs.length);
    for (let i = 0; i < signs.length; i++) bytes[i] = signs.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const width = Kind.BYTES_PER_ELEMENT, size = planes.length / width, joined = new Uint8Array(planes.length);
    for (let rank = 0; rank < width; rank++) for (let i = 0; i < size; i++) joined[i * width + rank] = planes[rank * size + i];
    return new Kind(joined.buffer);
  };
  let maps, back, probs, tables;
  try {
    const names = Object.keys(data.summaries), several = (list, Kind) => Promise.all(list.map((packed) => unpack(packed, Kind)));
    [[maps, probs], [back], tables] = await Promise.all([
      several([data.maps, data.probs], Uint8Array), several([data.back], n < 65536 ? Uint16Array : Uint32Array),
      several(names.map((name) => data.summaries[name]), Float32Array),
    ]);
    tables = Object.fromEntries(names.map((name, i) => [name, tables[i]]));
  } catch (error) {
    part("error").hidden = false;
    say("error", `The data cannot be read here (${error.message}): use a browser of 2023 or later.`);
    return;
  }

  // head: [layer, head]; i, j: the block of queries and of keys; query, target: positions; view: what the map shows, in blocks
  const whole = { x: 0, y: 0, size: blocks };
  const state = { head: [0, 0], i: blocks - 1, j: 0, query: n - 1, target: -1, view: whole };
  let hover = null, drag = null, picture = null, colours = [];
  const name = ([layer, head]) => `L${layer}H${head}`;
  const now = () => name(state.head);
  const mapAt = () => mapped.indexOf(now());
  const topAt = (head = now()) => chosen.indexOf(head);
  const weight = (code) => (code / 255) ** 2;
  const codeOf = (i, j) => maps[mapAt() * cells + (i * (i + 1)) / 2 + j];
  const topOf = (query, row = topAt()) => {
    const found = [];
    for (let rank = 0; row >= 0 && rank < k; rank++) {
      const at = (row * k + rank) * n + query;
      if (back[at]) found.push({ key: query - back[at] + 1, weight: weight(probs[at]) });
    }
    return found;
  };
  const onBlock = (query, j) => topOf(query).reduce((sum, top) => sum + (Math.floor(top.key / block) === j ? top.weight : 0), 0);
  // 256 colours between the given ones, [r, g, b] each
  const ramp = (hexes) => {
    const stops = hexes.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    return Array.from({ length: 256 }, (_, shade) => {
      const at = (shade / 255) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
      return stops[low].map((from, c) => Math.round(from + (stops[low + 1][c] - from) * (at - low)));
    });
  };
  const css = (shade) => `rgb(${colours[shade]})`;
  const theme = () => {
    colours = ramp(night.matches ? DARK : data.scale);
    const bar = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map(css)})`;
    part("head-scale").style.background = part("map-scale").style.background = bar;
    picture = null;
  };

  // heads
  const headCells = [];
  const buildHeads = () => {
    grid.style.gridTemplateColumns = `max-content repeat(${layers}, minmax(0, 1.35rem))`;
    const place = (made, row, column) => { made.style.gridArea = `${row} / ${column}`; return made; };
    const every = layers > 40 ? 20 : layers > 12 ? 5 : 1, step = heads > 40 ? 16 : heads > 12 ? 4 : heads > 6 ? 2 : 1;
    for (let l = 0; l < layers; l += every) grid.append(place(make("span", "x-axis", l ? l : "L0", { role: "presentation" }), 1, l + 2));
    for (let h = 0; h < heads; h++) {
      const row = make("div", "", "", { role: "row" });
      row.append(place(make("span", "x-axis x-side", h % step ? "" : h || "H0", { role: "presentation" }), h + 2, 1));
      for (let l = 0; l < layers; l++) {
        const kept = topAt(name([l, h])) >= 0 ? "x-cell x-kept" : "x-cell";
        row.append((headCells[l * heads + h] = place(make("span", kept, "", { role: "gridcell", "data-at": name([l, h]) }), h + 2, l + 2)));
      }
      grid.append(row);
    }
    for (const head of chosen) {
      const chip = part("chosen").appendChild(make("button", "", head, { type: "button" }));
      chip.addEventListener("click", () => goTo(head));
    }
  };
  const valueOf = (table, [layer, head]) => tables[table][layer * heads + head];
  const withUnit = (table, value) => (about[table][1] === SHARE ? number(value) : `${number(value)} ${about[table][1]}`);
  const readHead = (head) => {
    const told = withUnit(select.value, valueOf(select.value, head));
    return `${name(head)}: ${told}${about[select.value][1] === SHARE ? "" : ","} ${about[select.value][0]}`;
  };
  const paintHeads = () => {
    const table = tables[select.value], most = table.reduce((top, x) => (x > top ? x : top), 0) || 1;
    headCells.forEach((cell, at) => {
      const head = [Math.floor(at / heads), at % heads], here = name(head) === now();
      cell.style.backgroundColor = css(Math.round(clamp(table[at] / most || 0, 0, 1) * 255));
      cell.setAttribute("aria-label", readHead(head));
      cell.setAttribute("aria-selected", here);
      cell.classList.toggle("x-on", here);
      cell.tabIndex = here ? 0 : -1;
    });
    say("head-most", withUnit(select.value, most));
    say("head-readout", readHead(state.head));
    say("numbers-of", now());
    part("numbers").replaceChildren(...Object.keys(about).map((table) => {
      const row = make("tr");
      row.append(make("th", "", about[table][0], { scope: "row" }), make("td", "", withUnit(table, valueOf(table, state.head))));
      return row;
    }));
    part("chosen")?.querySelectorAll("button").forEach((chip) => chip.setAttribute("aria-pressed", chip.textContent === now()));
  };
  const goTo = (head) => {
    const found = /^L(\d+)H(\d+)$/.exec(head)?.slice(1).map(Number);
    if (!found || found[0] >= layers || found[1] >= heads) return;
    state.head = found;
    picture = null;
    paintHeads();
    showBlocks();
  };

  // block map
  const shade = (i, j) => Math.min(255, Math.round((codeOf(i, j) / picture.most) * 255));
  const eachBlock = (visit) => { for (let i = 0; i < blocks; i++) for (let j = 0; j <= i; j++) visit(i, j); };
  const paintPicture = () => {
    picture = make("canvas");
    picture.width = picture.height = blocks;
    const pixels = new ImageData(blocks, blocks), most = [0, 0];
    eachBlock((i, j) => { most[j ? 1 : 0] = Math.max(most[j ? 1 : 0], codeOf(i, j)); });
    // what many heads give the first key would leave nothing of the rest
    picture.most = most[1] || most[0] || 1;
    picture.more = most[0] > picture.most;
    eachBlock((i, j) => pixels.data.set([...colours[shade(i, j)], 255], (i * blocks + j) * 4));
    picture.getContext("2d").putImageData(pixels, 0, 0);
  };
  const darkest = () => `${number(weight(picture.most))}${picture.more ? " and more" : ""}`;
  const side = () => {
    const room = Math.max(60, canvas.clientWidth - LEFT - RIGHT), even = Math.floor(room / blocks) * blocks;
    return even > 0.88 * room ? even : room;
  };
  const ticks = (from, size, room) => {
    const least = (size * block) / Math.max(2, room / 80), power = 10 ** Math.floor(Math.log10(least)), found = [];
    const step = Math.max(1, [1, 2, 5, 10].map((x) => x * power).find((x) => x >= least));
    for (let at = Math.ceil((from * block) / step) * step; at <= Math.min((from + size) * block, n); at += step) found.push(at);
    return found;
  };
  const drawMap = () => {
    const { x, y, size } = state.view, length = side(), ratio = window.devicePixelRatio || 1, height = length + TOP + BOTTOM;
    const style = getComputedStyle(root), of = (colour) => style.getPropertyValue(colour).trim();
    const shown = mapAt() >= 0, pen = canvas.getContext("2d"), across = (at, from) => clamp(((at - from) / size) * length, 0, length);
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(height * ratio);
    pen.scale(ratio, ratio);
    pen.font = `11px ${style.fontFamily}`;
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP, length, length);
    pen.clip();
    const box = ([i, j], colour) => {
      const cell = Math.max(length / size, 5), grown = (cell - length / size) / 2;
      pen.strokeStyle = of(colour);
      pen.lineWidth = 2;
      pen.strokeRect(LEFT + ((j - x) / size) * length - grown, TOP + ((i - y) / size) * length - grown, cell, cell);
    };
    if (shown) {
      if (!picture) paintPicture();
      pen.imageSmoothingEnabled = false;
      pen.drawImage(picture, x, y, size, size, LEFT, TOP, length, length);
      box([state.i, state.j], "--x-mark");
      if (hover) box(hover, "--x-ink");
      if (drag?.moved && !drag.pan) pen.strokeRect(drag.x, drag.y, drag.toX - drag.x, drag.toY - drag.y);
    } else {
      pen.fillStyle = of("--x-soft");
      pen.fillText(`The block map of ${now()} was not kept.`, LEFT + 12, TOP + 24);
    }
    pen.restore();
    pen.fillStyle = of("--x-mark");
    for (const [a, b] of ranges) {
      const [left, right, top, bottom] = [across(a / block, x), across(b / block, x), across(a / block, y), across(b / block, y)];
      if (right > left) pen.fillRect(LEFT + left, TOP + length + 2, Math.max(2.5, right - left), 5);
      if (bottom > top) pen.fillRect(LEFT - 7, TOP + top, 5, Math.max(2.5, bottom - top));
    }
    pen.fillStyle = of("--x-soft");
    for (const tick of ticks(x, size, length)) {
      const label = count(tick), wide = pen.measureText(label).width;
      pen.fillText(label, LEFT + clamp(across(tick / block, x) - wide / 2, 0, length - wide), TOP + length + 19);
    }
    pen.textAlign = "right";
    for (const tick of ticks(y, size, length)) pen.fillText(count(tick), LEFT - 10, TOP + clamp(across(tick / block, y) + 4, 9, length));
    say("map-most", shown ? darkest() : "–");
    part("out").disabled = part("reset").disabled = size >= blocks;
    part("in").disabled = size <= Math.min(LEAST, blocks);
    part("map-csv").disabled = part("map-svg").disabled = !shown;
    const [i, j] = hover || [state.i, state.j], inside = marksOf(...span(j)).join(", ");
    const mean = shown ? `on average ${number(weight(codeOf(i, j)))} of a query's attention` : "not kept";
    say("map-readout", `queries ${said(i)} on keys ${said(j)}${inside && ` (${inside})`}: ${mean}`);
  };
  const look = (view) => {
    const size = clamp(view.size, Math.min(LEAST, blocks), blocks);
    state.view = { size, x: clamp(view.x, 0, blocks - size), y: clamp(view.y, 0, blocks - size) };
    drawMap();
  };
  const zoom = (factor, y = state.i + 0.5, x = state.j + 0.5) => {
    const { view } = state, size = clamp(view.size * factor, Math.min(LEAST, blocks), blocks), by = size / view.size;
    look({ size, x: x - (x - view.x) * by, y: y - (y - view.y) * by });
  };
  // [row, column] in blocks, not rounded
  const pointed = (left, top) => [[top - TOP, state.view.y], [left - LEFT, state.view.x]].map(([at, from]) => from + (at / side()) * state.view.size);
  const blockAt = (event) => {
    const [i, j] = pointed(event.offsetX, event.offsetY), { x, y, size } = state.view;
    const inside = mapAt() >= 0 && j >= x && i >= y && j < x + size && i < Math.min(y + size, blocks) && Math.floor(j) <= Math.floor(i);
    return inside ? [Math.floor(i), Math.floor(j)] : null;
  };
  const choose = (i, j, query, target = -1) => {
    i = clamp(i, 0, blocks - 1);
    j = clamp(j, 0, i);
    if (query === undefined) {
      const [from, to] = span(i);
      query = to - 1;
      // the query of the block that looks most at these keys
      for (let at = to - 1; at >= from; at--) if (onBlock(at, j) > onBlock(query, j)) query = at;
    }
    const { x, y, size } = state.view, follow = (at, low) => clamp(low, at + 1 - size, at);
    Object.assign(state, { i, j, query, target, view: { size, x: follow(j, x), y: follow(i, y) } });
    showBlocks();
  };

  // text
  const strength = (element, value) => element.style.setProperty("--w", Math.sqrt(clamp(value, 0, 1)).toFixed(3));
  const fill = (box, [from, to], dress) => {
    const made = document.createDocumentFragment();
    let group = made;
    for (let i = Math.max(0, from - AROUND); i < Math.min(n, to + AROUND); i++) {
      const inside = marksOf(i, i + 1), token = make("span", inside.length > 1 ? "x-inner" : "", text(i, "↵\n"), { "data-i": i });
      if ((group !== made) !== inside.length > 0) group = inside.length ? made.appendChild(make("mark", "", "", { role: "none" })) : made;
      const more = i >= from && i < to ? dress(token, i) : token.classList.add("x-beside");
      token.title = [count(i), ...inside, more].filter(Boolean).join(", ");
      group.append(token);
    }
    box.replaceChildren(made);
  };
  const reveal = (box, i) => {
    const token = box.querySelector(`[data-i="${i}"]`);
    if (token) box.scrollTop = token.offsetTop - (box.clientHeight - token.offsetHeight) / 2;
  };
  const showQueries = () => {
    const focused = queryBox.contains(document.activeElement), kept = topAt() >= 0;
    fill(queryBox, span(state.i), (token, i) => {
      const here = i === state.query;
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", here);
      token.tabIndex = here ? 0 : -1;
      token.classList.toggle("x-on", here);
      if (kept) strength(token, onBlock(i, state.j));
      return kept && `${number(onBlock(i, state.j))} on the keys shown`;
    });
    reveal(queryBox, state.query);
    if (focused) queryBox.querySelector(".x-on").focus({ preventScroll: true });
    say("query-name", said(state.i));
    say("query-readout", `query ${count(state.query)}${kept ? `: ${number(onBlock(state.query, state.j))} on the keys shown, counting its top keys only` : ""}`);
  };
  const showTop = () => {
    const list = part("top"), around = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, at) => text(from + at)).join("");
    list.replaceChildren(...topOf(state.query).map(({ key, weight: given }) => {
      const item = make("li"), words = make("span", "x-words"), word = make("b", "", text(key)), bit = make("span", "x-bit", number(given));
      const button = make("button", "", "", { type: "button", "aria-pressed": key === state.target, "aria-label": `key ${count(key)}, ${text(key)}: weight ${number(given)}` });
      bit.style.setProperty("--w", given);
      strength(word, given);
      words.append(around(Math.max(0, key - 3), key), word, around(key + 1, Math.min(n, key + 9)));
      button.append(bit, words, make("span", "x-soft", count(key)));
      button.addEventListener("click", () => {
        choose(state.i, Math.floor(key / block), state.query, key);
        list.querySelector('[aria-pressed="true"]').focus({ preventScroll: true });
      });
      item.append(button);
      return item;
    }));
    part("top-csv").disabled = topAt() < 0;
    if (topAt() < 0) list.append(make("li", "x-soft", `The top keys of ${now()} were not kept${chosen.length ? ": choose one of the outlined heads" : ""}.`));
  };
  const showKeys = () => {
    const given = new Map(topOf(state.query).map((top) => [top.key, top.weight])), [from, to] = span(state.j);
    fill(keyBox, [from, to], (token, i) => {
      if (!given.has(i)) return "";
      token.classList.add("x-strong");
      token.classList.toggle("x-target", i === state.target);
      strength(token, given.get(i));
      return `weight ${number(given.get(i))}`;
    });
    reveal(keyBox, [state.target, ...given.keys(), ...ranges.map(([a]) => a), from].find((i) => i >= from && i < to));
    say("key-name", said(state.j));
    for (const [button, off] of [["key-back", !state.j], ["key-on", state.j >= state.i], ["query-back", !state.i], ["query-on", state.i >= blocks - 1]]) {
      part(button).disabled = off;
    }
    root.querySelectorAll("[data-mark]").forEach((button) => { button.disabled = marks[button.dataset.mark][1][0][0] >= span(state.i)[1]; });
  };
  const showBlocks = () => {
    say("name", now());
    canvas.setAttribute("aria-label", `Block map of ${now()}: queries down, keys to the right. Arrow keys move, Enter goes to the text.`);
    [drawMap, showQueries, showTop, showKeys].forEach((show) => show());
  };

  // files
  const offerTable = (file, rows) => interpSave(file, "text/csv;charset=utf-8", interpCsv(rows));
  const rounded = (x) => Number(x.toPrecision(4));
  const saveMap = () => {
    const rows = [["head", "first query", "last query", "first key", "last key", "mean attention"]];
    eachBlock((i, j) => rows.push([now(), ...[i, j].flatMap((at) => [span(at)[0], span(at)[1] - 1]), rounded(weight(codeOf(i, j)))]));
    offerTable(`${now()}-blocks.csv`, rows);
  };
  const saveTop = () => {
    const rows = [["head", "query", "query text", "rank", "key", "key text", "weight"]], [from, to] = span(state.i);
    for (let i = from; i < to; i++) topOf(i).forEach((top, at) => rows.push([now(), i, tokens[i], at + 1, top.key, tokens[top.key], rounded(top.weight)]));
    offerTable(`${now()}-top-keys-${from}-${to - 1}.csv`, rows);
  };
  const saveSvg = () => {
    const room = 640, left = 64, top = 44, step = room / blocks, drawn = [], light = ramp(data.scale), safe = (words) => words.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
    const rect = (x, y, w, h, fill, title = "") => drawn.push(`<rect x="${x.toFixed(2)}" y="${y.toFixed(2)}" width="${w.toFixed(2)}" height="${h.toFixed(2)}" fill="${fill}"><title>${safe(title)}</title></rect>`);
    const write = (x, y, anchor, words) => drawn.push(`<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}">${safe(words)}</text>`);
    rect(0, 0, left + room + 24, top + room + 52, "#ffffff");
    rect(left, top, room, room, "#f6f7f9");
    eachBlock((i, j) => codeOf(i, j) && rect(left + j * step, top + i * step, step + 0.05, step + 0.05, `rgb(${light[shade(i, j)]})`, `queries ${said(i)} on keys ${said(j)}: ${rounded(weight(codeOf(i, j)))}`));
    marks.forEach(([named, list]) => list.forEach(([a, b]) => {
      const [from, long] = [(a / block) * step, Math.max(2, ((b - a) / block) * step)];
      rect(left + from, top + room + 2, long, 5, "#b34a00", named);
      rect(left - 7, top + from, 5, long, "#b34a00", named);
    }));
    for (const tick of ticks(0, blocks, room)) {
      write(left + (tick / block) * step, top + room + 21, "middle", count(tick));
      write(left - 11, top + (tick / block) * step + 4, "end", count(tick));
    }
    write(left, 22, "start", `${now()}: mean attention of blocks of ${block} queries on blocks of ${block} keys, 0 to ${darkest()}, square-root scale`);
    write(left + room / 2, top + room + 40, "middle", data.title);
    const size = `viewBox="0 0 ${left + room + 24} ${top + room + 52}" font-family="system-ui, sans-serif" font-size="12" fill="#1c2128"`;
    interpSave(`${now()}-blocks.svg`, "image/svg+xml", `<svg xmlns="http://www.w3.org/2000/svg" ${size}>\n${drawn.join("\n")}\n</svg>\n`);
  };

  // what the reader does
  const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const headAt = (event) => event.target.dataset.at;
  const overHead = (event) => headAt(event) && say("head-readout", event.target.getAttribute("aria-label"));
  on(select, { change: paintHeads });
  on(grid, {
    pointerover: overHead,
    focusin: overHead,
    pointerleave: () => say("head-readout", readHead(state.head)),
    click: (event) => goTo(headAt(event)),
    keydown: (event) => {
      const move = ARROWS[event.key], at = headCells.indexOf(event.target);
      if (at < 0 || !(move || event.key === "Enter" || event.key === " ")) return;
      event.preventDefault();
      if (!move) goTo(headAt(event));
      else headCells[clamp(Math.floor(at / heads) + move[1], 0, layers - 1) * heads + clamp((at % heads) + move[0], 0, heads - 1)].focus();
    },
  });
  on(canvas, {
    pointerdown: ({ button, offsetX: x, offsetY: y, shiftKey, pointerType, pointerId }) => {
      if (button || mapAt() < 0) return;
      drag = { x, y, toX: x, toY: y, moved: false, pan: shiftKey, view: state.view, touch: pointerType === "touch" };
      if (!drag.touch) canvas.setPointerCapture(pointerId);
    },
    pointermove: (event) => {
      hover = blockAt(event);
      if (drag && !drag.touch) {
        Object.assign(drag, { toX: event.offsetX, toY: event.offsetY });
        drag.moved ||= Math.hypot(drag.toX - drag.x, drag.toY - drag.y) > 6;
        const { view, x, y, toX, toY } = drag, scale = view.size / side();
        if (drag.pan) look({ ...view, x: view.x - (toX - x) * scale, y: view.y - (toY - y) * scale });
      }
      drawMap();
    },
    pointerup: (event) => {
      const done = drag, here = blockAt(event);
      drag = null;
      if (done?.moved && !done.pan) {
        const ends = [pointed(done.x, done.y), pointed(event.offsetX, event.offsetY)], [y, x] = [0, 1].map((axis) => Math.min(ends[0][axis], ends[1][axis]));
        look({ x, y, size: Math.max(...[0, 1].map((axis) => Math.abs(ends[0][axis] - ends[1][axis]))) });
      } else if (done && !done.moved && here) choose(...here);
    },
    pointercancel: () => { drag = null; drawMap(); },
    pointerleave: () => { hover = null; drawMap(); },
    dblclick: () => look(whole),
    wheel: (event) => {
      // the page scrolls unless the map was clicked first
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      zoom(Math.exp(clamp(event.deltaY, -200, 200) / 300), ...pointed(event.offsetX, event.offsetY));
    },
    keydown: (event) => {
      const acts = { "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), Escape: () => look(whole), Enter: () => queryBox.querySelector(".x-on").focus() };
      const move = ARROWS[event.key], act = move ? () => choose(state.i + move[0], state.j + move[1]) : acts[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      hover = null;
      act();
    },
  });
  on(queryBox, {
    click: ({ target: { dataset: { i } } }) => i && choose(Math.floor(i / block), state.j, Number(i)),
    keydown: (event) => {
      const [from, to] = span(state.i), steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: from - state.query, End: to - 1 - state.query };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const query = clamp(state.query + steps[event.key], 0, n - 1);
      choose(Math.floor(query / block), state.j, query);
    },
  });
  const presses = {
    in: () => zoom(0.6), out: () => zoom(1 / 0.6), reset: () => look(whole), "map-csv": saveMap, "map-svg": saveSvg, "top-csv": saveTop,
    "query-back": () => choose(state.i - 1, state.j), "query-on": () => choose(state.i + 1, state.j),
    "key-back": () => choose(state.i, state.j - 1, state.query), "key-on": () => choose(state.i, state.j + 1, state.query),
  };
  Object.entries(presses).forEach(([button, act]) => part(button).addEventListener("click", act));
  root.querySelectorAll("[data-mark]").forEach((button) => button.addEventListener("click", () => {
    const [from] = marks[button.dataset.mark][1][0];
    choose(state.i, Math.floor(from / block), state.query);
    reveal(keyBox, from);
  }));
  root.addEventListener("interp:head", (event) => goTo(event.detail));
  night.addEventListener("change", () => { theme(); paintHeads(); drawMap(); });
  new ResizeObserver(drawMap).observe(canvas.parentElement);

  // first picture: the head whose last query looks most at a mark, or else far back
  const firsts = chosen.flatMap((head) => topOf(n - 1, topAt(head)).map((top) => ({ ...top, head }))).filter(({ key }) => key > 0 && n - key > 16);
  const marked = firsts.filter(({ key }) => ranges.some(([a, b]) => a <= key && key < b));
  const best = (marked.length ? marked : firsts).sort((a, b) => b.weight - a.weight)[0];
  theme();
  buildHeads();
  if (best) Object.assign(state, { j: Math.floor(best.key / block), target: best.key });
  goTo(best?.head ?? chosen[0] ?? mapped[0] ?? "L0H0");
  root.dataset.drawn = (performance.now() - started).toFixed(0);
}
