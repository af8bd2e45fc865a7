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
