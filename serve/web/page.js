"use strict";
// Names, titles and messages come from data: they are set as text, never as markup.
const at = (id) => document.getElementById(id);
const make = (tag, text, parent, name) => {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (name) node.className = name;
  if (parent) parent.append(node);
  return node;
};
const K = 10;
const ENOUGH = 9; // answers whose times count
const state = { users: [], column: null, features: [], turn: 0, took: [] };

const bytes = (n) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${i ? n.toFixed(n < 10 ? 2 : 1) : n} ${units[i]}`;
};
const ms = (n) => `${n.toFixed(n < 10 ? 2 : 1)} ms`;
const times = (n) => (n >= 10 ? n.toFixed(0) : n.toFixed(1));

const ask = async (path, body) => {
  const headers = {};
  if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401 || answer.status === 403) at("key-line").hidden = false;
  if (!answer.ok) throw new Error(told.field ? `${told.field}: ${told.error}` : `The server answered ${answer.status}.`);
  return told;
};

const show = (error) => {
  at("error").hidden = !error;
  at("error").textContent = error ? error.message : "";
};

const field = (feature) => document.querySelector(`#features input[data-column="${CSS.escape(feature.column)}"]`);

const fillFeatures = (known) => {
  for (const feature of state.features) {
    const value = known[feature.column];
    field(feature).value = Array.isArray(value) ? value.join(", ") : (value ?? "");
  }
};

const typed = () => {
  const user = {};
  const id = at("user").value.trim();
  if (id && state.column) user[state.column] = id;
  for (const feature of state.features) {
    const text = field(feature).value.trim();
    if (text) user[feature.column] = feature.kind === "list" ? text.split(",").map((part) => part.trim()) : text;
  }
  return user;
};

const choose = async (id) => {
  at("user").value = id;
  let found = state.users.find((user) => String(user.id) === id);
  if (!found && id) found = (await ask(`v1/users?id=${encodeURIComponent(id)}`)).users[0];
  state.chosen = id;
  fillFeatures(found ? found.features : {});
  at("about").textContent = found || !id ? "" : "Nothing is known of this user: what is left out counts as missing.";
};

const moved = (item, k, live) => {
  if (item.other_rank === undefined) return null;
  const steps = item.other_rank - item.rank;
  const place = `${live ? "was" : "now"} ${item.other_rank}`;
  if (item.other_rank > k) return { text: place, name: live ? "new" : "left", words: `rank ${item.other_rank} in the other ranking` };
  if (!live) return null; // the arrows of the live list say it
  if (steps === 0) return { text: "=", name: "same", words: "same rank in fp32" };
  const up = steps > 0;
  return { text: `${up ? "▲" : "▼"} ${Math.abs(steps)}`, name: up ? "up" : "down", words: `rank ${item.other_rank} in fp32` };
};

const list = (node, side, k, top, live) => {
  node.replaceChildren();
  for (const item of side.items) {
    const row = make("li", null, node);
    row.dataset.id = item.id;
    make("span", item.rank, row, "rank");
    make("span", item.title || String(item.id), row, "name");
    const score = make("span", item.score.toFixed(3), row, "score");
    score.style.setProperty("--share", `${Math.max(0, Math.min(100, (100 * item.score) / top))}%`);
    const move = moved(item, k, live);
    const mark = make("span", move?.text, row, `move ${move?.name ?? ""}`);
    if (!move) continue;
    mark.title = move.words;
    mark.setAttribute("aria-label", move.words);
  }
};

const fastest = (side) => Math.min(...state.took.map((both) => both[side])); // what else the machine does is left out

const figure = (title, value, rows, whole) => {
  const box = make("div", null, at("figures"), "figure");
  make("h3", title, box);
  make("strong", value, box);
  if (!rows) return;
  const most = whole ?? Math.max(...rows.map((row) => row[1]));
  const table = make("dl", null, box);
  for (const [name, number, text] of rows) {
    make("dt", name, table);
    const bar = make("span", null, make("meter-bar", null, make("dd", null, table)));
    bar.style.width = `${most ? Math.max(1, (100 * number) / most) : 0}%`;
    make("dd", text, table);
  }
};

const draw = (told) => {
  const { live, reference, k } = told;
  const kind = `${live.version} ${reference?.version} ${told.candidates}`;
  if (kind !== state.kind) state.took = []; // times of other versions say nothing of these
  state.kind = kind;
  state.took = [...state.took, { live: live.ms, reference: reference?.ms }].slice(-ENOUGH);
  at("figures").replaceChildren();
  if (reference) {
    const smaller = reference.table_bytes / live.table_bytes;
    figure("Embedding tables", `${times(smaller)}× smaller`, [
      ["fp32", reference.table_bytes, bytes(reference.table_bytes)],
      ["live", live.table_bytes, bytes(live.table_bytes)],
    ]);
    const [slow, fast] = ["reference", "live"].map(fastest);
    const change = slow >= fast ? `${times(slow / fast)}× faster` : `${times(fast / slow)}× slower`;
    figure(`To rank ${told.candidates} items, fastest of ${state.took.length}`, change, [
      ["fp32", slow, ms(slow)],
      ["live", fast, ms(fast)],
    ]);
    const most = Math.min(k, told.candidates);
    const same = live.items.filter((item) => item.other_rank === item.rank).length;
    figure(`Top ${most} in both`, `${Math.round(told.overlap * most)} of ${most}`, [
      ["shared", told.overlap, `${Math.round(told.overlap * 100)}%`],
      ["same rank", same / most, `${same} of ${most}`],
    ], 1);
  } else {
    figure("Embedding tables", bytes(live.table_bytes));
    figure(`To rank ${told.candidates} items, fastest of ${state.took.length}`, ms(fastest("live")));
  }
  const top = Math.max(1, ...live.items.map((i) => i.score), ...(reference ? reference.items.map((i) => i.score) : []));
  list(at("live"), live, k, top, true);
  if (reference) list(at("reference"), reference, k, top, false);
  at("other").hidden = !reference;
  at("lists").classList.toggle("two", Boolean(reference));
  at("live-name").textContent = reference ? "Live, compressed" : "Ranking";
  at("versions").textContent = `live ${live.version}` + (reference ? `, beside fp32 ${reference.version}` : "");
  at("note").textContent = `${told.candidates} candidates. Request ${told.request_id}.` +
    (reference ? " Arrows: places that an item moved against fp32." : "");
  at("figures").hidden = at("lists").hidden = false;
};

const rank = async () => {
  const turn = ++state.turn; // of answers that overtake each other the last asked counts
  document.body.classList.add("busy");
  try {
    const id = at("user").value.trim();
    if (id !== state.chosen) await choose(id);
    const told = await ask("v1/compare", { user: typed(), k: K });
    if (turn !== state.turn) return;
    fillFeatures(told.user);
    draw(told);
    show(null);
    history.replaceState(null, "", `#user=${encodeURIComponent(id)}`);
    document.body.dataset.ranked = told.request_id;
  } catch (error) {
    if (turn === state.turn) show(error);
  } finally {
    if (turn === state.turn) document.body.classList.remove("busy");
  }
};

const linked = () => new URLSearchParams(location.hash.slice(1)).get("user");

const begin = async () => {
  try {
    const [known, items] = await Promise.all([ask("v1/users?limit=50"), ask("v1/items?limit=1")]);
    Object.assign(state, { users: known.users, column: known.id_column, features: known.features });
    at("user-label").textContent = known.id_column || "User";
    at("user").disabled = at("next").disabled = !known.id_column;
    at("known").replaceChildren(...known.users.map((user) => Object.assign(document.createElement("option"), { value: user.id })));
    at("features").replaceChildren(...known.features.map((feature) => {
      const label = make("label", feature.column);
      make("input", null, label).dataset.column = feature.column;
      return label;
    }));
    at("more").hidden = !known.features.length;
    if (!items.total) throw new Error("This model has no item catalogue, so there is nothing to show: see the API.");
    await choose(linked() ?? String(known.users[0]?.id ?? ""));
    show(null);
  } catch (error) {
    show(error);
    return;
  }
  await rank();
  for (let more = 0; more < 4 && at("error").hidden; more += 1) await rank(); // the first answer is slow: nothing is warm yet
};

at("ask").addEventListener("submit", (event) => { event.preventDefault(); state.features.length || !state.column ? rank() : begin(); });
at("features").addEventListener("change", rank);
at("user").addEventListener("change", rank);
at("next").addEventListener("click", async () => {
  const here = state.users.findIndex((user) => String(user.id) === at("user").value.trim());
  if (!state.users.length) return;
  at("user").value = state.users[(here + 1) % state.users.length].id;
  await rank();
});
window.addEventListener("hashchange", () => { const id = linked(); if (id !== null && id !== state.chosen) { at("user").value = id; rank(); } });
begin();
