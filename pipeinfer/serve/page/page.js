// Asks for the server's status twice a second and shows it. All text is set as text, never as markup.
"use strict";

const EVERY_MS = 500, POINTS = 120;
const place = (id) => document.getElementById(id);
const speeds = [];
let before = null;

function show(id, value) {
  if (place(id).textContent !== value) place(id).textContent = value;
}

// Give `body` one row for each of `items`, which `key` tells apart; `columns` give the texts of a row.
function fill(body, items, key, columns) {
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  for (const row of [...body.rows]) if (!wanted.has(row.dataset.key)) row.remove();
  const rows = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  for (const [name, item] of wanted) {
    let row = rows.get(name);
    if (row === undefined) {
      row = body.insertRow();
      row.dataset.key = name;
      for (const [kind] of columns) row.insertCell().className = kind;
    }
    columns.forEach(([, text], index) => {
      const said = text(item);
      if (row.cells[index].textContent !== said) row.cells[index].textContent = said;
    });
  }
}

const REQUEST = [
  ["number", (one) => String(one.number)],
  ["", (one) => one.state],
  ["number", (one) => String(one.prompt_tokens)],
  ["number", (one) => String(one.tokens)],
  ["number", (one) => one.seconds.toFixed(1)],
  ["text", (one) => one.text],
];
const RANK = [
  ["number", (rank) => String(rank.rank)],
  ["", (rank) => rank.host],
  ["", (rank) => rank.roles.join(", ")],
  ["", (rank) => (rank.layers === null ? "" : rank.layers.join(" to "))],
  ["number", (rank) => (rank.weight_nbytes / 2 ** 20).toFixed(0) + " MiB"],
  ["number", (rank) => String(rank.threads)],
];

function curve(speed) {
  speeds.push(speed);
  if (speeds.length > POINTS) speeds.shift();
  const most = Math.max(1, ...speeds);
  const points = speeds.map((one, index) => `${POINTS - speeds.length + index},${97 - (94 * one) / most}`);
  place("curve").setAttribute("points", points.join(" "));
}

function update(status) {
  show("model", status.model);
  show("state", status.state);
  place("state").className = status.state === "ready" ? "" : "bad";
  if (before !== null && status.uptime_s > before.uptime_s) {
    const speed = Math.max(0, status.tokens - before.tokens) / (status.uptime_s - before.uptime_s);
    show("speed", speed.toFixed(1));
    curve(speed);
  }
  before = status;
  show("acceptance", status.acceptance === null ? "–" : (100 * status.acceptance).toFixed(0) + " %");
  show("running", String(status.running));
  show("waiting", String(status.waiting));
  show("runs", String(status.runs_in_flight));
  show("kv", (100 * status.kv_usage).toFixed(0) + " %");
  show("tokens", String(status.tokens));
  fill(place("requests"), status.requests, (one) => one.number, REQUEST);
  fill(place("ranks"), status.ranks, (rank) => rank.rank, RANK);
  place("idle").hidden = status.requests.length > 0;
}

async function poll() {
  const key = sessionStorage.getItem("key");
  try {
    const answer = await fetch("status", { headers: key ? { Authorization: "Bearer " + key } : {}, cache: "no-store" });
    place("ask").hidden = answer.status !== 401;
    if (answer.ok) update(await answer.json());
    else show("state", answer.status === 401 ? "the key is needed" : "error " + answer.status);
  } catch (error) {
    show("state", "no answer from the server");
    place("state").className = "bad";
  }
  setTimeout(poll, EVERY_MS);
}

place("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", place("key").value);
});
poll();
