// The panel of report.html: one target, a slider that moves all edges of its box, and every model's
// mask. `data` is what utils/evaluation/panel.py writes beside this script.
(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("panel-data").textContent);
  var panel = document.getElementById("panel");
  var example = panel.querySelector("select");
  var slider = panel.querySelector("input");
  var shown = panel.querySelector("output");
  var views = panel.querySelectorAll("figure");

  data.examples.forEach(function (one, index) {
    example.add(new Option(one.name, index));
  });
  slider.max = data.shifts.length - 1;
  slider.value = data.shifts.indexOf(0);

  function percent(shift) {
    return (shift > 0 ? "+" : shift < 0 ? "\u2212" : "") + Math.abs(shift) + " %";
  }

  function draw() {
    var one = data.examples[example.value];
    var position = Number(slider.value);
    var shift = data.shifts[position];
    var meaning = shift > 0 ? "too large" : shift < 0 ? "too small" : "tight";
    shown.textContent = percent(shift) + " of the side, " + meaning;
    slider.setAttribute("aria-valuetext", shown.textContent);
    var step = one.steps[position];
    views.forEach(function (view, model) {
      var svg = view.querySelector("svg");
      svg.setAttribute("viewBox", "0 0 " + one.width + " " + one.height);
      var image = svg.querySelector("image");
      image.setAttribute("href", one.image);
      image.setAttribute("width", one.width);
      image.setAttribute("height", one.height);
      svg.querySelector(".target").setAttribute("d", one.target);
      svg.querySelector(".mask").setAttribute("d", step.masks[model]);
      var box = svg.querySelector(".box");
      ["x", "y", "width", "height"].forEach(function (name, index) {
        box.setAttribute(name, step.box[index]);
      });
      view.querySelector("b").textContent = "DSC " + step.dsc[model].toFixed(1) + " %";
    });
  }

  example.addEventListener("change", draw);
  slider.addEventListener("input", draw);
  draw();
  panel.hidden = false;
})();
