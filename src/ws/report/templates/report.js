"use strict";
// One button that opens every table of numbers, and closes them again; without scripts each opens by itself.
(function () {
  const all = Array.from(document.querySelectorAll("main details"));
  const button = document.createElement("button");
  button.type = "button";
  button.className = "all";
  function label() {
    const open = all.every((d) => d.open);
    button.textContent = open ? "Close all tables" : "Open all tables";
  }
  button.addEventListener("click", () => {
    const open = !all.every((d) => d.open);
    all.forEach((d) => { d.open = open; });
    label();
  });
  all.forEach((d) => d.addEventListener("toggle", label));
  label();
  document.querySelector("nav").appendChild(button);
})();
