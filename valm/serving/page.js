// Asks the server for the explanation that the form describes, and shows it. Of several changes the last one counts.
const form = document.getElementById("ask");
const at = (id) => document.getElementById(id);
const uploads = []; // {name, data} of the reader's own images, in base64
let asked = 0;

async function ask() {
  const number = ++asked;
  at("explanation").ariaBusy = "true";
  const question = {
    prompt: at("prompt").value,
    images: form.elements.images.value,
    k: at("k") ? Number(at("k").value) : 1,
    answers: at("answers").value,
    beside: [...form.querySelectorAll("[name=beside]:checked")].map((box) => box.value),
  };
  if (at("uploads") && question.images === at("uploads").dataset.choice) question.uploads = uploads;
  let found;
  try {
    const answer = await fetch("/explain", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    found = await answer.json();
  } catch (error) {
    found = { error: { message: `the server does not answer: ${error.message}` } };
  }
  if (number !== asked) return;
  at("explanation").ariaBusy = "false";
  at("error").hidden = !found.error;
  at("error").textContent = found.error ? found.error.message : "";
  at("explanation").innerHTML = found.error ? "" : found.body; // escaped by the server
  if (!found.error) chooseHeads(at("explanation"), found.heads);
}

function choose(images) {
  form.querySelector(`[name=images][value="${images}"]`).checked = true;
}

async function readUploads(event) {
  const { choice, mostBytes } = event.target.dataset;
  const files = [...event.target.files];
  uploads.length = 0;
  if ((files.reduce((sum, file) => sum + file.size, 0) * 4) / 3 > Number(mostBytes)) {
    at("error").hidden = false;
    at("error").textContent = "the images have more than 48 MB together: choose fewer, or smaller ones";
    return;
  }
  for (const file of files) {
    const url = await new Promise((done) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
    uploads.push({ name: file.name, data: url.slice(url.indexOf(",") + 1) });
  }
  choose(choice);
  ask();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
form.addEventListener("change", (event) => {
  if (["images", "beside"].includes(event.target.name) || event.target.id === "k") ask();
});
if (at("k")) {
  at("k").addEventListener("input", () => (at("k-shown").textContent = at("k").value));
  at("uploads").addEventListener("change", readUploads);
}
for (const button of document.querySelectorAll("#tour button")) {
  button.addEventListener("click", () => {
    at("prompt").value = at("prompt").defaultValue;
    choose(button.dataset.images);
    at("hint").textContent = button.dataset.hint;
    ask();
  });
}
if (innerWidth < 640) at("more").open = false; // so that the answers are near the button
ask();
