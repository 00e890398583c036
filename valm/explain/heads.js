"use strict";
// Shows the weights of the chosen head in an explanation inside `root`. Without this the explanation shows their mean.
function chooseHeads(root, settings) {
  for (const section of root.querySelectorAll("[data-setting]")) {
    const { tokens, largest, weights } = settings[Number(section.dataset.setting)];
    const choice = section.querySelector("[data-heads]");
    choice.parentElement.hidden = false;
    choice.addEventListener("change", () => showHead(section, weights[Number(choice.value)], tokens, largest));
    choice.value = "0"; // a reloaded page would keep the choice, but not what it showed
  }
}

function showHead(section, weights, tokens, largest) {
  const width = weights.length / tokens;
  const share = (token) =>
    weights.slice(token * width + tokens, (token + 1) * width).reduce((sum, weight) => sum + weight, 0);
  const percent = (weight) => Math.round(weight / 100); // of the unit 1e-4
  const each = (name, change) =>
    section.querySelectorAll(`[data-${name}]`).forEach((element) => change(element, Number(element.getAttribute(`data-${name}`))));

  each("cell", (cell, place) => {
    cell.textContent = percent(weights[place]);
    cell.style.setProperty("--bar", weights[place] / 1e4);
  });
  each("weight", (element, place) => (element.textContent = `${percent(weights[place])}%`));
  each("bar", (bar, place) => bar.style.setProperty("--bar", weights[place] / largest));
  each("share", (element, token) => (element.textContent = `${percent(share(token))}%`));
  each("share-bar", (bar, token) => bar.style.setProperty("--bar", share(token) / 1e4));
  each("sum", (cell, token) => (cell.textContent = percent(share(token))));
}
