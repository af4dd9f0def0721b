"use strict";
const table = document.getElementById("ledger");
if (table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const value = (row, column) => row.cells[column].dataset.value;

  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    const numeric = head.dataset.kind === "number";
    button.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort");
      const ascending = sorted ? sorted === "descending" : !numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const order = (a, b) =>
        numeric ? value(a, column) - value(b, column) : value(a, column).localeCompare(value(b, column));
      rows.sort((a, b) => (ascending ? order(a, b) : order(b, a)));
      body.append(...rows);
    });
  });

  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  });
}
