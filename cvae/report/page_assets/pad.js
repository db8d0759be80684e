// The pad: a canvas to draw a digit on, or to show a photograph of one. Its content goes to the server as a data URL in
// `value`: a drawing as PNG; a photograph as JPEG, since it goes with every change of a slider.
const SIDE = 280, LONGEST = 1024, PEN = 0.075;
const canvas = element.querySelector("canvas"), file = element.querySelector("input");
let last = null, format = [];

function paper(width, height, ...kind) {
  format = kind;
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

function stroke(event) {
  if (last === null) return;
  const here = place(event), context = canvas.getContext("2d");
  context.strokeStyle = "#111";
  context.lineWidth = PEN * Math.min(canvas.width, canvas.height);
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...here);
  context.stroke();
  last = here;
}

function tell(content = canvas.toDataURL(...format)) {
  props.value = content;
  trigger("input");
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(event);
});
canvas.addEventListener("pointermove", stroke);
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (last === null) return;
    last = null;
    tell();
  });
}
element.querySelector(".clear").addEventListener("click", () => {
  paper(SIDE, SIDE);
  tell("");
});
file.addEventListener("change", async () => {
  if (!file.files.length) return;
  try {
    const photo = await createImageBitmap(file.files[0]);
    const scale = Math.min(1, LONGEST / Math.max(photo.width, photo.height));
    const [width, height] = [photo.width, photo.height].map((side) => Math.max(1, Math.round(side * scale)));
    paper(width, height, "image/jpeg", 0.95);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, width, height);
    tell();
  } catch {
    paper(SIDE, SIDE);
    tell("unreadable");
  }
  file.value = "";
});
paper(SIDE, SIDE);
