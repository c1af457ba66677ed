for (const section of document.querySelectorAll(".examples")) {
  const form = section.querySelector("form"), rows = [...section.querySelectorAll("article")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const show = () => {
    const text = form.elements.text.value.toLowerCase();
    const asked = [...form.querySelectorAll("select")].filter((s) => s.value);
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = texts[i].includes(text)
        && asked.every((s) => row.dataset[s.name][s.dataset.arm] === s.value);
      row.hidden = !fits;
      shown += fits;
    });
    form.querySelector("output").textContent = `${shown} shown`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
