// Shows one case in NiiVue: three planes and 3-D, with an overlay for each label map.
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
  const channel = (index) => all.map((segment) => segment.rgb[index]);
  return {
    R: channel(0), G: channel(1), B: channel(2),
    A: all.map((segment) => (segment.value ? 255 : 0)),
    I: all.map((segment) => segment.value),
    labels: all.map((segment) => segment.name),
  };
}

function described(location) {
  const place = `${Array.from(location.mm).slice(0, 3).map((coordinate) => coordinate.toFixed(1)).join(", ")} mm`;
  const values = location.values.map(({ value }, index) => {
    if (index === 0) return `intensity ${Number(value.toFixed(2))}`;
    const layer = scene.layers[index];
    const segment = scene.segments.find((known) => known.value === Math.round(value));
    return `${layer.name}: ${layer.fractions ? value.toFixed(2) : segment ? segment.name : "–"}`;
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
  viewer.onLocationChange = (location) => { status.textContent = described(location); };
  await viewer.attachToCanvas(document.getElementById("canvas"));
  await viewer.loadVolumes(scene.layers.map((layer, index) => ({
    url: new URL(layer.url, document.baseURI).href,
    name: `${index}.nii`,
    opacity: index === 0 ? 1 : layer.opacity,
    ...(layer.fractions ? { colormap: "inferno", cal_min: 0, cal_max: 1 } : {}),
  })));
  viewer.volumes.forEach((volume, index) => {
    if (index > 0 && !scene.layers[index].fractions) volume.setColormapLabel(colours(scene.segments));
  });
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
  status.textContent = `The volume cannot be shown: ${error.message}. The viewer needs a browser with WebGL 2.`;
});
