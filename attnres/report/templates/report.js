"use strict";
/* Two helpers of a page that can be read without them: sorting and filtering the table of cells, and the viewer of
   routing weights. Text is only ever set as text; nothing is loaded. */

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties || {});
  made.append(...children);
  return made;
}

/* table of cells: sort by a column, filter by words */
function makeSortable(table) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", className: "sort", title: "Sort by this column" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        if (!cell) return "";
        return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v;
      };
      const numeric = head.classList.contains("n");
      const rows = Array.from(body.rows).map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (!numeric) return (up ? 1 : -1) * a.localeCompare(b);
        const x = parseFloat(a), y = parseFloat(b);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

function makeFilter(table) {
  const rows = Array.from(table.tBodies[0].rows);
  const told = element("output", { className: "meta" });
  const search = element("input", { type: "search", id: "cells-search" });
  const controls = [element("label", { htmlFor: search.id }, "Find "), search];
  const picks = Object.entries({ model: "Model ", verdict: "Verdict ", intervention: "Intervention " });
  const selects = picks.filter(([name]) => rows.some((row) => name in row.dataset)).map(([name, title]) => {
    const values = Array.from(new Set(rows.map((row) => row.dataset[name] || "")));
    const select = element("select", { id: `cells-${name}` });
    select.append(new Option("all", ""), ...values.map((v) => new Option(v.slice(0, 60), v)));
    if (values.length > 1) controls.push(element("label", { htmlFor: select.id }, title), select);
    return [name, select];
  });
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(selects.every(([name, s]) => !s.value || row.dataset[name] === s.value) &&
        words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    told.textContent = `${shown} of ${rows.length} rows`;
  };
  search.addEventListener("input", apply);
  selects.forEach(([, select]) => select.addEventListener("change", apply));
  const bar = element("div", { className: "controls" }, ...controls, told);
  table.closest(".scroll").before(bar);
  apply();
}

/* viewer: a sequence, a read, a token, its weights */
function makeViewer(holder, data) {
  const state = { sequence: 0, read: 0, token: 0, source: 0 };
  const choose = (id, title, options) => {
    const select = element("select", { id });
    select.append(...options.map((text, k) => new Option(text, String(k))));
    return [element("label", { htmlFor: id }, title), select];
  };
  const name = { attn: "attention", mlp: "MLP" };
  const readName = (r) => r.sublayer === "final" ? `read ${r.read}: final` :
    `read ${r.read}: layer ${r.layer}, ${name[r.sublayer] || r.sublayer}`;
  const [sequenceLabel, sequenceSelect] = choose("viewer-sequence", "Sequence ", data.sequences.map((s) => s.document));
  const [readLabel, readSelect] = choose("viewer-read", "Read ", data.reads.map(readName));
  const [sourceLabel, sourceSelect] = choose("viewer-source", "Shade by ", []);
  const step = (text, title, by) => {
    const button = element("button", { type: "button", title }, text);
    button.setAttribute("aria-label", title);
    button.addEventListener("click", () => pickRead(state.read + by));
    return button;
  };
  const tokens = element("div", { className: "tokens", role: "listbox", tabIndex: 0 });
  tokens.setAttribute("aria-label", "Tokens of the sequence; arrow keys move");
  const panel = element("div", { className: "panel" });
  panel.setAttribute("aria-live", "polite");

  const weights = () => {
    const size = data.reads[state.read].sources.length;
    const flat = data.sequences[state.sequence].weights[state.read];
    return (token) => flat.slice(token * size, (token + 1) * size);
  };
  const percent = (w) => (w / 10).toFixed(1);

  function drawTokens() {
    const sequence = data.sequences[state.sequence], of = weights();
    tokens.replaceChildren(...sequence.tokens.map((text, k) => {
      const weight = of(k)[state.source];
      const chip = element("span", { className: "token", id: `token-${k}` },
        element("bdi", {}, text || "∅"), element("small", {}, percent(weight)));
      chip.setAttribute("role", "option");
      chip.dataset.token = String(k);
      chip.style.setProperty("--share", String(Math.min(1, weight / 1000)));
      return chip;
    }));
    drawPanel();
  }

  function drawPanel() {
    const read = data.reads[state.read], sequence = data.sequences[state.sequence], row = weights()(state.token);
    for (const chip of tokens.children) {
      chip.setAttribute("aria-selected", String(chip.dataset.token === String(state.token)));
    }
    tokens.setAttribute("aria-activedescendant", `token-${state.token}`);
    const lines = read.sources.map((source, k) => {
      const bar = element("span", { className: "bar" });
      bar.style.width = `${Math.min(100, row[k] / 10)}%`;
      const even = element("span", { className: "even", title: "equal weights" });
      even.style.left = `${100 / read.sources.length}%`;
      return element("tr", {},
        element("th", { scope: "row" }, source),
        element("td", {}, read.sources.length > 1 ? read.families[k] : "only source"),
        element("td", { className: "n" }, `${percent(row[k])} %`),
        element("td", { className: "track" }, element("div", { className: "track" }, bar, even)));
    });
    const head = element("tr", {}, ...["Source", "Family", "Weight", "0 to 100 %"].map((text, k) =>
      element("th", { scope: "col", className: k === 2 ? "n" : "" }, text)));
    panel.replaceChildren(
      element("p", {}, `Token ${state.token}: `, element("bdi", { className: "shown" }, sequence.tokens[state.token] || "∅"),
        ` at ${readName(read)}. The line marks equal weights.`),
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines)));
  }

  function pickRead(k) {
    state.read = Math.max(0, Math.min(data.reads.length - 1, k));
    readSelect.value = String(state.read);
    const read = data.reads[state.read];
    sourceSelect.replaceChildren(...read.sources.map((text, s) =>
      new Option(read.sources.length > 1 ? `${text} (${read.families[s]})` : text, String(s))));
    state.source = Math.min(state.source, read.sources.length - 1);
    sourceSelect.value = String(state.source);
    drawTokens();
  }
  function pickToken(k) {
    state.token = Math.max(0, Math.min(data.sequences[state.sequence].tokens.length - 1, k));
    drawPanel();
  }

  sequenceSelect.addEventListener("change", () => {
    state.sequence = Number(sequenceSelect.value);
    state.token = 0;
    drawTokens();
  });
  readSelect.addEventListener("change", () => pickRead(Number(readSelect.value)));
  sourceSelect.addEventListener("change", () => { state.source = Number(sourceSelect.value); drawTokens(); });
  const pointed = (event) => {
    const chip = event.target.closest(".token");
    if (chip) pickToken(Number(chip.dataset.token));
  };
  tokens.addEventListener("mouseover", pointed);
  tokens.addEventListener("click", pointed);
  tokens.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    pickToken(state.token + by);
  });
  holder.replaceChildren(
    element("div", { className: "controls" }, sequenceLabel, sequenceSelect, readLabel, readSelect,
      step("‹", "Previous read", -1), step("›", "Next read", 1), sourceLabel, sourceSelect),
    tokens, panel);
  // The first read with a choice, in the middle of the depth, says more than read 0.
  const chosen = data.reads.findIndex((r, k) => r.sources.length > 2 && k >= data.reads.length / 2);
  pickRead(chosen < 0 ? data.reads.length - 1 : chosen);
}

const cellsTable = document.getElementById("cells-table");
if (cellsTable) { makeSortable(cellsTable); makeFilter(cellsTable); }
const viewerHolder = document.getElementById("viewer-holder");
if (viewerHolder) makeViewer(viewerHolder, JSON.parse(document.getElementById("viewer-data").textContent));
