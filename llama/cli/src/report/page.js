'use strict';
// The legend: at most as many lines as there are looks. A line that is shown takes a free look.
const legend = document.getElementById('legend');
const most = Number(legend.dataset.most);
const labels = [...legend.querySelectorAll('label')];
const slots = labels.map((label, line) => (line < most ? line : -1));

function show() {
  const full = slots.filter((slot) => slot >= 0).length >= most;
  labels.forEach((label, line) => {
    const box = label.querySelector('input');
    box.checked = slots[line] >= 0;
    box.disabled = full && slots[line] < 0;
    const absent = label.querySelector('.absent');
    if (absent) absent.hidden = true;
  });
  for (const part of document.querySelectorAll('#legend g[data-line], .plots g[data-line]')) {
    const slot = slots[part.dataset.line];
    part.setAttribute('class', slot >= 0 ? `of s${slot}` : 'of off');
  }
}

labels.forEach((label, line) => {
  const box = label.querySelector('input');
  box.hidden = false;
  box.addEventListener('change', () => {
    const free = Array.from({ length: most }, (_, slot) => slot).find((slot) => !slots.includes(slot));
    slots[line] = box.checked && free !== undefined ? free : -1;
    show();
  });
});
for (const text of legend.querySelectorAll('.scripted')) text.hidden = false;
show();

// Values under the pointer: those of each line's point that is nearest along x, if the line is there.
const digits = new Intl.NumberFormat('en', { maximumSignificantDigits: 6 });
const format = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : digits.format(value));
const points = new WeakMap();

function pointsOf(part) {
  if (!points.has(part)) points.set(part, (part.dataset.points || '').split(' ').map(Number));
  return points.get(part);
}

function nearest(numbers, x) {
  let [low, high] = [0, numbers.length / 2 - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[2 * middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(numbers[2 * low] - x) < Math.abs(numbers[2 * high] - x) ? low : high;
}

function row(tip, slot, name, value) {
  const line = document.createElement('div');
  if (slot >= 0) line.appendChild(document.createElement('i')).className = `s${slot}`;
  line.appendChild(document.createElement('span')).textContent = name;
  line.appendChild(document.createElement('b')).textContent = value;
  tip.appendChild(line);
}

for (const svg of document.querySelectorAll('.plots svg.plot')) {
  const { left, width, top, height, low, high } = svg.dataset;
  const [from, across] = [Number(left), Number(width)];
  const tip = document.createElement('div');
  tip.className = 'tip';
  tip.hidden = true;
  svg.after(tip);
  const rule = document.createElementNS(svg.namespaceURI, 'path');
  rule.setAttribute('class', 'rule');

  const hide = () => {
    tip.hidden = true;
    rule.remove();
  };
  // A finger that is lifted leaves the values there, until another place is touched.
  svg.addEventListener('pointerleave', (event) => event.pointerType === 'touch' || hide());
  document.addEventListener('pointerdown', (event) => svg.contains(event.target) || hide());
  const move = (event) => {
    const place = svg.getBoundingClientRect();
    const pixel = ((event.clientX - place.left) / place.width) * svg.viewBox.baseVal.width;
    const share = Math.min(Math.max((pixel - from) / across, 0), 1);
    const x = Number(low) + share * (Number(high) - Number(low));
    tip.replaceChildren();
    row(tip, -1, svg.dataset.x, format(x));
    for (const part of svg.querySelectorAll('g[data-points]:not(.off)')) {
      const numbers = pointsOf(part);
      if (numbers.length < 2) continue;
      const near = (Number(high) - Number(low)) / 100;
      const isThere = x > numbers[0] - near && x < numbers[numbers.length - 2] + near;
      const line = Number(part.dataset.line);
      const name = labels[line].querySelector('.name').textContent;
      row(tip, slots[line], name, isThere ? format(numbers[2 * nearest(numbers, x) + 1]) : '–');
    }
    rule.setAttribute('d', `M${from + share * across} ${top}v${height}`);
    svg.appendChild(rule);
    tip.hidden = false;
    tip.style[share < 0.5 ? 'right' : 'left'] = '0.5rem';
    tip.style[share < 0.5 ? 'left' : 'right'] = 'auto';
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
}
