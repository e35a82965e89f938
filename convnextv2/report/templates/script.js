"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg", LEFT = 52, RIGHT = 350, TOP = 12, BOTTOM = 182;
  document.documentElement.classList.add("scripted");
  const toggles = [...document.querySelectorAll(".toggle")];
  const names = toggles.map((toggle) => toggle.closest("label").querySelector("span").textContent)
    .map((name) => name.length > 32 ? `${name.slice(0, 31)}…` : name);
  const swatches = toggles.map((toggle) => toggle.closest("label").querySelector(".swatch"));

  for (const toggle of toggles) {
    const show = () => {
      for (const line of document.querySelectorAll(`.plot g[data-run="${toggle.dataset.run}"]`)) {
        line.toggleAttribute("hidden", !toggle.checked);
      }
    };
    toggle.addEventListener("change", show);
    show(); // a browser may remember what was chosen
  }

  for (const plot of document.querySelectorAll(".plot")) {
    const { x, y, lines } = JSON.parse(plot.dataset.plot);
    const epochs = [...new Set(lines.flat().map((point) => point[0]))].sort((a, b) => a - b);
    const svg = plot.querySelector("svg"), tip = document.createElement("div");
    const cursor = document.createElementNS(SVG, "path"), live = document.createElement("div");
    let at = -1;
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("visibility", "hidden");
    svg.append(cursor);
    tip.className = "tip";
    tip.hidden = true;
    live.append(tip);
    live.setAttribute("aria-live", "polite");
    plot.append(live);
    svg.setAttribute("tabindex", "0");
    for (const title of svg.querySelectorAll("title")) title.remove(); // else the browser's own tip lies over ours

    const hide = () => {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
      at = -1;
    };
    const show = (place) => {
      if (place === at) return;
      at = place;
      const epoch = epochs[place], place_x = LEFT + (RIGHT - LEFT) * (epoch - x[0]) / (x[1] - x[0]);
      const head = document.createElement("strong");
      head.textContent = `epoch ${epoch}`;
      tip.replaceChildren(head);
      lines.forEach((points, run) => {
        if (!points.length || !toggles[run].checked) return;
        const away = (point) => Math.abs(point[0] - epoch);
        const point = points.reduce((best, candidate) => away(candidate) < away(best) ? candidate : best);
        if (away(point) > (x[1] - x[0]) / 100) return; // long lines have not all of their epochs in the page
        const row = document.createElement("div"), at_epoch = point[0] === epoch ? "" : ` (epoch ${point[0]})`;
        row.append(swatches[run].cloneNode(true), `${names[run]}: ${point[2]}${at_epoch}`);
        tip.append(row);
      });
      tip.hidden = false;
      const left = place_x > (LEFT + RIGHT) / 2;
      tip.style.left = left ? "3.5rem" : "auto";
      tip.style.right = left ? "auto" : "1rem";
      cursor.setAttribute("d", `M${place_x} ${TOP}V${BOTTOM}`);
      cursor.setAttribute("visibility", "visible");
    };
    const near = (event) => {
      const box = svg.getBoundingClientRect();
      const wanted = x[0] + ((event.clientX - box.left) * 360 / box.width - LEFT) / (RIGHT - LEFT) * (x[1] - x[0]);
      let best = 0;
      epochs.forEach((epoch, place) => {
        if (Math.abs(epoch - wanted) < Math.abs(epochs[best] - wanted)) best = place;
      });
      show(best);
    };
    svg.addEventListener("pointermove", near);
    svg.addEventListener("pointerdown", near);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const last = epochs.length - 1, from = at < 0 ? last + (event.key === "ArrowLeft" ? 1 : 0) : at;
      const places = { ArrowLeft: Math.max(0, from - 1), ArrowRight: Math.min(last, from + 1), Home: 0, End: last };
      if (event.key === "Escape") hide();
      if (!(event.key in places)) return;
      event.preventDefault();
      show(places[event.key]);
    });
  }

  for (const strip of document.querySelectorAll(".strip")) {
    const figures = [...strip.querySelectorAll("figure")];
    const slider = document.createElement("div"), range = document.createElement("input");
    const told = document.createElement("output");
    slider.className = "slider";
    Object.assign(range, { type: "range", min: 0, max: figures.length - 1, step: 1, value: figures.length - 1 });
    range.setAttribute("aria-label", strip.getAttribute("aria-label"));
    const show = () => {
      figures.forEach((figure, place) => figure.classList.toggle("now", place === Number(range.value)));
      told.textContent = `epoch ${figures[range.value].dataset.epoch}`;
      range.setAttribute("aria-valuetext", told.textContent);
    };
    range.addEventListener("input", show);
    slider.append(range, told);
    slider.hidden = figures.length < 2;
    strip.before(slider);
    strip.removeAttribute("tabindex");
    show();
  }
})();
