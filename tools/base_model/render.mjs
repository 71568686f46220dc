// Renders icon sets to raw RGBA: node render.mjs JOB.json, run in a folder with sharp installed.
// JOB is {size, sets: [{out, icons: [{svg} | {file}]}]}; each `out` gets icons x size x size x 4 bytes.
import { readFileSync, writeFileSync, renameSync } from "node:fs";
import { createRequire } from "node:module";

const sharp = createRequire(process.cwd() + "/package.json")("sharp");
const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const clear = { r: 0, g: 0, b: 0, alpha: 0 };

async function render(icon) {
  const input = icon.file ?? Buffer.from(icon.svg);
  const density = icon.svg ? 288 : undefined; // draw large, then shrink: clean edges
  return sharp(input, { density })
    .resize(job.size, job.size, { fit: "contain", background: clear })
    .ensureAlpha()
    .raw()
    .toBuffer();
}

for (const set of job.sets) {
  const pictures = [];
  for (const icon of set.icons) pictures.push(await render(icon));
  writeFileSync(set.out + ".part", Buffer.concat(pictures));
  renameSync(set.out + ".part", set.out); // a killed run leaves no half-written set
}
