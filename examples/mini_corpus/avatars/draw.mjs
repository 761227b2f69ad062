// Draws avatars for draw_avatars.py, which chooses what is on them.
//
//   node draw.mjs styles        writes each style's options, as a JSON schema, and its licence, as one JSON object
//   node draw.mjs draw          reads {"style", "options", "file"} as JSON lines, writes the PNG files, and answers each
//                               line with the parts and colours that were drawn
import { mkdir, rename, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";

import * as collection from "@dicebear/collection";
import { createAvatar } from "@dicebear/core";
import { Resvg } from "@resvg/resvg-js";

// "toon-head" -> the collection's "toonHead"
const member = (style) => collection[style.replace(/-(.)/g, (_, letter) => letter.toUpperCase())];

async function draw({ style, options, file }) {
  const { svg, extra } = createAvatar(member(style), options).toJson();
  const picture = new Resvg(svg, { font: { loadSystemFonts: false } }).render().asPng();
  const partial = join(dirname(file), `.${basename(file)}.partial`);
  await mkdir(dirname(file), { recursive: true });
  await writeFile(partial, picture);
  await rename(partial, file);
  return extra;
}

if (process.argv[2] === "styles") {
  const styles = process.argv.slice(3).map((name) => {
    const { schema, meta } = member(name);
    return [name, { options: schema.properties, meta }];
  });
  console.log(JSON.stringify(Object.fromEntries(styles)));
} else {
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await draw(JSON.parse(line))));
  }
}
