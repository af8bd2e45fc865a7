"use strict";
for (const part of document.querySelectorAll(".sortable")) {
  const body = part.querySelector("tbody");
  const rows = Array.from(body.rows);
  const headings = Array.from(part.querySelectorAll("thead th"));
  const output = part.querySelector("output");
  const input = part.querySelector("input");
  const names = new Intl.Collator("en", { numeric: true });

  const sort = (column, heading) => {
    const descending = heading.ariaSort === "none"
      ? column > 0 // the greatest number first, but names from the first
      : heading.ariaSort === "ascending";
    for (const other of headings) other.ariaSort = "none";
    heading.ariaSort = descending ? "descending" : "ascending";
    const keyed = rows.map((row, place) => {
      const cell = row.cells[column];
      const value = cell.dataset.value;
      const text = value === undefined;
      // repr() of an infinity is "inf".
      const key = text ? cell.textContent : value === "" ? NaN
        : Number(value.replace("inf", "Infinity"));
      return { row, place, key, last: text ? key === "" : Number.isNaN(key) };
    });
    keyed.sort((a, b) => {
      if (a.last || b.last) return a.last - b.last || a.place - b.place;
      const order = typeof a.key === "string" && typeof b.key === "string"
        ? names.compare(a.key, b.key)
        : a.key < b.key ? -1 : a.key > b.key ? 1 : 0;
      return (descending ? -order : order) || a.place - b.place;
    });
    body.append(...keyed.map((entry) => entry.row));
  };
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button"); // a column of pictures has no order
    if (button) button.addEventListener("click", () => sort(column, heading));
  });

  const texts = rows.map((row) => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !words.every((word) => texts[place].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    const all = rows.length.toLocaleString("en");
    output.textContent = (words.length ? shown.toLocaleString("en") + " of " : "") + all + " "
      + output.dataset.noun;
  });
}
// A list or a row of headings is one tab stop: the arrow keys move in it.
for (const part of document.querySelectorAll(".roving")) {
  const keys = part.tagName === "TR"
    ? { ArrowRight: 1, ArrowLeft: -1 } // up and down scroll the table
    : { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1 };
  const items = () => Array.from(part.querySelectorAll("a, summary, button"))
    .filter((item) => item.getClientRects().length);
  const stop = (chosen) => {
    for (const item of part.querySelectorAll("[tabindex='0']")) item.tabIndex = -1;
    if (chosen) chosen.tabIndex = 0;
  };
  part.addEventListener("focusin", (event) => {
    if (items().includes(event.target)) stop(event.target);
  });
  part.addEventListener("toggle", () => {
    const shown = items();
    if (!shown.some((item) => item.tabIndex === 0)) stop(shown[0]);
  }, true);
  part.addEventListener("keydown", (event) => {
    const shown = items();
    const place = shown.indexOf(event.target);
    const next = event.key === "Home" ? 0 : event.key === "End" ? shown.length - 1
      : event.key in keys ? place + keys[event.key] : -1;
    if (place < 0 || !shown[next] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    shown[next].focus();
  });
}
// A row that a finding leads to may be folded away, or filtered out.
const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let part = target; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
  const filter = target.hidden && target.closest(".sortable").querySelector("input");
  if (filter) {
    filter.value = "";
    filter.dispatchEvent(new Event("input"));
  }
  target.scrollIntoView({ block: target.tagName === "TR" ? "center" : "start" });
};
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  // The address does not change where a link is followed twice.
  const link = event.target.closest("a");
  if (link && link.hash === location.hash) reveal();
});
if (location.hash) reveal();
// What scrolls is a tab stop, so that keys scroll it, and nothing else of a picture is.
const stops = () => {
  for (const part of document.querySelectorAll(".picture")) {
    const scrolls = part.scrollWidth > part.clientWidth;
    const given = { tabindex: 0, role: "group", "aria-label": part.querySelector("img").alt };
    for (const [name, value] of Object.entries(given)) {
      if (scrolls) part.setAttribute(name, value);
      else part.removeAttribute(name);
    }
  }
};
addEventListener("load", stops);
addEventListener("resize", stops);
// On paper nothing can be opened, or pointed at.
let opened = [];
addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll(".findings details, .columns")).filter((one) => !one.open);
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
  opened = [];
});
