for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentNode, body = th.closest("table").tBodies[0], column = [...th.parentNode.children].indexOf(th);
  const down = th.getAttribute("aria-sort") === "descending" || (!th.hasAttribute("aria-sort") && th.className !== "n");
  for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "ascending" : "descending");
  const value = row => row.children[column].dataset.value ?? row.children[column].textContent;
  const number = text => text === "" ? -Infinity : Number(text);
  const compare = (a, b) => th.className !== "n" ? a.localeCompare(b, "en", {numeric: true})
    : a === b ? 0 : number(a) - number(b);
  const rows = [...body.rows].sort((a, b) => (down ? 1 : -1) * compare(value(a), value(b)));
  body.append(...rows);
};
for (const picture of document.querySelectorAll(".sheet img"))
  picture.onclick = () => picture.parentNode.classList.toggle("large");
