"use strict";
const body = document.querySelector("#runs tbody");
document.querySelectorAll("#runs thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const column = head.cellIndex;
    const first = column === 0 ? "ascending" : "descending";
    const other = column === 0 ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => {
      const text = row.cells[column].textContent;
      const missing = Number.isNaN(Number(text)) ? Infinity : sign * Number(text);
      return { row, text, value: missing };
    };
    const names = new Intl.Collator("en", { numeric: true });
    const rows = Array.from(body.rows, key);
    rows.sort(column === 0 ? (a, b) => sign * names.compare(a.text, b.text) : (a, b) => (a.value === b.value ? 0 : a.value - b.value));
    rows.forEach((entry) => body.append(entry.row));
    document.querySelectorAll("#runs th[aria-sort]").forEach((cell) => cell.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
  });
});
