// Reads the text of /metrics and computes what changes over time from it: rates, and quantiles of histograms
// between two readings. The dashboard's numbers are these, so they are /metrics by construction.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/** @typedef {{labels: Object<string, string>, value: number}} Sample */

/** One reading of /metrics. */
export class Reading {
  /** @param {string} text @param {number} at_s */
  constructor(text, at_s) {
    this.at_s = at_s;
    /** @type {Map<string, Sample[]>} */
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : LINE.exec(line);
      if (!match) continue;
      const labels = {};
      for (const [, name, value] of (match[2] || "").matchAll(LABEL)) labels[name] = value;
      if (!this.samples.has(match[1])) this.samples.set(match[1], []);
      this.samples.get(match[1]).push({ labels, value: Number(match[3]) });
    }
  }

  /** The sum over all labels, or over samples of one kind; null if there is no such metric. */
  value(name, kind) {
    const samples = (this.samples.get(name) || []).filter((one) => !kind || one.labels.kind === kind);
    return samples.length ? samples.reduce((sum, sample) => sum + sample.value, 0) : null;
  }

  /** The mean over all labels; null if there is no such metric. */
  mean(name) {
    const sum = this.value(name);
    return sum === null ? null : sum / this.samples.get(name).length;
  }

  /** Upper bounds and how many observations were at most that, over all labels. @param {string} name */
  buckets(name) {
    const sums = new Map();
    for (const { labels, value } of this.samples.get(name + "_bucket") || []) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      sums.set(bound, (sums.get(bound) || 0) + value);
    }
    return [...sums].sort(([one], [other]) => one - other);
  }
}

/** What a counter gained per second between two readings; null where a restart set it back. */
export function rate(earlier, later, name, kind) {
  const before = earlier.value(name, kind), after = later.value(name, kind);
  const took = later.at_s - earlier.at_s;
  return before === null || after === null || after < before || took <= 0 ? null : (after - before) / took;
}

/**
 * Quantiles of what a histogram observed between two readings, interpolated inside its buckets as Prometheus
 * does; null if it observed nothing.
 * @param {Reading} earlier @param {Reading} later @param {string} name @param {number[]} shares
 */
export function quantiles(earlier, later, name, shares) {
  const before = new Map(earlier.buckets(name));
  const gained = later.buckets(name).map(([bound, value]) => [bound, value - (before.get(bound) || 0)]);
  const total = gained.length ? gained[gained.length - 1][1] : 0;
  if (total <= 0 || gained.some(([, value]) => value < 0)) return shares.map(() => null);
  return shares.map((share) => within(gained, share * total));
}

function within(buckets, rank) {
  let [low, below] = [0, 0];
  for (const [bound, value] of buckets) {
    if (value >= rank && value > below) {
      if (bound === Infinity) return low;  // all that is known: more than the last bound
      return low + (bound - low) * (rank - below) / (value - below);
    }
    [low, below] = [bound, value];
  }
  return low;
}
