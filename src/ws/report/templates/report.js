"use strict";
// A button that opens every table of numbers and closes them again, and one per block of commands that copies it;
// without scripts each table opens by itself.
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
  // Commands are copied as they are; where the browser allows no clipboard they are selected instead.
  document.querySelectorAll("pre").forEach((pre) => {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.className = "copy";
    copy.textContent = "Copy";
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(pre.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(pre);
        copy.textContent = "Selected";
      }
    });
    pre.parentElement.before(copy);
  });
})();
