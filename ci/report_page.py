"""Makes runs, has `pillion report` draw them, and looks at the pages in Chromium. Reads their event
files with TensorBoard.

python report_page.py PILLION FOLDER
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = 13
WIDTHS = [1280, 390]
SCHEMES = ["light", "dark"]


def metrics(steps: int, seed: int, rate: float) -> str:
    """Lines of a run whose loss falls at this rate, with a batch that grows."""
    noise = random.Random(seed)
    lines, samples = [], 0
    for step in range(1, steps + 1):
        batch = 8 * 2 ** min(3, 4 * step // steps)
        samples += batch
        loss = 1.5 + 4 * math.exp(-rate * step / steps) + noise.gauss(0, 0.1)
        is_validated = step % max(1, steps // 10) == 0
        line = {
            "step": step,
            "loss": loss,
            "lr": 3e-3 * min(1, 20 * step / steps) * (1 - 0.9 * step / steps),
            "grad_norm": 1.0,
            "batch_samples": batch,
            "batch_tokens": 128 * batch,
            "samples_seen": samples,
            "tokens_per_s": 7000 + noise.gauss(0, 300),
            "step_ms": 128 * batch / 7 + noise.random() * 10,
            "exposed_ms": 10 + 10 * noise.random(),
            "bytes_sent": 6 << 20,
            "collectives": 13,
            "noise_scale": 2 + 150 * step / steps if step > 5 else None,
            "wanted_batch": None,
            "validation_loss": loss + 0.1 if is_validated else None,
            "flops": 1e11,
            "mfu": 0.6 + noise.gauss(0, 0.02),
            "memory": (70 << 20) + 1024 * step,
        }
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return "".join(lines)


class Runs:
    """Run folders that are like one that the program has made."""

    def __init__(self, pillion: str, folder: Path):
        self.pillion, self.folder = pillion, folder
        text = folder / "text"
        text.mkdir(parents=True)
        (text / "text.txt").write_text("a run of the test learns these words. " * 2000)
        flags = "--model tiny --seq 32 --samples 320 --validation-samples 8 --validate-every 10 --sample 0 --trace"
        self.train(f"{flags} --data {text} --out {folder / 'real'}")
        self.about = json.loads((folder / "real/run.json").read_text())

    def train(self, flags: str) -> str:
        return subprocess.run(
            [self.pillion, "train", *flags.split()], check=True, capture_output=True, text=True
        ).stdout

    def make(self, name: str, steps: int, seed: int = 1, rate: float = 5) -> Path:
        run = self.folder / name
        run.mkdir()
        (run / "metrics.jsonl").write_text(metrics(steps, seed, rate))
        about = json.loads(json.dumps(self.about))
        about["recipe"]["seed"] = seed
        about["recipe"]["schedule"]["lr"] = rate / 1000
        (run / "run.json").write_text(json.dumps(about, separators=(",", ":")))
        return run

    def report(self, name: str, runs: list[Path], *flags: str) -> Path:
        page = self.folder / f"{name}.html"
        subprocess.run([self.pillion, "report", *map(str, runs), "--out", str(page), *flags], check=True)
        return page


# Contrast of every text with what is behind it, by WCAG 2: those below 4.5.
CONTRAST = """() => {
  const parse = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => {
    const part = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faults = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest('script, style, title, desc')) continue;
    const style = getComputedStyle(element);
    const fore = parse(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [luminance(fore), luminance(behind(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) faults.push(`${walker.currentNode.data.trim()}: ${contrast.toFixed(2)}`);
  }
  return faults;
}"""

# The shown lines of each plot, and how much of the plot's frame each of them takes.
LINES = """() => [...document.querySelectorAll('.plots figure')].map((figure) => ({
  title: figure.querySelector('figcaption').textContent,
  box: figure.querySelector('svg').getBoundingClientRect().toJSON(),
  lines: [...figure.querySelectorAll('g[data-points]')].filter((line) => getComputedStyle(line).display !== 'none').map((line) => {
    const { width, height } = line.querySelector('.line').getBoundingClientRect();
    return { points: line.dataset.points.split(' ').length / 2, extent: Math.max(width, height) };
  }),
}))"""


class Looks:
    """Pages in a browser; collects what is wrong with them."""

    def __init__(self, browser, folder: Path):
        self.browser, self.folder, self.faults = browser, folder, []

    def check(self, holds: bool, fault: str):
        if not holds:
            self.faults.append(fault)

    def open(self, page: Path, width: int, scheme: str, scripts: bool = True):
        """Opens a page, whose faults have its name."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
            has_touch=width < 600,
        )
        context.set_default_timeout(30_000)
        tab = context.new_page()
        label = f"{page.stem} {width} {scheme}{'' if scripts else ' without scripts'}"
        tab.on("console", lambda message: self.check(False, f"{label}: the console says {message.text}"))
        tab.on("pageerror", lambda error: self.check(False, f"{label}: {error}"))
        requests = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        tab.screenshot(path=self.folder / f"{label.replace(' ', '-')}.png", full_page=True)
        others = [url for url in requests if url != page.as_uri() and not url.startswith("data:")]
        self.check(not others, f"{label}: requests {others}")
        return tab, label

    def page(self, page: Path, lines: int, panels: int = PANELS):
        """Looks at a page that has so many lines and plots."""
        for width in WIDTHS:
            for scheme in SCHEMES:
                tab, label = self.open(page, width, scheme)
                self.plots(tab, label, min(lines, 6), panels)
                self.values(tab, label, touch=width < 600)
                faults = tab.evaluate(CONTRAST)
                self.check(not faults, f"{label}: contrast of {faults}")
                tab.context.close()
        tab, label = self.open(page, WIDTHS[0], "light", scripts=False)
        boxes = tab.locator(".plots figure svg").count()
        self.check(boxes == panels, f"{label}: {boxes} plots")
        self.check(tab.locator(".plots g:not(.off) > .line").first.is_visible(), f"{label}: no line")
        self.check(tab.locator("table").is_visible(), f"{label}: no table")
        self.check(tab.locator("input:visible").count() == 0, f"{label}: boxes that do nothing")
        self.check(("needs JavaScript" in tab.inner_text("body")) == (lines > 6), f"{label}: no word of scripts")
        tab.context.close()

    def plots(self, tab, label: str, lines: int, panels: int):
        wide, page = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        self.check(wide <= page, f"{label}: the page is {wide} pixels wide")
        found = tab.evaluate(LINES)
        self.check(len(found) == panels, f"{label}: {len(found)} plots, not {panels}")
        for plot in found:
            of = f"{label}, {plot['title']}"
            self.check(plot["box"]["width"] > 250 and plot["box"]["height"] > 140, f"{of}: is {plot['box']}")
            self.check(len(plot["lines"]) == lines, f"{of}: {len(plot['lines'])} lines, not {lines}")
            self.check(all(line["extent"] > 20 for line in plot["lines"]), f"{of}: an empty line")
        ticks = tab.locator(".plots .tick").all_text_contents()
        self.check(len(ticks) >= 5 * panels, f"{label}: {len(ticks)} ticks")
        bad = [tick for tick in ticks if not re.fullmatch(r"-?\d+(\.\d*[1-9])?([kMGT]|e-?\d+)?", tick)]
        self.check(not bad, f"{label}: ticks {bad}")
        sizes = tab.evaluate("""() => [...document.querySelectorAll('.plots .tick')].map((tick) =>
            tick.getBoundingClientRect().height)""")
        self.check(min(sizes) >= 9, f"{label}: ticks of {min(sizes)} pixels")
        overlaps = tab.evaluate("""() => [...document.querySelectorAll('.plots svg')].flatMap((svg) => {
            const boxes = [...svg.querySelectorAll('.x.tick')].map((tick) => tick.getBoundingClientRect());
            return boxes.slice(1).filter((box, index) => box.left < boxes[index].right);
        }).length""")
        self.check(overlaps == 0, f"{label}: {overlaps} ticks overlap")
        outside = tab.evaluate("""() => [...document.querySelectorAll('.plots svg')].flatMap((svg) => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter((text) => {
              const box = text.getBoundingClientRect();
              return box.left < frame.left - 1 || box.right > frame.right + 1;
            }).map((text) => text.textContent);
        })""")
        self.check(not outside, f"{label}: text outside of plots: {outside}")

    def values(self, tab, label: str, touch: bool):
        """The values under the pointer, in the middle of the first plot."""
        svg = tab.locator(".plots svg").first
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        middle = (box["x"] + box["width"] * 0.55, box["y"] + box["height"] / 2)
        if touch:
            tab.touchscreen.tap(*middle)
        else:
            tab.mouse.move(*middle)
        tip = tab.locator(".plots .tip").first
        self.check(tip.is_visible(), f"{label}: no values under the pointer")
        text = tip.text_content()
        shown = tab.locator(".plots svg").first.locator("g[data-points]:not(.off)").count()
        rows = tip.locator("div")
        self.check(rows.count() == shown + 1, f"{label}: values of {rows.count() - 1} lines")
        values = tip.locator("b").all_text_contents()
        good = all(re.fullmatch(r"[\d,]+(\.\d+)?|–", value) for value in values) and values[1:].count("–") < shown
        self.check("samples" in text and good, f"{label}: the values are {text!r}")
        inside = tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        self.check(inside, f"{label}: the values widen the page")

    def legend(self, page: Path, lines: int):
        """Six lines at most, among which the reader chooses."""
        tab, label = self.open(page, WIDTHS[0], "light")
        boxes = tab.locator("#legend input")
        count = boxes.count()
        self.check(count == lines, f"{label}: {count} boxes")
        self.check("6 lines at most" in tab.inner_text("#legend"), f"{label}: says nothing of the limit")
        state = "(boxes) => boxes.map((box) => [box.checked, box.disabled])"
        before = boxes.evaluate_all(state)
        self.check(before == [[number < 6, number >= 6] for number in range(lines)], f"{label}: boxes are {before}")
        boxes.nth(0).click()
        five = tab.evaluate(LINES)
        self.check(all(len(plot["lines"]) == 5 for plot in five), f"{label}: a line that was taken away is there")
        boxes.nth(lines - 1).click()
        after = boxes.evaluate_all(state)
        wanted = [[number in [1, 2, 3, 4, 5, lines - 1]] * 1 for number in range(lines)]
        self.check([box[:1] for box in after] == wanted, f"{label}: boxes are {after}")
        six = tab.evaluate(LINES)
        self.check(all(len(plot["lines"]) == 6 for plot in six), f"{label}: the chosen line is not there")
        looks = tab.evaluate(
            "[...document.querySelectorAll('#legend g.of:not(.off)')].map((line) => getComputedStyle(line).cssText"
            " || line.getAttribute('class'))"
        )
        self.check(len(looks) == 6 and len(set(looks)) == 6, f"{label}: lines look alike: {looks}")
        tab.context.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of a run."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def events(runs: Runs) -> list[str]:
    """Whether TensorBoard reads what the metrics say, also after steps were made again."""
    out = runs.folder / "events"
    flags = f"--model tiny --seq 32 --samples 160 --validation-samples 8 --validate-every 5 --sample 0 --out {out}"
    faults = []

    def compare(when: str, found: dict[str, list[tuple[int, float]]]):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for tag, key in [
            ("train/loss", "loss"),
            ("train/batch", "batch_samples"),
            ("validation/loss", "validation_loss"),
        ]:
            for prefix, x in [("", "step"), ("by_samples/", "samples_seen")]:
                wanted = [(line[x], line[key]) for line in lines if line[key] is not None]
                read = found.get(prefix + tag, [])
                same = [at for at, _ in read] == [at for at, _ in wanted] and all(
                    abs(a - b) < 1e-5 * abs(b) for (_, a), (_, b) in zip(read, wanted)
                )
                if not same or not wanted:
                    faults.append(f"{when}: {prefix}{tag} is {read}, not {wanted}")

    board = EventAccumulator(str(out / "tensorboard"))
    runs.train(f"{flags} --data {runs.folder / 'text'} --save-every 5 --tensorboard --steps 13")
    board.Reload()
    compare("a run", scalars(out / "tensorboard"))
    # Steps from 10 on are made again, while a TensorBoard has read the first ones.
    for later in (out / "checkpoints").glob("step-*"):
        if later.name > "step-00000010":
            shutil.rmtree(later)
    runs.train(f"--resume auto --out {out} --tensorboard --steps 17")
    compare("a resumed run", scalars(out / "tensorboard"))
    board.Reload()
    compare(
        "a reader that has read before",
        {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]},
    )
    runs.report("events", [out], "--tensorboard", str(runs.folder / "boards"))
    compare("a report", scalars(runs.folder / "boards/events"))
    return faults


def main():
    pillion, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True)
    runs = Runs(pillion, folder / "runs")
    evil = runs.make("<script>document.title = 'evil'</script>".replace("/", "\u2215"), 50, rate=3)
    seeds = [runs.make(f"seeds-{seed}", 200, seed) for seed in (1, 2, 3)]
    many = [runs.make(f"a-run-with-a-rather-long-name-number-{number}", 300, rate=number) for number in range(2, 11)]
    pages = {
        "one": (runs.report("one", [runs.folder / "real"]), 1),
        "seeds": (runs.report("seeds", [*seeds, evil, many[0]]), 3),
        "each": (runs.report("each", seeds, "--each"), 3),
        "many": (runs.report("many", many), len(many)),
    }
    long = [runs.make(f"long-{number}", 10_000, rate=number + 1) for number in range(10)]
    began = time.monotonic()
    page = runs.report("long", long)
    took, size = time.monotonic() - began, page.stat().st_size
    print(f"10 runs of 10000 steps: {took:.2f} s, {size / 1e6:.2f} MB")
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        looks = Looks(browser, folder)
        looks.check(size < 5_000_000, f"the page of long runs has {size} bytes")
        for page, lines in pages.values():
            looks.page(page, lines)
        looks.legend(pages["many"][0], len(many))
        looks.page(page := runs.folder / "long.html", len(long))
        tab, label = looks.open(pages["one"][0], WIDTHS[0], "light")
        bars = tab.locator("figure.wide rect:visible").count()
        looks.check(bars > 10, f"{label}: the timeline has {bars} bars")
        browser.close()
    looks.faults += events(runs)
    for fault in looks.faults:
        print(fault)
    print(f"{len(pages) + 1} pages, {len(looks.faults)} faults; screenshots in {folder}")
    sys.exit(1 if looks.faults else 0)


if __name__ == "__main__":
    main()
