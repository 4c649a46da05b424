"use strict";
// Every text that comes from data enters the page as a text node: nothing of it is ever markup.
(() => {
  const place = document.getElementById("list");
  if (!place) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 40;
  const control = (id) => document.getElementById(id);
  const make = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));

  for (const group of data.groups) {
    if (group.rollouts.some((rollout) => rollout.x.length)) group.kinds.push("problems");
    const documents = Object.values(group.documents).map((document) => `${document.title} ${document.text}`);
    group.words = [group.id, group.question, ...group.answers, ...documents].join("\n").toLowerCase();
  }

  for (const iteration of [...new Set(data.groups.map((group) => group.iteration))].sort((a, b) => a - b)) {
    const option = make("option", `iteration ${iteration}`);
    option.value = iteration;
    control("iteration").append(option);
  }

  const head = (names) => {
    const row = make("tr");
    for (const [name, kind] of names) row.append(make("th", name, kind));
    const top = make("thead");
    top.append(row);
    return top;
  };

  const selection = (group, rollout) => {
    const cell = make("td");
    rollout.z.forEach((document, at) => {
      if (at) cell.append(" > ");
      cell.append(make("span", `[${document}]`, group.documents[document].gold ? "goldnumber" : ""));
    });
    if (rollout.x.length) cell.append(make("div", `${rollout.x.join(", ")}: ${rollout.t}`, "dim"));
    return cell;
  };

  const open = (group, body) => {
    body.append(make("p", `Answers: ${group.answers.join(" · ")}`), make("p", group.why, "dim"));
    const written = group.rollouts.some((rollout) => "a" in rollout);
    const names = [["weight", ""], ["", ""], ["log p(answer)", "number"], ["log p(selection)", "number"], ["selection", ""]];
    if (written) names.push(["answer written", ""]);
    const table = make("table");
    const rows = make("tbody");
    for (const rollout of group.rollouts) {
      const row = make("tr");
      const weight = make("td");
      const bar = make("span", undefined, "bar");
      bar.style.width = `${Math.round(80 * (rollout.w ?? 0))}px`;
      weight.append(bar);
      row.append(weight, make("td", number(rollout.w), "number"), make("td", number(rollout.l), "number"));
      row.append(make("td", number(rollout.p), "number"), selection(group, rollout));
      if (written) row.append(make("td", rollout.a ?? ""));
      rows.append(row);
    }
    table.append(head(names), rows);
    const scroll = make("div", undefined, "scroll");
    scroll.append(table);
    const documents = make("div", undefined, "documents");
    for (const [place, found] of Object.entries(group.documents)) {
      const box = make("div", undefined, found.gold ? "document gold" : "document");
      box.append(make("b", `[${place}] ${found.title}`), found.gold ? make("span", "supporting", "mark") : "");
      box.append(make("p", found.text));
      documents.append(box);
    }
    body.append(scroll, documents);
  };

  const line = (group) => {
    const box = make("details", undefined, "question");
    const summary = make("summary");
    const chip = make("i");
    chip.style.background = data.colours[group.run % data.colours.length];
    const facts = `${data.runs[group.run]}, iteration ${group.iteration}, ${group.id}: evidence ${number(group.bound)} nats, ESS ${number(group.ess, 1)}`;
    summary.append(chip, make("b", group.question), make("div", facts, "dim"));
    const body = make("div", undefined, "body");
    box.append(summary, body);
    box.addEventListener("toggle", () => { if (box.open && !body.childNodes.length) open(group, body); });
    return box;
  };

  const low = (value) => (value === null ? -Infinity : value);
  const orders = {
    hard: (a, b) => low(a.bound) - low(b.bound),
    easy: (a, b) => low(b.bound) - low(a.bound),
    ess: (a, b) => low(a.ess) - low(b.ess),
  };
  let found = [];
  let shown = 0;
  const more = () => {
    for (const group of found.slice(shown, shown + PAGE)) place.append(line(group));
    shown = Math.min(found.length, shown + PAGE);
    control("more").hidden = shown >= found.length;
  };
  const filter = () => {
    const words = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const run = control("run")?.value ?? "";
    const iteration = control("iteration").value;
    const kind = control("kind").value;
    found = data.groups.filter((group) =>
      (run === "" || group.run === Number(run)) && (iteration === "" || group.iteration === Number(iteration)) &&
      (kind === "" || group.kinds.includes(kind)) && words.every((word) => group.words.includes(word)));
    found.sort(orders[control("order").value]);
    place.replaceChildren();
    shown = 0;
    more();
    control("count").textContent = `${found.length} of ${data.groups.length} questions`;
  };
  control("filter").addEventListener("input", filter);
  control("filter").addEventListener("submit", (event) => event.preventDefault());
  control("more").addEventListener("click", more);
  filter();
})();
