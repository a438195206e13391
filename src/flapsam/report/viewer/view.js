// One case in NiiVue: three planes and 3-D, an overlay for each label map.
import { MULTIPLANAR_TYPE, Niivue, SHOW_RENDER, SLICE_TYPE } from "./niivue.js";

const scene = JSON.parse(document.getElementById("scene").textContent);
const status = document.getElementById("status");
const layouts = {
  all: SLICE_TYPE.MULTIPLANAR,
  axial: SLICE_TYPE.AXIAL,
  coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL,
  "3-D": SLICE_TYPE.RENDER,
};

function colours(segments) {
  const all = [{ value: 0, name: "background", rgb: [0, 0, 0] }, ...segments];
  const channel = (index) => all.map((one) => one.rgb[index]);
  return {
    R: channel(0), G: channel(1), B: channel(2),
    A: all.map((one) => (one.value ? 255 : 0)),
    I: all.map((one) => one.value),
    labels: all.map((one) => one.name),
  };
}

function told(location) {
  const place = `${Array.from(location.mm).slice(0, 3).map((one) => one.toFixed(1)).join(", ")} mm`;
  const values = location.values.map((one, index) => {
    const segment = scene.segments.find((known) => known.value === Math.round(one.value));
    return index === 0 ? `intensity ${Number(one.value.toFixed(2))}` : `${scene.layers[index].name}: ${segment ? segment.name : "–"}`;
  });
  return [place, ...values].join(" · ");
}

async function show() {
  const viewer = new Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [1, 1, 1, 0.6],
    crosshairWidth: 0.5,
    crosshairWidthUnit: "percent",
    dragAndDropEnabled: false,
    isRadiologicalConvention: true,
    multiplanarLayout: MULTIPLANAR_TYPE.GRID,
    multiplanarShowRender: SHOW_RENDER.ALWAYS,
    logLevel: "silent",
    loadingText: "",
  });
  viewer.onLocationChange = (location) => { status.textContent = told(location); };
  await viewer.attachToCanvas(document.getElementById("canvas"));
  await viewer.loadVolumes(scene.layers.map((layer, index) => ({
    url: new URL(layer.url, document.baseURI).href,
    name: `${index}.nii`,
    opacity: index === 0 ? 1 : layer.opacity,
  })));
  for (const volume of viewer.volumes.slice(1)) volume.setColormapLabel(colours(scene.segments));
  viewer.updateGLVolume();

  document.getElementById("layout").addEventListener("change", (event) => viewer.setSliceType(layouts[event.target.value]));
  document.querySelectorAll("input[data-layer]").forEach((slider) => {
    slider.addEventListener("input", () => viewer.setOpacity(Number(slider.dataset.layer), Number(slider.value)));
  });
  status.textContent = "";
  document.body.dataset.state = "shown";
}

show().catch((error) => {
  document.body.dataset.state = "failed";
  status.textContent = `This volume cannot be shown: ${error.message}. The viewer needs a browser with WebGL 2.`;
});
