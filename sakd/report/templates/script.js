"use strict";

// A cell as what it sorts by: a number where it is one or begins with one, else its text.
function sortedBy(cell) {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = /^[+\u2212-]?\d[\d,]*(\.\d+)?(?=$|[\s%])/.exec(text) ?? /^-?\d+(\.\d+)?(e[+-]?\d+)?$/.exec(text);
  return number ? Number(number[0].replaceAll(",", "").replace("\u2212", "-")) : text;
}

// Numbers by size; text by the alphabet, and in either direction behind numbers: it says that there is none.
function compare(one, other, direction) {
  const [isNumber, otherIsNumber] = [typeof one === "number", typeof other === "number"];
  if (isNumber && otherIsNumber) return direction * (one - other);
  if (isNumber !== otherIsNumber) return isNumber ? -1 : 1;
  return direction * one.localeCompare(other, "en", { numeric: true });
}

function sort(heading) {
  const column = heading.cellIndex;
  const direction = heading.ariaSort === "ascending" ? -1 : 1;
  for (const each of heading.parentElement.cells) if (each.ariaSort) each.ariaSort = "none";
  heading.ariaSort = direction === 1 ? "ascending" : "descending";
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, value: sortedBy(row.cells[column]) }));
  rows.sort((one, other) => compare(one.value, other.value, direction));
  body.append(...rows.map(({ row }) => row));
}

for (const button of document.querySelectorAll("table.sortable th button"))
  button.addEventListener("click", () => sort(button.parentElement));

const field = document.getElementById("filter");
const rows = [...document.querySelectorAll("[data-search]")];

// A whole key=value is looked for as such: seed=1 is not seed=10.
function fits(text, word) {
  return /=./.test(word) ? text.split(/\s+/).includes(word) : text.includes(word);
}

function filter() {
  const words = field.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of rows) {
    const text = row.dataset.search.toLowerCase();
    row.hidden = !words.every((word) => fits(text, word));
    document.getElementById(row.dataset.card).hidden = row.hidden;
    shown += !row.hidden;
  }
  field.closest("p").querySelector("output").value = `${shown} of ${rows.length}`;
}

field.addEventListener("input", filter);
field.closest("p").hidden = false;
filter();

// A link to a run opens it.
function open() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", open);
open();
