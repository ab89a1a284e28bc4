// Renders every formula of the built site with the vendored KaTeX; exits 1 at the first site that holds a bad one.
//   node docs/tools/check_formulas.mjs site
import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const katex = createRequire(import.meta.url)(join(here, "..", "assets", "katex", "katex.min.js"));
const site = process.argv[2] ?? "site";
const entities = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", "#x27": "'" };
const decode = (html) => html.replace(/<[^>]*>/g, "").replace(/&(amp|lt|gt|quot|#39|#x27);/g, (_, name) => entities[name]);
const pattern = /<(span|div) class="arithmatex">([\s\S]*?)<\/\1>/g;

let formulas = 0;
let failures = 0;
for (const file of readdirSync(site, { recursive: true }).filter((name) => name.endsWith(".html"))) {
  for (const [, , body] of readFileSync(join(site, file), "utf8").matchAll(pattern)) {
    const text = decode(body).trim();
    const displayMode = text.startsWith("\\[");
    formulas += 1;
    try {
      katex.renderToString(text.slice(2, -2), { displayMode, throwOnError: true, strict: "error" });
    } catch (error) {
      failures += 1;
      console.error(`${file}: ${error.message}\n    ${text}`);
    }
  }
}
console.log(`${formulas} formulas, ${failures} failed`);
process.exit(failures > 0 || formulas === 0 ? 1 : 0);
